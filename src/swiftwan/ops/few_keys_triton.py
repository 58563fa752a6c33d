# mypy: disable-error-code="no-untyped-def"
"""Attention of many queries to few keys with a backward pass, in Triton: cross-attention while it trains. Kind: exact.

The gradients of keys and values are sums over all queries. A flash kernel gives each tile of keys one block of
threads, which walks all queries: 66 keys of 12 heads occupy 24 of an H200's 132 processors, and cuDNN takes 2.6 ms for
what is 40 GFLOP (benchmarks/h200_train_profile.txt). Here a program holds all keys of a head, so a row's softmax
is whole at once and the backward pass makes it again from q and k alone; the queries are shared out, and the shares'
gradients of keys and values summed in the end, in one order, so the same numbers come out each time.

Shapes: B batch, H heads, L queries, S keys, E width of a head, a power of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from swiftwan.ops.attention import sdpa

MOST_KEYS = 128
"""That a program holds."""

QUERIES = 64
"""Of a tile."""

QUERIES_BACK = 32
"""Of a tile in the backward pass: with 64 the gradients of 128 keys no longer fit in registers."""

SHARES = 33
"""Of the queries of a head in the backward pass, where a program has a processor to itself: 12 heads give each of an
H200's 132 three, 40 heads ten."""


@triton.jit
def _weights(q, k, bias, keys, scale, KEYS: tl.constexpr):
    column = tl.arange(0, KEYS)
    scores = tl.dot(q, tl.trans(k)) * scale + tl.load(bias + column, column < keys, other=-float("inf")).to(tl.float32)
    scores = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    return scores / tl.sum(scores, axis=1)[:, None]


@triton.jit
def _head(length, heads, rows, WIDTH: tl.constexpr):
    """Where rows of (B, L, H, E) lie, of this program's batch and head."""
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    start = (batch.to(tl.int64) * length * heads + head) * WIDTH
    return start + rows[:, None].to(tl.int64) * heads * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _forward_kernel(
    q, k, v, bias, out, queries, keys, heads, scale, TILE: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr
):
    rows, column = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, KEYS)
    at, inside = _head(queries, heads, rows, WIDTH), rows[:, None] < queries
    key_at, some = _head(keys, heads, column, WIDTH), column[:, None] < keys
    query, key = tl.load(q + at, inside, other=0.0), tl.load(k + key_at, some, other=0.0)
    value = tl.load(v + key_at, some, other=0.0)
    weights = _weights(query, key, bias, keys, scale, KEYS)
    tl.store(out + at, tl.dot(weights.to(value.dtype), value).to(value.dtype), inside)


@triton.jit
def _backward_kernel(
    q, k, v, bias, grad, dq, dk, dv, queries, keys, heads, scale,
    SHARE: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, KEYS)
    key_at, some = _head(keys, heads, column, WIDTH), column[:, None] < keys
    key, value = tl.load(k + key_at, some, other=0.0), tl.load(v + key_at, some, other=0.0)
    d_key, d_value = tl.zeros((KEYS, WIDTH), tl.float32), tl.zeros((KEYS, WIDTH), tl.float32)
    for start in range(0, SHARE, TILE):
        rows = tl.program_id(0) * SHARE + start + tl.arange(0, TILE)
        at, inside = _head(queries, heads, rows, WIDTH), rows[:, None] < queries
        query, given = tl.load(q + at, inside, other=0.0), tl.load(grad + at, inside, other=0.0)
        weights = _weights(query, key, bias, keys, scale, KEYS)
        d_weights = tl.dot(given, tl.trans(value))
        unscaled = weights * (d_weights - tl.sum(weights * d_weights, axis=1)[:, None])
        d_scores = (unscaled * scale).to(query.dtype)
        tl.store(dq + at, tl.dot(d_scores, key).to(query.dtype), inside)
        d_key += tl.dot(tl.trans(d_scores), query)
        d_value += tl.dot(tl.trans(weights.to(given.dtype)), given)
    # (SHARES, B, S, H, E): of this share alone.
    part = tl.program_id(0).to(tl.int64) * (tl.num_programs(1) // heads) * keys * heads * WIDTH
    tl.store(dk + part + key_at, d_key, some)
    tl.store(dv + part + key_at, d_value, some)


@torch.library.custom_op("swiftwan::few_keys_forward", mutates_args=())
def few_keys_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    batch, queries, heads, width = q.shape
    q, k, v, out = (
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        torch.empty_like(q, memory_format=torch.contiguous_format),
    )
    keys = k.shape[1]
    grid = triton.cdiv(queries, QUERIES), batch * heads
    _forward_kernel[grid](
        q, k, v, bias, out, queries, keys, heads, width**-0.5, QUERIES, _tile(keys), width, num_warps=4
    )  # fmt: skip
    return out


@few_keys_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("swiftwan::few_keys_backward", mutates_args=())
def few_keys_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, heads, width = q.shape
    q, k, v, grad = q.contiguous(), k.contiguous(), v.contiguous(), grad.contiguous()
    dq, parts = torch.empty_like(q), q.new_empty(2, SHARES, *k.shape, dtype=torch.float32)
    share = triton.cdiv(triton.cdiv(queries, SHARES), QUERIES_BACK) * QUERIES_BACK
    _backward_kernel[SHARES, batch * heads](
        q, k, v, bias, grad, dq, *parts, queries, k.shape[1], heads, width**-0.5, share,
        QUERIES_BACK, _tile(k.shape[1]), width, num_warps=8, num_stages=2,
    )  # fmt: skip
    dk, dv = parts.sum(1).to(k.dtype)
    return dq, dk.clone(), dv.clone()


@few_keys_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _tile(keys: int) -> int:
    return max(16, triton.next_power_of_2(keys))


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(context: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *few_keys_backward(grad, *context.saved_tensors), None


few_keys_forward.register_autograd(_backward, setup_context=_keep)


def few_keys(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`swiftwan.ops.attention.sdpa` with the same arguments, 16-bit floats on a GPU and at most 128 keys; no
    gradient of the bias."""
    bias = k.new_zeros(k.shape[1]) if bias is None else bias.flatten()
    out: Tensor = few_keys_forward(q, k, v, bias)
    return out


def to_prompt(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention to a prompt's keys, of which there are few, or to an image's 257."""
    return few_keys(q, k, v, bias) if k.shape[1] <= MOST_KEYS else sdpa(q, k, v, bias)
