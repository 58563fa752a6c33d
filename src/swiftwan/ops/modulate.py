"""Adaptive layer norm of diffusion transformers (DiT, arXiv 2212.09748): shift, scale and gate by timestep.

A clip has one timestep, or two (an image-to-video TI2V-5B run holds its first latent frame at 0). So the
vectors are (B, K, D) for K spans of tokens, not one a token: at 1280x704x121 that is 36 KB instead of the
2.0 GB that a per-token tensor takes.

Throughout: x and update (B, L, D); shift, scale, gate (B, K, D) in float32; ``spans`` says how many tokens each of
the K vectors serves, and sums to L; weight and bias (D,). All compute in float32 and return x's dtype. The vectors
may come with a batch of 1, and in :func:`add_norm_modulate` x too, for the whole batch of the update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Unsummed = tuple[Tensor, Any, Tensor | None]
"""Tokens, what is still to be added to them, if anything is, and by which gate, if by one."""


class GatedSum:
    """What :func:`gated_add` is to compute, before it is: the norm that reads it next adds in its own pass.

    It can be taken once, and holds nothing from then on: a caller that still has it keeps no tokens alive.
    """

    def __init__(
        self,
        x: Tensor,
        update: Any,
        gate: Tensor,
        spans: Sequence[int],
        add: Callable[..., Tensor],
    ) -> None:
        self._terms: list[Unsummed] = [(x, update, gate)]
        self._add = add
        self.spans = spans

    def take(self) -> Unsummed:
        return self._terms.pop()

    def whole(self) -> Tensor:
        x, update, gate = self.take()
        return x if update is None else self._add(x, update, gate, self.spans)


Tokens = Tensor | GatedSum
"""Between two blocks."""


def whole(x: Tokens) -> Tensor:
    """For whoever reads tokens and is not a norm."""
    return x.whole() if isinstance(x, GatedSum) else x


def norm_modulate(x: Tokens, shift: Tensor, scale: Tensor, spans: Sequence[int], eps: float) -> tuple[Tensor, Tensor]:
    """x, whole, and ``layer_norm(x) * (1 + scale) + shift``."""
    x = whole(x)
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    parts = [part * (1 + scale[:, k, None]) + shift[:, k, None] for k, part in enumerate(normed.split(spans, dim=1))]
    return x, _join(parts).type_as(x)


def gated_add(x: Tensor, update: Tensor, gate: Tensor, spans: Sequence[int]) -> Tensor:
    """``x + update * gate``."""
    pairs = zip(x.float().split(spans, dim=1), update.split(spans, dim=1), strict=True)
    return _join([a + b * gate[:, k, None] for k, (a, b) in enumerate(pairs)]).type_as(x)


def gated_add_norm(
    x: Tensor, update: Tensor, gate: Tensor, spans: Sequence[int], weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """:func:`gated_add`, and the layer norm of what it returns."""
    x = gated_add(x, update, gate, spans)
    return x, F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps).type_as(x)


def add_norm_modulate(
    x: Tensor, update: Tensor, shift: Tensor, scale: Tensor, spans: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    """``x + update``, and :func:`norm_modulate` of it."""
    return norm_modulate(x + update, shift, scale, spans, eps)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
