# ruff: noqa: B023  (every lambda is timed before its loop goes on)
"""The parts of an 8-bit and of a block-sparse forward one by one on an H200.

    python benchmarks/h200_fp8_components.py [products] [sums] [pictures] [rounding] [attention] [sparse] > parts.txt

Prints a line each: milliseconds (median), TFLOP/s or GB/s of the bytes that must move, and the share of the ceiling;
before them the error of each kernel that rounds, relative to float32, on white noise; of attention also with scores
three times as far apart. Ceilings: 1379 TFLOP/s for products and 871 for attention in 8 bits, 782 and 708 in 16 (all
measured there, cuDNN's and FlashAttention-4's), and the memory's 4800 GB/s.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from h200_components import SIZES, draw, milliseconds, sizes

from swiftwan.ops.attention import kernel, sdpa
from swiftwan.ops.fp8 import quantize_rows as plain_rows
from swiftwan.ops.products import without_workspace
from swiftwan.ops.sparse import select_blocks, sparse_flash4, sparse_flex, sparse_reference

MEMORY = 4800
"""GB/s, of the data sheet."""


def tell(size: str, what: str, run: Callable[[], Any], ceiling: float, flop: float = 0, count: float = 0) -> None:
    """``ceiling`` in TFLOP/s for operations, in GB/s for bytes."""
    ms = milliseconds(run, 7)
    rate, unit = (flop / ms / 1e9, "TFLOP/s") if flop else (count / ms / 1e6, "GB/s")
    print(f"{size:11} {what:46} {ms:9.4f} ms {rate:8.1f} {unit:7} {100 * rate / ceiling:4.0f} %", flush=True)


def far(got: torch.Tensor, expected: torch.Tensor) -> str:
    return f"{((got.float() - expected).norm() / expected.norm()).item():.2e}"


def products(size: str) -> None:
    from swiftwan.ops.fp8 import Fp8Linear
    from swiftwan.ops.fused_fp8 import linear_gelu as in_two
    from swiftwan.ops.gelu_fp8 import Bound
    from swiftwan.ops.gelu_fp8_gluon import linear_gelu

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
                1379,
                flop,
            )
        tell(size, f"bf16 {into} to {out}", lambda: F.linear(x, weight, bias), 782, flop)
    linear = Fp8Linear.of(torch.nn.Linear(dim, ffn, device="cuda", dtype=torch.bfloat16))
    bound, rounded, flop = Bound.of(linear), linear.quantize_rows(draw(tokens, dim)), 2 * tokens * dim * ffn
    expected = F.gelu(linear(rounded).float(), approximate="tanh")
    for name, run in (
        ("product, then GELU and rounding", lambda: in_two(linear, rounded)),
        ("product with GELU and rounding in it", lambda: linear_gelu(linear, rounded, bound)),
    ):
        made = run()
        print(f"{size:11} {name}: error {far(made.values.float() * made.scale, expected)}", flush=True)
        tell(size, name, run, 1379, flop)


def sums(size: str) -> None:
    """Product, sum and norm one after the other, and with the sum in the product; three streams of tokens in turn."""
    from swiftwan.ops.added_product import adding
    from swiftwan.ops.fp8 import Fp8Linear, Product
    from swiftwan.ops.fused_fp8 import FUSED_FP8

    _, dim, ffn, tokens, _ = sizes(size)
    # So small because streams are added to in place, again and again.
    gate = torch.randn(1, 1, 6, dim, device="cuda").unbind(2)[2] / 1000
    given = (gate, [tokens], torch.randn(dim, device="cuda"), torch.randn(dim, device="cuda"), 1e-6)
    ops = adding(FUSED_FP8)
    for into in (dim, ffn):
        layer = Fp8Linear.of(torch.nn.Linear(into, dim, device="cuda", dtype=torch.bfloat16))
        streams = [(draw(1, tokens, dim), plain_rows(draw(1, tokens, into))) for _ in range(3)]
        x, rows = streams[0]
        apart, both = (
            FUSED_FP8.gated_add_norm(x, layer(rows), *given),
            ops.gated_add_norm(x, Product(layer, rows), *given),
        )
        print(f"{size:11} {into} to {dim}, sum in the product: distance {far(both[0], apart[0])}", flush=True)
        for name, run in (
            ("then sum and norm", lambda: [FUSED_FP8.gated_add_norm(x, layer(rows), *given) for x, rows in streams]),
            ("its sum, norm", lambda: [ops.gated_add_norm(x, Product(layer, rows), *given) for x, rows in streams]),
        ):
            tell(size, f"3 products of {into} to {dim}, {name}", run, 1379, 3 * 2 * tokens * into * dim)


def pictures(size: str) -> None:
    """Products of two pictures by cuBLASLt and in tall tiles, recorded, 30 layers' weights in turn."""
    from h200_rungs import recorded

    from swiftwan.ops import tall_product
    from swiftwan.ops.fp8 import Fp8Linear, scaled_product

    _, dim, ffn, _, _ = sizes(size)
    tokens, count = 2 * 1560, 30
    for into in (dim, ffn):
        layers = [Fp8Linear.of(torch.nn.Linear(into, dim, device="cuda", dtype=torch.bfloat16)) for _ in range(count)]
        x, first = plain_rows(draw(tokens, into)), layers[0]
        expected = F.linear(x.values.float() * x.scale, first.weight.float() * first.scale.T, first.bias.float())
        for name, product in (("cuBLASLt", scaled_product), ("tall tiles", tall_product.product)):
            print(f"{size:11} {into} to {dim}, {name}: error {far(product(first, *x), expected)}", flush=True)
            run = recorded(lambda: [product(layer, *x) for layer in layers][-1])
            tell(size, f"{count} of two pictures, {into} to {dim}, {name}", run, 1379, count * 2 * tokens * into * dim)


def rounding(size: str) -> None:
    from swiftwan.ops.attention import norm_attend as plain
    from swiftwan.ops.fused_fp8 import FUSED_FP8, linear_gelu, quantize_rows
    from swiftwan.ops.round_attention import round_and_pool, round_attention
    from swiftwan.ops.text_attention import norm_attend, norm_attend_round

    heads, dim, ffn, tokens, _ = sizes(size)
    x, update, wide = draw(1, tokens, dim), draw(1, tokens, dim), draw(1, tokens, ffn)
    shift, scale, gate = torch.randn(1, 1, 6, dim, device="cuda").unbind(2)[:3]
    weight, bias = torch.randn(dim, device="cuda"), torch.randn(dim, device="cuda")
    spans, count = [tokens], x.numel()
    tell(size, "rows of D", lambda: quantize_rows(x), MEMORY, count=3 * count)
    tell(size, "rows of F", lambda: quantize_rows(wide), MEMORY, count=3 * wide.numel())
    tell(size, "GELU and rows of F", lambda: linear_gelu(lambda y: y, wide), MEMORY, count=3 * wide.numel())
    tell(size, "norm_modulate", lambda: FUSED_FP8.norm_modulate(x, shift, scale, spans, 1e-6), MEMORY, count=3 * count)
    tell(
        size,
        "norm_modulate with the sum that is left to it",
        lambda: FUSED_FP8.norm_modulate(FUSED_FP8.gated_add(x, update, gate, spans), shift, scale, spans, 1e-6),
        MEMORY,
        count=7 * count,
    )
    tell(
        size,
        "gated_add_norm",
        lambda: FUSED_FP8.gated_add_norm(x, update, gate, spans, weight, bias, 1e-6),
        MEMORY,
        count=7 * count,
    )
    q, k, v = (draw(1, tokens, heads, 128) for _ in range(3))
    tell(size, "q, k and v for 8-bit attention", lambda: round_attention(q, k, v), MEMORY, count=13 * count)
    tell(size, "the same with pooled blocks", lambda: round_and_pool(q, k, v), MEMORY, count=13 * count)
    for keys in (31, 67, 131):
        key, value = (draw(1, keys, heads, 128) for _ in range(2))
        found = (x, draw(dim), key, value, draw(1, 1, 1, keys), 1e-6)
        expected = plain(*(t.float() if isinstance(t, torch.Tensor) else t for t in found))
        for name, run in (
            ("plain", lambda: plain(*found)),
            ("by heads", lambda: norm_attend(*found)),
            ("plain, then rounded", lambda: quantize_rows(plain(*found))),
            ("by heads, rounded", lambda: norm_attend_round(*found)),
        ):
            made = run()
            back = made if isinstance(made, torch.Tensor) else made.values.float() * made.scale
            print(f"{size:11} norm and {keys} keys, {name}: error {far(back, expected)}", flush=True)
            tell(size, f"norm and {keys} keys, {name}", run, MEMORY, count=(3 if "rounded" in name else 4) * count)


def attention(size: str) -> None:
    from swiftwan.ops.attention_fp8_gluon import attend_rounded, attend_to_bytes
    from swiftwan.ops.round_attention import round_attention

    heads, _, _, tokens, _ = sizes(size)
    q, k, v = (draw(1, tokens, heads, 128) for _ in range(3))
    flop = 4 * heads * tokens**2 * 128
    for name in ("fp8", "flash4", "cudnn"):
        try:
            attend = kernel(name).load()
            for sharp in (1, 3):
                expected = sdpa((sharp * q[:, :64]).float(), k.float(), v.float())
                error = far(attend(sharp * q, k, v)[:, :64], expected)
                print(f"{size:11} attention {name}, scores times {sharp}: error {error}", flush=True)
            tell(size, f"attention {name}", lambda: attend(q, k, v), 871 if name == "fp8" else 708, flop)
        except Exception:
            traceback.print_exc()
    rounded = round_attention(q, k, v)
    tell(size, "attention fp8, rounded before", lambda: attend_rounded(rounded, q.dtype), 871, flop)
    tell(size, "the same, handed on as bytes", lambda: attend_to_bytes(rounded), 871, flop)


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
        tell(size, f"choose {keep}", lambda: select_blocks(q, k, keep), MEMORY, count=4 * q.numel())
        for name, run in (
            ("flash4", lambda: sparse_flash4(q, k, v, blocks, 128)),
            ("flex", lambda: flex(q, k, v, blocks, 128)),
            ("fp8, rounded before", lambda: attend_rounded(rounded, q.dtype, blocks)),
            ("fp8, all of it", lambda: attend_sparse(q, k, v, keep)),
        ):
            try:
                print(f"{size:11} keep {keep} {name}: error {far(run()[:, :, :1], expected)}", flush=True)
                tell(size, f"keep {keep} {name}", run, 871 if "fp8" in name else 708, flop)
            except Exception:
                traceback.print_exc()


def main() -> None:
    without_workspace()  # as an engine does
    torch.manual_seed(0)
    modes = {mode.__name__: mode for mode in (products, sums, pictures, rounding, attention, sparse)}
    wanted = [argument for argument in sys.argv[1:] if argument in modes] or list(modes)
    chosen = [argument for argument in sys.argv[1:] if argument in SIZES] or ["1.3b-480p"]
    with torch.no_grad():
        for size in chosen:
            for mode in wanted:
                try:
                    modes[mode](size)
                except Exception:  # the other parts are still worth their time
                    traceback.print_exc()


if __name__ == "__main__":
    main()
