"""UMT5's encoder (arXiv 2304.09151), Wan's reader, under the names of transformers' ``UMT5EncoderModel``.

That class is the reference. This one exists for the cold start: importing transformers' models takes 2 to 4 s of every
process, one that only plans a run included.

Shapes: B texts, S tokens, D width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftwan.errors import WeightsError


@dataclass(frozen=True)
class TextConfig:
    """Sizes under transformers' names; those that have a value are UMT5's own.

    ``own_bias``: each layer has its relative position bias (UMT5), or all take the first one's (T5).
    """

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_heads: int
    num_layers: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    own_bias: bool = True

    @classmethod
    def from_json(cls, sizes: Mapping[str, Any], *, own_bias: bool = True) -> Self:
        """Sizes of a config.json.

        Raises:
            WeightsError: its feed-forward is another than every Wan's, which this encoder computes.
        """
        form = sizes.get("feed_forward_proj", "gated-gelu" if own_bias else "relu")  # transformers' own defaults
        if form != "gated-gelu":
            raise WeightsError(
                f"the text encoder's config.json has feed_forward_proj '{form}'; every published Wan has gated-gelu. "
                "Is this a Wan checkpoint?"
            )
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in sizes.items() if key in known}, own_bias=own_bias)


def _table(rows: int, width: int) -> nn.Embedding:
    """Without numbers until weights are loaded: to draw them on meta, torch imports its compiler, for a second."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width))


class UMT5Encoder(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.shared = _table(config.vocab_size, config.d_model)
        self.encoder = Stack(config, self.shared)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids and their mask (1 a token, 0 padding), both (B, S), to embeddings (B, S, D)."""
        out: Tensor = self.encoder(ids, mask)
        return out


class Stack(nn.Module):
    def __init__(self, config: TextConfig, embed_tokens: nn.Embedding) -> None:
        super().__init__()
        self.embed_tokens: nn.Module = embed_tokens
        self.block = nn.ModuleList(Block(config, has_bias=config.own_bias or not i) for i in range(config.num_layers))
        self.final_layer_norm = Norm(config)
        self.buckets = config.relative_attention_num_buckets
        self.reach = config.relative_attention_max_distance

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        place = torch.arange(ids.shape[1], device=ids.device)
        buckets = bucket(place[None] - place[:, None], self.buckets, self.reach)
        hidden = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(mask == 0, -math.inf)
        bias = None
        for block in self.block:
            x, bias = block(x, bias, buckets, hidden)
        out: Tensor = self.final_layer_norm(x)
        return out


class Block(nn.Module):
    def __init__(self, config: TextConfig, *, has_bias: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList((SelfAttentionLayer(config, has_bias=has_bias), FeedForwardLayer(config)))

    def forward(self, x: Tensor, bias: Tensor | None, buckets: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (B, S, D) and what the last block added to the scores, to x and what this one adds: (B, H, S, S).

        Args:
            buckets: (S, S) by :func:`bucket`.
            hidden: (B, S), -inf at padding.
        """
        attention = self.layer[0]
        assert isinstance(attention, SelfAttentionLayer)
        if (own := attention.SelfAttention.relative_attention_bias) is not None:
            bias = (own(buckets).permute(2, 0, 1)[None] + hidden[:, None, None]).contiguous()
        return bounded(self.layer[1](bounded(attention(x, bias)))), bias


class SelfAttentionLayer(nn.Module):
    def __init__(self, config: TextConfig, *, has_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = SelfAttention(config, has_bias=has_bias)
        self.layer_norm = Norm(config)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = x + self.SelfAttention(self.layer_norm(x), bias)
        return out


class SelfAttention(nn.Module):
    """Scores are not scaled: T5 has that in its weights."""

    def __init__(self, config: TextConfig, *, has_bias: bool) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        buckets = config.relative_attention_num_buckets
        self.relative_attention_bias = _table(buckets, config.num_heads) if has_bias else None

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, S, D) and what is added to the scores, (B or 1, H, S, S)."""
        q, k, v = (part(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        projected: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return projected


class FeedForwardLayer(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.DenseReluDense = GatedGelu(config)  # its name since the first T5, which had no gate
        self.layer_norm = Norm(config)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.DenseReluDense(self.layer_norm(x))
        return out


class GatedGelu(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))
        return out


class Norm(nn.Module):
    """RMS norm that rounds before its weight, as T5 does; torch's rounds after it."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.eps = config.layer_norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (x * scale).to(self.weight.dtype)


def bucket(distance: Tensor, buckets: int, reach: int) -> Tensor:
    """Which bias tokens so far apart get: half of the buckets look ahead; of each half, half are for one distance each,
    the rest for ranges that grow up to ``reach``."""
    half, ahead, distance = buckets // 2, distance > 0, distance.abs()
    single = half // 2
    grown = torch.log(distance.clamp(min=1).float() / single) / math.log(reach / single) * (half - single)
    ranged = (single + grown.long()).clamp(max=half - 1)
    return ahead * half + torch.where(distance < single, distance, ranged)


def bounded(x: Tensor) -> Tensor:
    """float16 overflows in the largest of these models: infinities become its largest numbers, as in transformers."""
    if x.dtype is not torch.float16:
        return x
    largest = torch.finfo(x.dtype).max
    limit = torch.where(x.isinf().any(), largest - 1000, largest)
    return x.clamp(-limit, limit)
