"""A LoRA of true size with random weights, for timing: every attention and feed-forward product of every block.

    python benchmarks/random_lora.py wan2.1-t2v-1.3b lora.safetensors [--rank 32]
    SWIFTWAN_BENCH_LORA=lora.safetensors swiftwan bench seed-001 --out results

Names are those that diffusers writes.
"""

from __future__ import annotations

import argparse

import torch
from safetensors.torch import save_file

from swiftwan.models.config import KNOWN_MODELS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=KNOWN_MODELS)
    parser.add_argument("file")
    parser.add_argument("--rank", type=int, default=32)
    options = parser.parse_args()
    config = KNOWN_MODELS[options.model].transformer
    sizes = {"ffn.net.0.proj": (config.dim, config.ffn_dim), "ffn.net.2": (config.ffn_dim, config.dim)}
    for attention in ("attn1", "attn2"):
        for layer in ("to_q", "to_k", "to_v", "to_out.0"):
            sizes[f"{attention}.{layer}"] = (config.dim, config.dim)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for block in range(config.num_layers):
        for layer, (wide, out) in sizes.items():
            name = f"transformer.blocks.{block}.{layer}"
            weights[f"{name}.lora_A.weight"] = torch.randn(options.rank, wide, generator=generator) / wide**0.5
            # Small, so that the sum stays a model's: a trained LoRA changes weights by about a hundredth.
            weights[f"{name}.lora_B.weight"] = torch.randn(out, options.rank, generator=generator) * 1e-3
    save_file({name: weight.to(torch.bfloat16) for name, weight in weights.items()}, options.file)
    print(f"{options.file}: {sum(w.numel() for w in weights.values()) / 1e6:.1f} M weights")


if __name__ == "__main__":
    main()
