"""Classifier-free guidance (arXiv 2207.12598): what one denoising step asks of a transformer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from swiftwan.models.dit import Opening, WanTransformer


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
    """The conditional prediction alone; ``calls`` says how many there will be."""

    def __init__(
        self, transformer: WanTransformer, prompt: Tensor, image: Tensor | None, shape: tuple[int, ...], calls: int
    ) -> None:
        self.transformer = transformer
        self.condition = transformer.condition(prompt, shape, image, calls=calls)

    def __call__(self, latents: Tensor, timestep: Tensor, opening: Opening | None = None) -> Tensor:
        return self.transformer(latents, timestep, self.condition, opening)


class SequentialGuidance:
    """Two passes, one after the other, as diffusers does it, but that the second one reads the first one's opening.

    Attributes:
        alone: the conditional pass.
    """

    def __init__(
        self, transformer: WanTransformer, text: Embeddings, shape: tuple[int, ...], scale: float, calls: int
    ) -> None:
        assert text.negative is not None
        self.transformer, self.scale = transformer, scale
        self.alone = Unguided(transformer, text.prompt, text.image, shape, calls)
        self.unconditional = Unguided(transformer, text.negative, text.image, shape, calls)

    def pair(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The conditional and the unconditional prediction."""
        opening = Opening() if self.transformer.takes_opening else None
        return self.alone(latents, timestep, opening), self.unconditional(latents, timestep, opening)

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        conditional, unconditional = self.pair(latents, timestep)
        return unconditional + self.scale * (conditional - unconditional)


class BatchedGuidance(SequentialGuidance):
    """One pass over a batch of two: fewer launches, and the opening is computed once here too."""

    def __init__(
        self, transformer: WanTransformer, text: Embeddings, shape: tuple[int, ...], scale: float, calls: int
    ) -> None:
        assert text.negative is not None
        self.transformer, self.scale = transformer, scale
        self._of_alone = (transformer, text.prompt, text.image, shape, calls)
        pair = torch.nn.utils.rnn.pad_sequence([text.prompt[0], text.negative[0]], batch_first=True)
        image = None if text.image is None else text.image.repeat(2, 1, 1)
        self.condition = transformer.condition(pair, shape, image, calls=calls)

    @cached_property
    def alone(self) -> Unguided:  # type: ignore[override]
        return Unguided(*self._of_alone)

    def pair(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        conditional, unconditional = self.transformer(latents, timestep, self.condition).chunk(2)
        return conditional, unconditional


# Guidance at some calls only


class Mode(Enum):
    """What a call computes."""

    BOTH = "both predictions"
    REUSE = "the conditional prediction, and the last difference of the two"
    ALONE = "the conditional prediction"


@dataclass(frozen=True)
class When:
    """Which calls are guided.

    Attributes:
        low, high: noise levels, timestep / 1000, between which guidance acts (arXiv 2404.07724).
        every: of the calls that are guided, each so-manieth computes both predictions; the others reuse the
            difference of the last (as in FasterCache, arXiv 2410.19355).
        first: so many guided calls compute both before any reuses.
    """

    low: float = 0.0
    high: float = 1.0
    every: int = 1
    first: int = 0

    def modes(self, timesteps: Sequence[float]) -> list[Mode]:
        """One a call, for the timesteps (0 to 1000) that are to come."""
        modes, guided = [], 0
        for timestep in timesteps:
            if not self.low <= timestep / 1000 <= self.high:
                modes.append(Mode.ALONE)
                continue
            computes = guided < self.first or (guided - self.first) % self.every == 0
            modes.append(Mode.BOTH if computes else Mode.REUSE)
            guided += 1
        return modes


class PartialGuidance:
    """Guidance that computes both predictions only where :class:`When` says so."""

    def __init__(self, inner: SequentialGuidance, modes: Sequence[Mode]) -> None:
        self.inner = inner
        self.modes = iter(modes)
        self.difference: Tensor | None = None

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        mode = next(self.modes)
        if mode is Mode.BOTH:
            conditional, unconditional = self.inner.pair(latents, timestep)
            self.difference = conditional - unconditional
            return unconditional + self.inner.scale * self.difference
        conditional = self.inner.alone(latents, timestep)
        if mode is Mode.ALONE:
            return conditional
        assert self.difference is not None
        return conditional + (self.inner.scale - 1) * self.difference


@dataclass(frozen=True)
class Guide:
    """How guidance is made: one pass or two, and when."""

    kind: type[SequentialGuidance] = SequentialGuidance
    when: When = When()

    def guidance(
        self,
        transformer: WanTransformer,
        text: Embeddings,
        shape: tuple[int, ...],
        scale: float,
        timesteps: Sequence[float],
    ) -> Guidance:
        """Make it for an expert's latents (1, C, f, h, w), scale, and timesteps to come."""
        calls = len(timesteps)
        if scale <= 1:
            return Unguided(transformer, text.prompt, text.image, shape, calls)
        inner = self.kind(transformer, text, shape, scale, calls)
        modes = self.when.modes(timesteps)
        return inner if all(mode is Mode.BOTH for mode in modes) else PartialGuidance(inner, modes)
