"""Classifier-free guidance (arXiv 2207.12598): what one denoising step asks of a transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from swiftwan.models.dit import WanTransformer


@dataclass(frozen=True)
class Embeddings:
    """What a run's cross-attention reads.

    Attributes:
        prompt, negative: (1, S, text_dim) each; ``negative`` is None where guidance is off everywhere.
        image: CLIP tokens (1, 257, image_dim), or (2, 257, image_dim) of a first and a last image; both predictions
            see them. None for models without CLIP.
    """

    prompt: Tensor
    negative: Tensor | None
    image: Tensor | None = None


class Guidance(Protocol):
    """Predicts the flow; made once an expert and run.

    Takes latents (1, C, f, h, w) with all the channels that the transformer reads, and a timestep (1,), or (1, 2) where
    the first latent frame has one of its own.
    """

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor: ...


class Unguided:
    """The conditional prediction alone."""

    def __init__(self, transformer: WanTransformer, text: Embeddings, shape: tuple[int, ...]) -> None:
        self.transformer = transformer
        self.condition = transformer.condition(text.prompt, shape, text.image)

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        return self.transformer(latents, timestep, self.condition)


class SequentialGuidance:
    """Two passes, one after the other, as diffusers does it."""

    def __init__(self, transformer: WanTransformer, text: Embeddings, shape: tuple[int, ...], scale: float) -> None:
        assert text.negative is not None
        self.transformer, self.scale = transformer, scale
        self.condition = transformer.condition(text.prompt, shape, text.image)
        self.negative = transformer.condition(text.negative, shape, text.image)

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
        image = None if text.image is None else text.image.repeat(2, 1, 1)
        self.condition = transformer.condition(pair, shape, image)

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        latents, timestep = (x.expand(2, *x.shape[1:]) for x in (latents, timestep))
        flow = self.transformer(latents, timestep, self.condition)
        conditional, unconditional = flow.chunk(2)
        return unconditional + self.scale * (conditional - unconditional)


Guide = type[SequentialGuidance] | type[BatchedGuidance]
