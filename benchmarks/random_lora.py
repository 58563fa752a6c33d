"""A LoRA of true size with random weights, for timing: every attention and feed-forward product of every block.

    python benchmarks/random_lora.py wan2.1-t2v-1.3b lora.safetensors [--rank 32]
    SWIFTWAN_BENCH_LORA=lora.safetensors swiftwan bench seed-001 --out results

Names are those that diffusers writes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from swiftwan.models.config import KNOWN_MODELS


def write(model: str, file: str | Path, rank: int = 32) -> int:
    """Make the file; returns how many weights it holds."""
    config = KNOWN_MODELS[model].transformer
    sizes = {"ffn.net.0.proj": (config.dim, config.ffn_dim), "ffn.net.2": (config.ffn_dim, config.dim)}
    for attention in ("attn1", "attn2"):
        for layer in ("to_q", "to_k", "to_v", "to_out.0"):
            sizes[f"{attention}.{layer}"] = (config.dim, config.dim)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for block in range(config.num_layers):
        for layer, (wide, out) in sizes.items():
            name = f"transformer.blocks.{block}.{layer}"
            weights[f"{name}.lora_A.weight"] = torch.randn(rank, wide, generator=generator) / wide**0.5
            # Small, so that the sum stays a model's: a trained LoRA changes weights by about a hundredth.
            weights[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 1e-3
    save_file({name: weight.to(torch.bfloat16) for name, weight in weights.items()}, file)
    return sum(weight.numel() for weight in weights.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=KNOWN_MODELS)
    parser.add_argument("file")
    parser.add_argument("--rank", type=int, default=32)
    options = parser.parse_args()
    print(f"{options.file}: {write(options.model, options.file, options.rank) / 1e6:.1f} M weights")


if __name__ == "__main__":
    main()
