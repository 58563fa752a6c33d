# mypy: disable-error-code="no-untyped-def"
"""Attention to at most 128 keys, forward and backward, as two Triton kernels: :mod:`swiftwan.ops.few_keys_training`
is their plain form. A program holds all keys of a head, so a row's softmax is whole at once and the backward pass
makes it again from q and k alone; queries are shared out, and the gradients of keys and values are summed over shares.
Kind: exact.

Shapes: B batch, H heads, L queries, S keys, E width of a head, a power of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

QUERIES = 64
"""Of a tile."""

SHARES = 44
"""Of the queries of a head, in the backward pass: with 12 heads four programs for each of an H200's 132 processors."""


@triton.jit
def _weights(q, k, bias, keys, scale, KEYS: tl.constexpr):
    column = tl.arange(0, KEYS)
    scores = tl.dot(q, tl.trans(k)) * scale + tl.load(bias + column, column < keys, other=-float("inf")).to(tl.float32)
    scores = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    return scores / tl.sum(scores, axis=1)[:, None]


@triton.jit
def _head(x, length, heads, rows, WIDTH: tl.constexpr):
    """Addresses of rows (B, L, H, E) of this program's batch and head, and which exist."""
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    start = (batch.to(tl.int64) * length * heads + head) * WIDTH
    at = x + start + rows[:, None].to(tl.int64) * heads * WIDTH + tl.arange(0, WIDTH)[None, :]
    return at, rows[:, None] < length


@triton.jit
def _forward_kernel(
    q, k, v, bias, out, queries, keys, heads, scale, TILE: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr
):
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    q_at, inside = _head(q, queries, heads, rows, WIDTH)
    k_at, some = _head(k, keys, heads, tl.arange(0, KEYS), WIDTH)
    v_at, _ = _head(v, keys, heads, tl.arange(0, KEYS), WIDTH)
    weights = _weights(tl.load(q_at, inside, other=0.0), tl.load(k_at, some, other=0.0), bias, keys, scale, KEYS)
    values = tl.load(v_at, some, other=0.0)
    out_at, _ = _head(out, queries, heads, rows, WIDTH)
    tl.store(out_at, tl.dot(weights.to(values.dtype), values).to(values.dtype), inside)


@triton.jit
def _backward_kernel(
    q, k, v, bias, grad, dq, dk, dv, queries, keys, heads, scale,
    SHARE: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, KEYS)
    k_at, some = _head(k, keys, heads, column, WIDTH)
    v_at, _ = _head(v, keys, heads, column, WIDTH)
    key, value = tl.load(k_at, some, other=0.0), tl.load(v_at, some, other=0.0)
    d_key, d_value = tl.zeros((KEYS, WIDTH), tl.float32), tl.zeros((KEYS, WIDTH), tl.float32)
    for start in range(0, SHARE, TILE):
        rows = tl.program_id(0) * SHARE + start + tl.arange(0, TILE)
        q_at, inside = _head(q, queries, heads, rows, WIDTH)
        grad_at, _ = _head(grad, queries, heads, rows, WIDTH)
        query, given = tl.load(q_at, inside, other=0.0), tl.load(grad_at, inside, other=0.0)
        weights = _weights(query, key, bias, keys, scale, KEYS)
        d_weights = tl.dot(given, tl.trans(value))
        d_scores = weights * (d_weights - tl.sum(weights * d_weights, axis=1)[:, None]) * scale
        d_scores = d_scores.to(query.dtype)
        dq_at, _ = _head(dq, queries, heads, rows, WIDTH)
        tl.store(dq_at, tl.dot(d_scores, key).to(query.dtype), inside)
        d_key += tl.dot(tl.trans(d_scores), query)
        d_value += tl.dot(tl.trans(weights.to(given.dtype)), given)
    # (SHARES, B, S, H, E): of this share alone.
    part = tl.program_id(0).to(tl.int64) * (tl.num_programs(1) // heads) * keys * heads * WIDTH
    dk_at, _ = _head(dk + part, keys, heads, column, WIDTH)
    dv_at, _ = _head(dv + part, keys, heads, column, WIDTH)
    tl.store(dk_at, d_key, some)
    tl.store(dv_at, d_value, some)


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
    share = triton.cdiv(triton.cdiv(queries, SHARES), QUERIES) * QUERIES
    _backward_kernel[SHARES, batch * heads](
        q, k, v, bias, grad, dq, *parts, queries, k.shape[1], heads, width**-0.5, share,
        QUERIES, _tile(k.shape[1]), width, num_warps=8,
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
    """As :func:`swiftwan.ops.few_keys_training.few_keys`, for 16-bit floats on a GPU."""
    bias = k.new_zeros(k.shape[1]) if bias is None else bias.flatten()
    out: Tensor = few_keys_forward(q, k, v, bias)
    return out
