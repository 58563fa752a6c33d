"""Classifier-free guidance (arXiv 2207.12598): what one denoising step asks of a transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from swiftwan.models.dit import WanTransformer


@dataclass(frozen=True)
class Embeddings:
    """(1, S, text_dim) each; ``negative`` is None where guidance is off everywhere."""

    prompt: Tensor
    negative: Tensor | None


class Guidance(Protocol):
    """Predicts the flow of latents (1, C, f, h, w) at a timestep (1,); made once an expert and run."""

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor: ...


class Unguided:
    """The conditional prediction alone."""

    def __init__(self, transformer: WanTransformer, text: Embeddings, shape: tuple[int, ...]) -> None:
        self.transformer = transformer
        self.condition = transformer.condition(text.prompt, shape)

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        return self.transformer(latents, timestep, self.condition)


class SequentialGuidance:
    """Two passes, one after the other, as diffusers does it."""

    def __init__(self, transformer: WanTransformer, text: Embeddings, shape: tuple[int, ...], scale: float) -> None:
        assert text.negative is not None
        self.transformer, self.scale = transformer, scale
        self.condition = transformer.condition(text.prompt, shape)
        self.negative = transformer.condition(text.negative, shape)

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        conditional = self.transformer(latents, timestep, self.condition)
        unconditional = self.transformer(latents, timestep, self.negative)
        return unconditional + self.scale * (conditional - unconditional)


class BatchedGuidance:
    """One pass over a batch of two: fewer launches, the same arithmetic."""

    def __init__(self, transformer: WanTransformer, text: Embeddings, shape: tuple[int, ...], scale: float) -> None:
        assert text.negative is not None
        self.transformer, self.scale = transformer, scale
        pair = torch.nn.utils.rnn.pad_sequence([text.prompt[0], text.negative[0]], batch_first=True)
        self.condition = transformer.condition(pair, shape)

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        flow = self.transformer(latents.expand(2, *latents.shape[1:]), timestep.expand(2), self.condition)
        conditional, unconditional = flow.chunk(2)
        return unconditional + self.scale * (conditional - unconditional)


Guide = type[SequentialGuidance] | type[BatchedGuidance]
