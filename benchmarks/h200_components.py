# ruff: noqa: B023  (every lambda is timed before its loop goes on)
"""The parts of a block one by one on an H200: matrix products, attention kernels, fused kernels.

    python benchmarks/h200_components.py [gemm] [attention] [cross] [fused] [tune] [check]

Prints a line each: milliseconds (median), and TFLOP/s or GB/s of the bytes that must move.
"""

from __future__ import annotations

import statistics
import sys
import traceback
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F

from swiftwan.ops.attention import KERNELS, sdpa
from swiftwan.ops.block import PLAIN
from swiftwan.ops.rope import rope_tables

SIZES = {  # heads, feed-forward, latent grid in patches
    "1.3b-480p": (12, 8960, (21, 30, 52)),
    "5b-720p": (24, 14336, (31, 22, 40)),
    "14b-720p": (40, 13824, (21, 45, 80)),
    "image pair": (12, 8960, (2, 30, 52)),
}
WIDTH = 128
EPS = 1e-6


def milliseconds(run: Callable[[], Any], repeats: int = 11) -> float:
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(4):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 4)
    return statistics.median(times)


def tell(size: str, what: str, run: Callable[[], Any], flop: float = 0, count: float = 0, repeats: int = 11) -> None:
    try:
        ms = milliseconds(run, repeats)
    except Exception as problem:
        traceback.print_exc()
        print(f"{size:11} {what:42} failed: {type(problem).__name__}: {str(problem)[:200]}", flush=True)
        return
    rate = f"{flop / ms / 1e9:8.1f} TFLOP/s" if flop else f"{count / ms / 1e6:8.0f} GB/s"
    print(f"{size:11} {what:42} {ms:9.4f} ms {rate}", flush=True)


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def sizes(size: str) -> tuple[int, int, int, int, tuple[int, int, int]]:
    heads, ffn, grid = SIZES[size]
    return heads, heads * WIDTH, ffn, grid[0] * grid[1] * grid[2], grid


def gemm(size: str) -> None:
    from swiftwan.ops.fused import linear_gelu

    _, dim, ffn, tokens, _ = sizes(size)
    x, wide = draw(tokens, dim), draw(tokens, ffn)
    for what, source, out in (
        ("D to D", x, dim),
        ("D to 3 D", x, 3 * dim),
        ("D to F", x, ffn),
        ("F to D", wide, dim),
    ):
        linear = torch.nn.Linear(source.shape[1], out, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
        flop = 2 * tokens * source.shape[1] * out
        tell(size, f"linear {what}", lambda: linear(source), flop)
        if what == "D to F":
            tell(size, "linear D to F, GELU epilogue", lambda: linear_gelu(linear, source), flop)
            tell(size, "gelu alone", lambda: F.gelu(wide, approximate="tanh"), count=4 * wide.numel())
            expected = F.gelu(linear(source[:4096]).float(), approximate="tanh")
            got = linear_gelu(linear, source[:4096]).float()
            print(f"{size:11} GELU epilogue error {((got - expected).norm() / expected.norm()).item():.2e}")
    residual = draw(tokens, dim)
    weight = draw(dim, dim)
    tell(size, "addmm x + a W, D to D", lambda: torch.addmm(residual, x, weight.t()), 2 * tokens * dim * dim)


def attention(size: str) -> None:
    heads, _, _, tokens, _ = sizes(size)
    batch = 1
    if size == "image pair":
        batch, tokens = 2, tokens // 2
    q, k, v = (draw(batch, tokens, heads, WIDTH) for _ in range(3))
    flop = 4 * batch * heads * tokens**2 * WIDTH
    repeats = 3 if flop > 5e13 else 7
    few = slice(0, 64)
    expected = sdpa(q[:, few].float(), k.float(), v.float())
    for kernel in KERNELS:
        if told := kernel.missing_on(torch.cuda.get_device_capability()):
            print(f"{size:11} attention {kernel.name}: {told}")
            continue
        if kernel.name == "sdpa" and flop > 5e13:
            continue
        try:
            attend = kernel.load()
            got = attend(q, k, v)[:, few].float()
            print(f"{size:11} attention {kernel.name} error {((got - expected).norm() / expected.norm()).item():.2e}")
        except Exception as problem:
            traceback.print_exc()
            print(f"{size:11} attention {kernel.name} failed: {type(problem).__name__}: {str(problem)[:300]}")
            continue
        tell(size, f"attention {kernel.name}", lambda: attend(q, k, v), flop, repeats=repeats)


def cross(size: str) -> None:
    heads, dim, _, tokens, _ = sizes(size)
    q, weight = draw(1, tokens, dim), draw(dim)
    count = 4 * q.numel()
    tell(size, "rms_norm of q", lambda: F.rms_norm(q, (dim,), weight, EPS), count=count)
    query = q.unflatten(-1, (heads, -1))
    for keys in (22, 67, 129, 512):
        key, value = draw(1, keys, heads, WIDTH), draw(1, keys, heads, WIDTH)
        bias = torch.zeros(1, 1, 1, keys, device="cuda", dtype=torch.bfloat16)
        tell(size, f"text attention, {keys} keys, with bias", lambda: sdpa(query, key, value, bias), count=count)
        tell(size, f"text attention, {keys} keys", lambda: sdpa(query, key, value), count=count)


def fused(size: str) -> None:
    from swiftwan.ops.fused import FUSED

    heads, dim, _, tokens, grid = sizes(size)
    x, update = draw(1, tokens, dim), draw(1, tokens, dim)
    weight, bias = torch.randn(dim, device="cuda"), torch.randn(dim, device="cuda")
    w = draw(dim)
    rope = rope_tables(WIDTH, *grid, device=torch.device("cuda"))
    size_bytes = 2 * x.numel()
    for spans in ([tokens], [tokens // 3, tokens - tokens // 3]):
        shift, scale, gate = torch.randn(1, len(spans), 6, dim, device="cuda").unbind(2)[:3]
        for what, ops in (("fused", FUSED), ("plain", PLAIN)):
            if what == "plain" and len(spans) == 2:
                continue
            for name, passes, call in (
                ("norm_modulate", 2, lambda: ops.norm_modulate(x, shift, scale, spans, EPS)),
                ("gated_add", 3, lambda: ops.gated_add(x, update, gate, spans)),
                ("gated_add_norm", 4, lambda: ops.gated_add_norm(x, update, gate, spans, weight, bias, EPS)),
                ("add_norm_modulate", 4, lambda: ops.add_norm_modulate(x, update, shift, scale, spans, EPS)),
                ("norm_rope", 4, lambda: ops.norm_rope(x, update, w, w, rope, heads, EPS)),
            ):
                if name == "norm_rope" and len(spans) == 2:
                    continue
                tell(size, f"{name}, {len(spans)} spans, {what}", call, count=passes * size_bytes)
    tell(size, "copy", lambda: x.clone(), count=2 * size_bytes)


def tune(size: str) -> None:
    """Rows a program, and warps, of the fused kernels."""
    import triton

    from swiftwan.ops import fused as module
    from swiftwan.ops.fused_fp8 import empty_rounded

    heads, dim, _, tokens, grid = sizes(size)
    x, update = draw(1, tokens, dim), draw(1, tokens, dim)
    w = draw(dim)
    shift, scale, gate = torch.randn(1, 1, 6, dim, device="cuda").unbind(2)[:3]
    first, rest = module.parts_of(dim)
    summed, normed = torch.empty_like(x), (torch.empty_like(x), x)
    rounded = empty_rounded(x.shape, x.device)
    for rows, warps in product((1, 2, 4, 8, 16, 32), (1, 2, 4, 8)):
        for add, bits in product((False, True), (16, 8)):
            tell(
                size,
                f"add_norm add={add} bits={bits} rows={rows} warps={warps}",
                lambda: module._add_norm_kernel[(triton.cdiv(tokens, rows), 1)](
                    x, update, gate, scale, shift, summed if add else x, *(rounded if bits == 8 else normed),
                    tokens, tokens, 6 * dim, 6 * dim, 6 * dim, 6 * dim, EPS,
                    WIDTH=dim, FIRST=first, REST=rest, ROWS=rows, SPANS=1,
                    ADD=add, GATED=add, NORM=True, MODULATED=True, ROUNDED=bits == 8, num_warps=warps,
                ),
                count=((6 if add else 2) + bits // 8) * x.numel(),
                repeats=5,
            )  # fmt: skip
    rope = rope_tables(WIDTH, *grid, device=torch.device("cuda"))
    out = [torch.empty_like(x) for _ in range(2)]
    block_h = triton.next_power_of_2(heads)
    for warps in (1, 2, 4, 8, 16):
        tell(
            size,
            f"norm_rope warps={warps}",
            lambda: module._norm_rope_kernel[(tokens, 1)](
                x, update, w, w, *rope, *out, tokens, dim, EPS,
                HEADS=heads, WIDTH=WIDTH, BLOCK_H=block_h, BLOCK_E=WIDTH, num_warps=warps,
            ),
            count=8 * x.numel(),
            repeats=5,
        )  # fmt: skip


def check(size: str) -> None:
    """Each fused kernel, in each dtype, against the plain one in float64; the plain one's error beside it."""
    from swiftwan.ops.fused import FUSED

    heads, dim, _, tokens, grid = sizes(size)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x, update = draw(2, tokens, dim, dtype=dtype), draw(2, tokens, dim, dtype=dtype)
        w, other = draw(dim, dtype=dtype), draw(dim, dtype=dtype)
        weight, bias = torch.randn(dim, device="cuda"), torch.randn(dim, device="cuda")
        rope = rope_tables(WIDTH, *grid, device=torch.device("cuda"))
        cases: list[tuple[str, str, tuple[Any, ...]]] = [("norm_rope", "", (x, update, w, other, rope, heads, EPS))]
        for spans in ([tokens], [tokens // 3, tokens - tokens // 3]):
            shift, scale, gate = torch.randn(2, len(spans), 6, dim, device="cuda").unbind(2)[:3]
            cases += [
                ("norm_modulate", str(spans), (x, shift, scale, spans, EPS)),
                ("gated_add", str(spans), (x, update, gate, spans)),
                ("gated_add_norm", str(spans), (x, update, gate, spans, weight, bias, EPS)),
                ("add_norm_modulate", str(spans), (x, update, shift, scale, spans, EPS)),
            ]
        for name, note, args in cases:
            exact_args = [a.float() if isinstance(a, torch.Tensor) else a for a in args]
            try:
                got, plain = getattr(FUSED, name)(*args), getattr(PLAIN, name)(*args)
                expected = getattr(PLAIN, name)(*exact_args)
            except Exception as problem:
                traceback.print_exc()
                print(f"check {dtype} {name} {note} failed: {type(problem).__name__}: {str(problem)[:200]}", flush=True)
                continue
            if isinstance(got, torch.Tensor):
                got, plain, expected = (got,), (plain,), (expected,)
            errors = [f"{((a.float() - e).norm() / e.norm()).item():.1e}" for a, e in zip(got, expected, strict=True)]
            theirs = [f"{((a.float() - e).norm() / e.norm()).item():.1e}" for a, e in zip(plain, expected, strict=True)]
            print(f"check {str(dtype):15} {name:18} {note:22} fused {errors} plain {theirs}", flush=True)


def main() -> None:
    torch.manual_seed(0)
    modes = {f.__name__: f for f in (gemm, attention, cross, fused, tune, check)}
    wanted = [argument for argument in sys.argv[1:] if argument in modes] or list(modes)
    chosen = [argument for argument in sys.argv[1:] if argument in SIZES] or ["1.3b-480p"]
    with torch.no_grad():
        for size in chosen:
            for mode in wanted:
                modes[mode](size)


if __name__ == "__main__":
    main()
