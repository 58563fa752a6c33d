# ruff: noqa: B023  (every lambda is timed before its loop goes on)
"""The parts of an 8-bit and of a block-sparse forward one by one on an H200.

    python benchmarks/h200_fp8_components.py [products] [rounding] [attention] [sparse] > h200_fp8_components.txt

Prints a line each: milliseconds (median), TFLOP/s or GB/s of the bytes that must move, and for the attention kernels
their relative error against float32 on white noise, as it is and with scores three times as far apart.
"""

from __future__ import annotations

import sys
import traceback

import torch
from h200_components import SIZES, draw, sizes, tell

from swiftwan.ops.attention import kernel, sdpa
from swiftwan.ops.fp8 import quantize_rows as plain_rows
from swiftwan.ops.sparse import select_blocks, sparse_flash4, sparse_flex, sparse_reference


def products(size: str) -> None:
    _, dim, ffn, tokens, _ = sizes(size)
    for into, out in ((dim, dim), (dim, 3 * dim), (dim, ffn), (ffn, dim)):
        x, weight, bias = draw(tokens, into), draw(out, into), draw(out)
        flop = 2 * tokens * into * out
        rows, row_scale = plain_rows(x)
        columns, column_scale = plain_rows(weight)
        one = torch.ones((), device="cuda")
        for scaling, scales in (("row", (row_scale, column_scale.T.contiguous())), ("tensor", (one, one))):
            tell(
                size,
                f"fp8 {into} to {out}, scales by {scaling}",
                lambda: torch._scaled_mm(
                    rows, columns.T, *scales, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
                ),
                flop,
            )
        tell(size, f"bf16 {into} to {out}", lambda: torch.nn.functional.linear(x, weight, bias), flop)


def rounding(size: str) -> None:
    from swiftwan.ops.fused_fp8 import FUSED_FP8, linear_gelu, quantize_rows
    from swiftwan.ops.round_attention import round_and_pool, round_attention

    heads, dim, ffn, tokens, _ = sizes(size)
    x, update, wide = draw(1, tokens, dim), draw(1, tokens, dim), draw(1, tokens, ffn)
    shift, scale, gate = torch.randn(1, 1, 6, dim, device="cuda").unbind(2)[:3]
    weight, bias = torch.randn(dim, device="cuda"), torch.randn(dim, device="cuda")
    spans, count = [tokens], x.numel()
    tell(size, "rows of D", lambda: quantize_rows(x), count=3 * count)
    tell(size, "rows of F", lambda: quantize_rows(wide), count=3 * wide.numel())
    tell(size, "GELU and rows of F", lambda: linear_gelu(lambda y: y, wide), count=3 * wide.numel())
    tell(size, "norm_modulate", lambda: FUSED_FP8.norm_modulate(x, shift, scale, spans, 1e-6), count=3 * count)
    tell(
        size,
        "gated_add_norm",
        lambda: FUSED_FP8.gated_add_norm(x, update, gate, spans, weight, bias, 1e-6),
        count=7 * count,
    )
    q, k, v = (draw(1, tokens, heads, 128) for _ in range(3))
    tell(size, "q, k and v for 8-bit attention", lambda: round_attention(q, k, v), count=13 * count)
    tell(size, "the same with pooled blocks", lambda: round_and_pool(q, k, v), count=13 * count)


def attention(size: str) -> None:
    from swiftwan.ops.attention_fp8_gluon import attend_rounded
    from swiftwan.ops.round_attention import round_attention

    heads, _, _, tokens, _ = sizes(size)
    q, k, v = (draw(1, tokens, heads, 128) for _ in range(3))
    flop = 4 * heads * tokens**2 * 128
    for name in ("fp8", "flash4", "cudnn"):
        try:
            attend = kernel(name).load()
            for sharp in (1, 3):
                expected = sdpa((sharp * q[:, :64]).float(), k.float(), v.float())
                error = (attend(sharp * q, k, v)[:, :64].float() - expected).norm() / expected.norm()
                print(f"{size:11} attention {name}, scores times {sharp}: error {error.item():.2e}", flush=True)
            tell(size, f"attention {name}", lambda: attend(q, k, v), flop, repeats=5)
        except Exception:
            traceback.print_exc()
    rounded = round_attention(q, k, v)
    tell(size, "attention fp8, rounded before", lambda: attend_rounded(rounded, q.dtype), flop, repeats=5)


def sparse(size: str) -> None:
    from swiftwan.ops.attention_fp8_gluon import attend_rounded, attend_sparse
    from swiftwan.ops.round_attention import round_attention

    heads, _, _, tokens, _ = sizes(size)
    q, k, v = (draw(1, tokens, heads, 128) for _ in range(3))
    rounded = round_attention(q, k, v)
    kernel("flash4").load()
    flex = sparse_flex()
    for keep in (0.25, 0.125):
        blocks = select_blocks(q, k, keep)
        flop = 4 * 128**3 * blocks.numel()
        one = [x[:, :, :1].float() for x in (q, k, v)]
        expected = sparse_reference(*one, blocks[:, :1], 128)
        tell(size, f"choose {keep}", lambda: select_blocks(q, k, keep), count=4 * q.numel())
        for name, run in (
            ("flash4", lambda: sparse_flash4(q, k, v, blocks, 128)),
            ("flex", lambda: flex(q, k, v, blocks, 128)),
            ("fp8, rounded before", lambda: attend_rounded(rounded, q.dtype, blocks)),
            ("fp8, all of it", lambda: attend_sparse(q, k, v, keep)),
        ):
            try:
                error = (run()[:, :, :1].float() - expected).norm() / expected.norm()
                print(f"{size:11} keep {keep} {name}: error {error.item():.2e}", flush=True)
                tell(size, f"keep {keep} {name}", run, flop)
            except Exception:
                traceback.print_exc()


def main() -> None:
    torch.manual_seed(0)
    modes = {mode.__name__: mode for mode in (products, rounding, attention, sparse)}
    wanted = [argument for argument in sys.argv[1:] if argument in modes] or list(modes)
    chosen = [argument for argument in sys.argv[1:] if argument in SIZES] or ["1.3b-480p"]
    with torch.no_grad():
        for size in chosen:
            for mode in wanted:
                modes[mode](size)


if __name__ == "__main__":
    main()
