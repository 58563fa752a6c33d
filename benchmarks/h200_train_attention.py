"""Forward and backward of attention at training shapes, kernel by kernel, on one H200.

    python benchmarks/h200_train_attention.py [--out rows.jsonl] [--tokens 32760] [--only cross]

Self-attention of 12 and 40 heads, and cross-attention to the keys of a prompt: 64 tokens and two for the padding, 128.
The error is that of output and gradients against float32 maths at 2,048 tokens.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from swiftwan.device import versions
from swiftwan.ops.attention import sdpa
from swiftwan.ops.few_keys_triton import few_keys


def by(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa(q, k, v)


def flash4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn.cute import flash_attn_func

    out = flash_attn_func(q, k, v)
    return out[0] if isinstance(out, tuple) else out


def cudnn_biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v, torch.zeros(1, 1, 1, k.shape[1], device=k.device, dtype=k.dtype))


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "torch flash": partial(by, SDPBackend.FLASH_ATTENTION),
    "cuDNN": partial(by, SDPBackend.CUDNN_ATTENTION),
    "FlashAttention-4": flash4,
}
CROSS = {"cuDNN": cudnn_biased, "Triton": few_keys}


def inputs(tokens: int, keys: int, heads: int) -> list[Tensor]:
    return [
        torch.randn(1, length, heads, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for length in (tokens, keys, keys)
    ]


def seconds(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def errors(attend: Callable[[Tensor, Tensor, Tensor], Tensor], keys: int) -> dict[str, float]:
    torch.manual_seed(1)
    qkv = inputs(2048, keys, 4)
    grad = torch.randn_like(qkv[0])
    wide = [x.detach().float().requires_grad_() for x in qkv]
    with sdpa_kernel(SDPBackend.MATH):
        reference = sdpa(*wide)
    wanted = [reference, *torch.autograd.grad(reference, wide, grad.float())]
    out = attend(*qkv)
    got = [out, *torch.autograd.grad(out, qkv, grad)]
    return {
        name: float((a.float() - b).norm() / b.norm())
        for name, a, b in zip(("out", "dq", "dk", "dv"), got, wanted, strict=True)
    }


def measured(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], tokens: int, keys: int, heads: int, repeats: int
) -> dict[str, object]:
    qkv = inputs(tokens, keys, heads)
    grad = torch.randn_like(qkv[0])
    work = 4 * tokens * keys * heads * 128 / 1e12
    forward = seconds(lambda: attend(*qkv), repeats)
    out = attend(*qkv)
    backward = seconds(lambda: torch.autograd.grad(out, qkv, grad, retain_graph=True), repeats)
    return {
        "forward_seconds": forward,
        "backward_seconds": backward,
        "forward_tflops": work / forward,
        "backward_tflops": 2.5 * work / backward,
        "errors": errors(attend, min(keys, 2048)),
        "status": "ok",
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=32_760)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=["self", "cross"])
    options = parser.parse_args()
    cases = [(heads, options.tokens, KERNELS) for heads in (12, 40)] if options.only != "cross" else []
    cases += [(heads, keys, CROSS) for heads in (12, 40) for keys in (66, 128)] if options.only != "self" else []
    for heads, keys, choice in cases:
        for name, attend in choice.items():
            what = "attention" if keys == options.tokens else f"attention to {keys} keys"
            row: dict[str, object] = {"case": f"{what} {heads} x {options.tokens} x 128, bf16", "kernel": name}
            try:
                row |= measured(attend, options.tokens, keys, heads, options.repeats)
            except Exception as error:
                row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:400]}
            row |= {
                "device": torch.cuda.get_device_name(),
                "versions": versions(),
                "date": datetime.date.today().isoformat(),
            }
            print(json.dumps(row), flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
