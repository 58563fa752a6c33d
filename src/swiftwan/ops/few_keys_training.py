"""Attention of many queries to few keys, with a backward pass of plain products: cross-attention while it trains.

The gradients of keys and values are sums over all queries. A flash kernel gives each tile of keys one block of
threads, which walks all queries: 66 keys of 12 heads occupy 24 of an H200's 132 processors, and cuDNN takes 2.6 ms
for what is 40 GFLOP (benchmarks/h200_train_profile.txt). Here the scores are few enough to be written down, and the
sum over queries is split.
Kind: exact; scores, softmax and sums are float32, the weights are rounded to the values' dtype as flash kernels do.

Shapes: B batch, H heads, L queries, S keys, E width of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftwan.ops.attention import sdpa

PARTS = 16
"""At most so many pieces of the queries are summed side by side."""

FEW = 128
"""Keys from which on the scores are too many to write down: 257 of 40 heads took longer than cuDNN."""


def to_prompt(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`few_keys` where they are few, else :func:`swiftwan.ops.attention.sdpa`."""
    return few_keys(q, k, v, bias) if k.shape[1] <= FEW else sdpa(q, k, v, bias)


def few_keys(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`swiftwan.ops.attention.sdpa` with the same arguments; no gradient of the bias."""
    missing = -k.shape[1] % 8  # tensor cores read rows of scores that begin at 16 bytes
    if missing:
        bias = k.new_zeros(1, 1, 1, k.shape[1]) if bias is None else bias
        bias = F.pad(bias, (0, missing), value=-math.inf)
        k, v = F.pad(k, (0, 0, 0, 0, 0, missing)), F.pad(v, (0, 0, 0, 0, 0, missing))
    out: Tensor = _FewKeys.apply(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias)
    return out.transpose(1, 2)


class _FewKeys(torch.autograd.Function):
    """Of (B, H, L or S, E)."""

    @staticmethod
    def forward(context: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(q, k, v, bias)
        return _weights(q, k, bias).to(v.dtype) @ v

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias = context.saved_tensors
        weights = _weights(q, k, bias)
        d_weights = _product(grad, v.transpose(-1, -2))
        d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        d_scores = d_scores.to(q.dtype)
        return d_scores @ k, _over_queries(d_scores, q), _over_queries(weights.to(grad.dtype), grad), None


def _weights(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax of the scores, float32 (B, H, L, S)."""
    scores = _product(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return (scores if bias is None else scores + bias).softmax(-1)


def _over_queries(rows: Tensor, values: Tensor) -> Tensor:
    """The sum over queries of (B, H, L, S) times (B, H, L, E): (B, H, S, E), in as many parts as divide them."""
    parts = math.gcd(rows.shape[2], PARTS)
    rows, values = (x.unflatten(2, (parts, -1)) for x in (rows, values))
    return _product(rows.transpose(-1, -2), values).sum(2).to(values.dtype)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """A batched matrix product that is not rounded: float32."""
    if left.device.type != "cuda" or left.dtype == torch.float32:
        return left.float() @ right.float()
    batch = left.shape[:-2]
    out = torch.bmm(left.flatten(0, -3), right.flatten(0, -3), out_dtype=torch.float32)
    return out.unflatten(0, batch)
