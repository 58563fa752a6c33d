# mypy: disable-error-code="no-untyped-def"
"""The functions of :mod:`swiftwan.ops.block`, each in one pass over device memory, written in Triton.

In: bf16, fp16 or fp32; inside: float32; out: the input's dtype. What the plain functions round between two steps is
not rounded here, except the residual stream, which later layers read again.

A row is one token. Widths need not be powers of two: lanes beyond the width are masked, and move no bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from swiftwan.ops.block import BlockOps, refuse_gradient
from swiftwan.ops.modulate import GatedSum, Tokens
from swiftwan.ops.rope import Rope
from swiftwan.ops.text_attention import norm_attend


def _warps(block: int) -> int:
    """32 numbers a thread: at 1536 wide, 1 to 4 warps reach 3.4 to 3.8 TB/s on an H200 and 16 stay below 2.8."""
    return max(1, min(16, block // 1024))


# Residual add, layer norm and modulation


@triton.jit
def _add_norm_kernel(
    x, update, gate, scale, shift, summed, normed,
    length, boundary, gate_batch, gate_span, scale_batch, scale_span, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SPANS: tl.constexpr,
    ADD: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, MODULATED: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < WIDTH
    mask = inside & (token < length)
    place = (batch * length + token).to(tl.int64) * WIDTH + column
    span = column * 0
    if SPANS == 2:
        span = (token >= boundary).to(tl.int32)
    value = tl.load(x + place, mask, other=0.0).to(tl.float32)
    if ADD:
        more = tl.load(update + place, mask, other=0.0).to(tl.float32)
        if GATED:
            more *= tl.load(gate + batch * gate_batch + span * gate_span + column, inside, other=0.0)
        rounded = (value + more).to(summed.dtype.element_ty)
        tl.store(summed + place, rounded, mask)
        value = rounded.to(tl.float32)
    if NORM:
        mean = tl.sum(value, axis=1, keep_dims=True) / WIDTH
        centred = tl.where(inside, value - mean, 0.0)
        variance = tl.sum(centred * centred, axis=1, keep_dims=True) / WIDTH
        vector = batch * scale_batch + span * scale_span + column
        factor = tl.load(scale + vector, inside, other=0.0).to(tl.float32)
        if MODULATED:
            factor += 1.0
        offset = tl.load(shift + vector, inside, other=0.0).to(tl.float32)
        result = centred * tl.rsqrt(variance + eps) * factor + offset
        tl.store(normed + place, result.to(normed.dtype.element_ty), mask)


def add_norm(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    norm: tuple[Tensor, Tensor] | None,
    spans: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``norm`` is (scale, shift) as (B, K, D), or (weight, bias) as (D,). What is not asked for returns x."""
    refuse_gradient(x)
    x = (x if update is None else x.expand_as(update)).contiguous()
    batch, length, width = x.shape
    update = x if update is None else update.contiguous()
    summed = x if update is x else torch.empty_like(x)
    normed = x if norm is None else torch.empty_like(x)
    scale, shift = norm or (x, x)
    modulated = scale.ndim == 3
    if modulated:  # one vector for the whole batch has a stride of 0
        scale, shift = scale.expand(batch, -1, -1), shift.expand(batch, -1, -1)
    vectors = scale if gate is None else gate.expand(batch, -1, -1)
    block = triton.next_power_of_2(width)
    rows = max(1, 1024 // block)
    _add_norm_kernel[(triton.cdiv(length, rows), batch)](
        x, update, vectors, scale, shift, summed, normed,
        length, spans[0],
        vectors.stride(0), vectors.stride(1),
        scale.stride(0) if modulated else 0, scale.stride(1) if modulated else 0, eps,
        WIDTH=width, BLOCK=block, ROWS=rows, SPANS=len(spans),
        ADD=summed is not x, GATED=gate is not None, NORM=norm is not None, MODULATED=modulated,
        num_warps=_warps(block),
    )  # fmt: skip
    return summed, normed


def norm_modulate(x: Tokens, shift: Tensor, scale: Tensor, spans: Sequence[int], eps: float) -> tuple[Tensor, Tensor]:
    return add_norm(*sum_of(x), (scale, shift), spans, eps)


def sum_of(x: Tokens) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Tokens, what is still to be added to them, and by which gate."""
    return x.take() if isinstance(x, GatedSum) else (x, None, None)


def gated_add(x: Tensor, update: Tensor, gate: Tensor, spans: Sequence[int]) -> GatedSum:
    """Left to the next norm: both in one pass move 7 bytes a number in 8 bits, one by one 9."""
    refuse_gradient(x)
    return GatedSum(x, update, gate, spans, _gated_add)


def _gated_add(x: Tensor, update: Tensor, gate: Tensor, spans: Sequence[int]) -> Tensor:
    return add_norm(x, update, gate, None, spans, 0.0)[0]


def gated_add_norm(
    x: Tensor, update: Tensor, gate: Tensor, spans: Sequence[int], weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return add_norm(x, update, gate, (weight, bias), spans, eps)


def add_norm_modulate(
    x: Tensor, update: Tensor, shift: Tensor, scale: Tensor, spans: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    return add_norm(x, update, None, (scale, shift), spans, eps)


# RMS norm and rotary position embedding of q and k


@triton.jit
def _norm_turn(
    source, weight, out, start, place, column, inside, cosine, sine, eps,
    DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    value = tl.load(source + start + column, inside, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(value * value, axis=1), axis=0) / DIM
    value *= tl.rsqrt(mean + eps) * tl.load(weight + column, inside, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(value, [BLOCK_H, BLOCK_E // 2, 2]))
    turned = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
    tl.store(out + place + column, tl.reshape(turned, [BLOCK_H, BLOCK_E]).to(out.dtype.element_ty), inside)


@triton.jit
def _norm_rope_kernel(
    q, k, q_weight, k_weight, cos, sin, q_out, k_out, length, row, eps,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    line = (tl.program_id(1) * length + token).to(tl.int64)
    head = tl.arange(0, BLOCK_H)[:, None]
    channel = tl.arange(0, BLOCK_E)[None, :]
    inside = (head < HEADS) & (channel < WIDTH)
    column = head * WIDTH + channel
    pair = tl.arange(0, BLOCK_E // 2)[None, :]
    angle = token * (WIDTH // 2) + pair
    cosine = tl.load(cos + angle, pair < WIDTH // 2, other=0.0)
    sine = tl.load(sin + angle, pair < WIDTH // 2, other=0.0)
    dim: tl.constexpr = HEADS * WIDTH
    _norm_turn(q, q_weight, q_out, line * row, line * dim, column, inside, cosine, sine, eps, dim, BLOCK_H, BLOCK_E)
    _norm_turn(k, k_weight, k_out, line * row, line * dim, column, inside, cosine, sine, eps, dim, BLOCK_H, BLOCK_E)


def norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Rope, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    refuse_gradient(q)
    batch, length, dim = q.shape
    assert q.stride() == k.stride() == (length * q.stride(1), q.stride(1), 1), "rows must follow each other evenly"
    width = dim // heads
    q_out, k_out = (q.new_empty(batch, length, heads, width) for _ in range(2))
    block_h, block_e = triton.next_power_of_2(heads), triton.next_power_of_2(width)
    _norm_rope_kernel[(length, batch)](
        q, k, q_weight, k_weight, rope[0], rope[1], q_out, k_out, length, q.stride(1), eps,
        HEADS=heads, WIDTH=width, BLOCK_H=block_h, BLOCK_E=block_e,
        num_warps=_warps(block_h * block_e),
    )  # fmt: skip
    return q_out, k_out


FUSED = BlockOps(
    norm_modulate=norm_modulate,
    gated_add=gated_add,
    gated_add_norm=gated_add_norm,
    add_norm_modulate=add_norm_modulate,
    norm_rope=norm_rope,
    norm_attend=norm_attend,
)


# The feed-forward's first product


def linear_gelu(linear: nn.Linear, x: Tensor) -> Tensor:
    """``gelu(linear(x))``, tanh form, in the epilogue of cuBLASLt's product: (L, ffn_dim) is written once."""
    out: Tensor = torch._addmm_activation(linear.bias, x.flatten(0, -2), linear.weight.t(), use_gelu=True)
    return out.unflatten(0, x.shape[:-1])
