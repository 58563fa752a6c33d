"""Adaptive layer norm of diffusion transformers (DiT, arXiv 2212.09748): shift, scale and gate by timestep.

A clip has one timestep, or two (an image-to-video TI2V-5B run holds its first latent frame at 0). So the
vectors are (B, K, D) for K spans of tokens, not one a token: at 1280x704x121 that is 36 KB instead of the
2.0 GB that a per-token tensor takes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, spans: Sequence[int], eps: float) -> Tensor:
    """``layer_norm(x) * (1 + scale) + shift`` in float32, returned in x's dtype.

    Args:
        x: (B, L, D).
        shift, scale: (B, K, D), float32.
        spans: how many tokens each of the K vectors serves; they sum to L.
    """
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    parts = [part * (1 + scale[:, k, None]) + shift[:, k, None] for k, part in enumerate(normed.split(spans, dim=1))]
    return _join(parts).type_as(x)


def gated_add(x: Tensor, update: Tensor, gate: Tensor, spans: Sequence[int]) -> Tensor:
    """``x + update * gate`` in float32, returned in x's dtype; arguments as in :func:`norm_modulate`."""
    pairs = zip(x.float().split(spans, dim=1), update.split(spans, dim=1), strict=True)
    return _join([a + b * gate[:, k, None] for k, (a, b) in enumerate(pairs)]).type_as(x)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
