"""Attention over (B, L, H, E): batch, tokens, heads, head width. Every kernel has this one signature."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q, k, v), each (B, L, H, E), to (B, L, H, E)."""


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch's scaled_dot_product_attention: the reference, and the kernel that runs everywhere.

    Args:
        q: (B, L, H, E).
        k, v: (B, S, H, E).
        bias: added to the scores, broadcastable to (B, H, L, S).
    """
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias)
    return out.transpose(1, 2)
