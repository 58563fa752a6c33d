# mypy: disable-error-code="no-untyped-def"
"""RMS norm of queries, attention to a few keys, and rounding, in one Triton kernel: what cross-attention does between
its two linear layers.

A prompt has a few dozen tokens, so the work is to move queries: (B, L, D) is read here, a second time from the cache,
and a byte a number leaves, where norm, attention and rounding each on its own read and write all of it.

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
from swiftwan.ops.fp8 import Rounded
from swiftwan.ops.fused import refuse_gradient

MOST_KEYS = 128
"""Above these scores would not fit into registers, and the plain way runs."""

TOKENS = 64
"""Of one program. 0.12 ms for 32,760 tokens of 12 heads and 29 keys on an H200, 0.18 for 70; cuDNN, the norm and the
rounding before and behind it 0.21. Loads ahead of their use (Triton's stages) made it slower."""


@triton.jit
def _norm_attend_kernel(
    q, weight, key, value, bias, largest, out, scale, length, count, q_batch, text_batch, eps, softmax_scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, KEYS: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = (token < length)[:, None]
    channel, text = tl.arange(0, WIDTH), tl.arange(0, KEYS)
    seen = text < count
    place = token.to(tl.int64)[:, None] * (HEADS * WIDTH) + channel[None, :]
    q += batch.to(tl.int64) * q_batch
    out += batch.to(tl.int64) * length * (HEADS * WIDTH)
    key += batch * text_batch
    value += batch * text_batch

    squares = tl.zeros([TOKENS], tl.float32)
    for head in tl.range(HEADS, num_stages=1):
        query = tl.load(q + place + head * WIDTH, inside, other=0.0).to(tl.float32)
        squares += tl.sum(query * query, 1)
    inverse = tl.rsqrt(squares / (HEADS * WIDTH) + eps)

    shift = tl.where(seen, 0.0, float("-inf"))
    if BIASED:
        shift += 1.4426950408889634 * tl.load(bias + text, seen, other=0.0).to(tl.float32)
    step = tl.maximum(tl.load(largest).to(tl.float32), 1e-12) / 448.0
    tl.store(scale + batch * length + token, tl.zeros([TOKENS], tl.float32) + step, token < length)
    text_place = text[:, None] * (HEADS * WIDTH) + channel[None, :]
    for head in tl.range(HEADS, num_stages=1):
        query = tl.load(q + place + head * WIDTH, inside, other=0.0).to(tl.float32)
        query *= inverse[:, None] * tl.load(weight + head * WIDTH + channel)[None, :].to(tl.float32)
        keys = tl.load(key + text_place + head * WIDTH, seen[:, None], other=0.0)
        values = tl.load(value + text_place + head * WIDTH, seen[:, None], other=0.0)
        scores = tl.dot(query.to(keys.dtype), tl.trans(keys), input_precision="ieee") * softmax_scale + shift[None, :]
        weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
        result = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        result *= (1.0 / (tl.sum(weights, 1) * step))[:, None]
        tl.store(out + place + head * WIDTH, result.to(tl.float8e4nv), inside)


def norm_attend(
    q: Tensor,
    weight: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    eps: float,
    attend: Callable[..., Tensor] = sdpa,
) -> Tensor | Rounded:
    """:func:`swiftwan.ops.attention.norm_attend`, rounded.

    Of more than 128 keys, a bias that is not the same for all queries, or heads whose width is no power of two: the
    plain function's result.
    """
    batch, count, heads, width = key.shape
    alike = bias is None or bias.numel() == count
    if count > MOST_KEYS or not alike or width != triton.next_power_of_2(width):
        return plain(q, weight, key, value, bias, eps, attend)
    refuse_gradient(q)
    q, key, value = q.contiguous(), key.contiguous(), value.contiguous()
    length = q.shape[1]
    out = torch.empty(batch, length, heads * width, dtype=torch.float8_e4m3fn, device=q.device)
    scale = torch.empty(batch, length, 1, dtype=torch.float32, device=q.device)
    # In two steps: torch would take all of it with one processor.
    largest = torch.linalg.vector_norm(torch.linalg.vector_norm(value, math.inf, dim=-1), math.inf)
    _norm_attend_kernel[(triton.cdiv(length, TOKENS), batch)](
        q, weight, key, value, largest if bias is None else bias.flatten(), largest, out, scale, length, count,
        q.stride(0) if len(q) == batch else 0, count * heads * width, eps, width**-0.5 * math.log2(math.e),
        HEADS=heads, WIDTH=width, TOKENS=TOKENS, KEYS=max(16, triton.next_power_of_2(count)), BIASED=bias is not None,
        num_warps=4,
    )  # fmt: skip
    return Rounded(out, scale)
