"""How much arithmetic a training step is: what seconds are measured against."""

from __future__ import annotations

from swiftwan.models.config import TransformerConfig


def tflop(config: TransformerConfig, tokens: int) -> tuple[float, float]:
    """Of one clip's forward and backward: in linear layers and in self-attention, each product counted once.

    A frozen layer has no gradient of its weight, so its backward is as much as its forward. Attention's is 2.5 times
    its forward, as flash kernels count it, which make the scores again. Adapters, cross-attention and what blocks
    compute again are left out: the same number whatever the settings.
    """
    linears = 12 * tokens * config.dim**2 + 4 * tokens * config.dim * config.ffn_dim
    attention = 4 * tokens**2 * config.dim
    return config.num_layers * 2 * linears / 1e12, config.num_layers * 3.5 * attention / 1e12
