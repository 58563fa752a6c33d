# mypy: disable-error-code="no-untyped-def"
"""RMS norm of queries, attention to a few keys and, for an 8-bit layer behind it, rounding, in two Triton kernels: what
cross-attention does between its two linear layers.

A prompt has a few dozen tokens, so the work is to move queries. The first kernel reads them for the norm, which is of a
token's whole width; the second one is of one head, whose keys and values it holds, and goes through tokens.

A result is a mean of values, so no number exceeds the largest value: that is what all rows are scaled by, as in
:mod:`swiftwan.ops.gelu_fp8`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from swiftwan.ops.attention import norm_attend as plain
from swiftwan.ops.attention import sdpa
from swiftwan.ops.block import refuse_gradient
from swiftwan.ops.fp8 import Rounded

MOST_KEYS = 144
"""Above these scores would not fit into registers, and the plain way runs. Wan's negative prompt has about 130."""

TOKENS = 64
"""That a program of the second kernel takes at once, eight times in a long video, the next ones on their way into
registers: 32,760 tokens of 12 heads to 67 keys take 0.104 ms on an H200, rounded 0.100, without loads ahead 0.115; with
three stages in shared memory, which 131 keys leave no room for, 0.107 and 0.097. 32 tokens at once take 0.162, 128
0.118 to 0.171. One kernel for all heads of 64 tokens took 0.153; the norm, cuDNN and rounding one by one take 0.205."""

AT_ONCE = 264
"""Programs that an H200 runs at a time where keys and values of 131 tokens fill half of a processor's shared memory.
One that goes through several times 64 tokens reads them once: as often, at most eight times, as leaves no second
round. A picture's 2 x 1560 tokens take 20 us in three turns, 25 in two; without loads ahead 22."""

PARTS = 128
"""Programs that look for the largest value."""


@triton.jit
def _prepare_kernel(
    q, inverse, value, largest, rows, row_programs, numbers, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    PARTS: tl.constexpr, SPAN: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """What each row's norm multiplies by and, by the programs behind those, the largest values."""
    program = tl.program_id(0)
    if program < row_programs:
        row = program * ROWS + tl.arange(0, ROWS)
        there = (row < rows)[:, None]
        start = row.to(tl.int64)[:, None] * WIDTH
        column, other_column = tl.arange(0, FIRST)[None, :], FIRST + tl.arange(0, REST)[None, :]
        one = tl.load(q + start + column, there & (column < WIDTH), other=0.0).to(tl.float32)
        other = tl.load(q + start + other_column, there & (other_column < WIDTH), other=0.0).to(tl.float32)
        squares = tl.sum(one * one, 1) + tl.sum(other * other, 1)
        tl.store(inverse + row, tl.rsqrt(squares / WIDTH + eps), row < rows)
    else:
        part = program - row_programs
        most = tl.zeros([SPAN], tl.float32)
        for turn in range(TURNS):
            place = (turn * PARTS + part) * SPAN + tl.arange(0, SPAN)
            most = tl.maximum(most, tl.abs(tl.load(value + place, place < numbers, other=0.0).to(tl.float32)))
        tl.store(largest + part, tl.max(most, 0))


@triton.jit
def _keys(key, value, bias, start, count, row, BIASED: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr):
    """Some of a head's keys and values, and what is added to their scores."""
    text = start + tl.arange(0, KEYS)
    place = text[:, None] * row + tl.arange(0, WIDTH)[None, :]
    seen = text < count
    shift = tl.where(seen, 0.0, float("-inf"))
    if BIASED:
        shift += 1.4426950408889634 * tl.load(bias + text, seen, other=0.0).to(tl.float32)
    keys = tl.load(key + place, seen[:, None], other=0.0)
    return keys, tl.load(value + place, seen[:, None], other=0.0), shift


@triton.jit
def _text_attend_kernel(
    q, inverse, weight, key, value, bias, largest, out, scale, length, count, q_rows, softmax_scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, TURNS: tl.constexpr, PARTS: tl.constexpr,
    KEYS: tl.constexpr, MORE: tl.constexpr, BIASED: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """One head. Its keys come as two powers of two: 67 as 64 and 16, not as 128."""
    head, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row: tl.constexpr = HEADS * WIDTH
    channel = tl.arange(0, WIDTH)
    q += batch.to(tl.int64) * q_rows * row + head * WIDTH
    inverse += batch * q_rows
    out += batch.to(tl.int64) * length * row + head * WIDTH
    key += batch * count * row + head * WIDTH
    value += batch * count * row + head * WIDTH
    token = group * TURNS * TOKENS + tl.arange(0, TOKENS)
    fetched = tl.load(q + token.to(tl.int64)[:, None] * row + channel[None, :], (token < length)[:, None], other=0.0)
    factor = tl.load(inverse + token, token < length, other=0.0)
    norm = tl.load(weight + head * WIDTH + channel)[None, :].to(tl.float32)
    keys, values, shift = _keys(key, value, bias, 0, count, row, BIASED, KEYS, WIDTH)
    if MORE:
        more_keys, more_values, more_shift = _keys(key, value, bias, KEYS, count, row, BIASED, MORE, WIDTH)
    step = 1.0
    if ROUNDED:
        step = tl.maximum(tl.max(tl.load(largest + tl.arange(0, PARTS)), 0), 1e-12) / 448.0
    for turn in range(TURNS):
        inside = (token < length)[:, None]
        place = token.to(tl.int64)[:, None] * row + channel[None, :]
        query = (fetched.to(tl.float32) * factor[:, None] * norm).to(keys.dtype)
        follows = (token + TOKENS < length) & (turn + 1 < TURNS)
        fetched = tl.load(q + TOKENS * row + place, follows[:, None], other=0.0)
        factor = tl.load(inverse + TOKENS + token, follows, other=0.0)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * softmax_scale + shift[None, :]
        most = tl.max(scores, 1)
        if MORE:
            others = tl.dot(query, tl.trans(more_keys), input_precision="ieee") * softmax_scale + more_shift[None, :]
            most = tl.maximum(most, tl.max(others, 1))
        weights = tl.exp2(scores - most[:, None])
        total = tl.sum(weights, 1)
        result = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        if MORE:
            other_weights = tl.exp2(others - most[:, None])
            total += tl.sum(other_weights, 1)
            result = tl.dot(other_weights.to(values.dtype), more_values, result, input_precision="ieee")
        result *= (1.0 / (total * step))[:, None]
        tl.store(out + place, result.to(out.dtype.element_ty), inside)
        if ROUNDED and head == 0:
            tl.store(scale + batch * length + token, tl.zeros([TOKENS], tl.float32) + step, token < length)
        token += TOKENS


Heads = Callable[..., None]
"""(out, scale, q, inverse, weight, key, value, bias, largest): the second kernel, heads' attention into ``out``.

Queries are normed by ``inverse``, float32 (rows of q), and ``weight``; ``scale`` of the rows of an ``out`` of 8 bits
comes from the :data:`PARTS` of ``largest``.
"""


def norm_attend(
    q: Tensor,
    weight: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    eps: float,
    attend: Callable[..., Tensor] = sdpa,
    *,
    heads: Heads | None = None,
) -> Tensor:
    """:func:`swiftwan.ops.attention.norm_attend`; that function's where :func:`fits` says no.

    Args:
        heads: another second kernel than :func:`attend_heads`.
    """
    if not fits(key, bias):
        return plain(q, weight, key, value, bias, eps, attend)
    out = torch.empty(len(key), q.shape[1], q.shape[2], dtype=q.dtype, device=q.device)
    _attend_into(out, None, q, weight, key, value, bias, eps, heads or attend_heads)
    return out


def norm_attend_round(
    q: Tensor,
    weight: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    eps: float,
    attend: Callable[..., Tensor] = sdpa,
    *,
    heads: Heads | None = None,
) -> Tensor | Rounded:
    """:func:`norm_attend`, rounded; not rounded where :func:`fits` says no."""
    if not fits(key, bias):
        return plain(q, weight, key, value, bias, eps, attend)
    shape = (len(key), q.shape[1], q.shape[2])
    values = torch.empty(shape, dtype=torch.float8_e4m3fn, device=q.device)
    scale = torch.empty(*shape[:2], 1, dtype=torch.float32, device=q.device)
    _attend_into(values, scale, q, weight, key, value, bias, eps, heads or attend_heads)
    return Rounded(values, scale)


def fits(key: Tensor, bias: Tensor | None) -> bool:
    """Whether there are at most 144 keys of 16 bits, all queries have one bias, and a head's width is a power of two
    from 16, the least that a tensor core multiplies, to 128."""
    _, count, _, width = key.shape
    alike = bias is None or bias.numel() == count
    # In 32 bits keys and values would take up to 192 KB of shared memory; in 16 they take 88, and every GPU has 99.
    small = count <= MOST_KEYS and key.element_size() == 2 and 16 <= width <= 128
    return small and alike and width == triton.next_power_of_2(width)


def key_parts(count: int) -> tuple[int, int]:
    """Two powers of two that hold so many, of at least 16 each, the second one 0 where it is not needed."""
    first = max(16, 1 << count.bit_length() - 1)
    return first, max(16, triton.next_power_of_2(count - first)) if count > first else 0


def _attend_into(
    out: Tensor,
    scale: Tensor | None,
    q: Tensor,
    weight: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    eps: float,
    heads: Heads,
) -> None:
    """``scale`` is of the rows of an ``out`` of 8 bits."""
    refuse_gradient(q)
    q, key, value = q.contiguous(), key.contiguous(), value.contiguous()
    dim = q.shape[2]
    rows = q.numel() // dim
    row_programs = triton.cdiv(rows, 4)
    inverse = torch.empty(rows, dtype=torch.float32, device=q.device)
    largest = torch.empty(PARTS, dtype=torch.float32, device=q.device)
    first = 1 << (dim - 1).bit_length() - 1
    _prepare_kernel[(row_programs + (0 if scale is None else PARTS),)](
        q, inverse, value, largest, rows, row_programs, value.numel(), eps,
        WIDTH=dim, ROWS=4, FIRST=first, REST=triton.next_power_of_2(dim - first),
        PARTS=PARTS, SPAN=1024, TURNS=triton.next_power_of_2(triton.cdiv(value.numel(), PARTS * 1024)), num_warps=4,
    )  # fmt: skip
    bias = None if bias is None else bias.flatten()
    heads(out, scale, q, inverse, weight, key, value, bias, largest)


def attend_heads(
    out: Tensor,
    scale: Tensor | None,
    q: Tensor,
    inverse: Tensor,
    weight: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    largest: Tensor,
) -> None:
    """:data:`Heads` in Triton."""
    batch, count, heads, width = key.shape
    length = q.shape[1]
    keys, more = key_parts(count)
    turns = min(8, triton.cdiv(heads * triton.cdiv(length, TOKENS) * batch, AT_ONCE))
    _text_attend_kernel[(heads, triton.cdiv(length, TOKENS * turns), batch)](
        q, inverse, weight, key, value, largest if bias is None else bias, largest, out,
        largest if scale is None else scale, length, count, length if len(q) == batch else 0,
        width**-0.5 * math.log2(math.e),
        HEADS=heads, WIDTH=width, TOKENS=TOKENS, TURNS=turns, PARTS=PARTS, KEYS=keys, MORE=more,
        BIASED=bias is not None, ROUNDED=scale is not None, num_warps=4,
    )  # fmt: skip
