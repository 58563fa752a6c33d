"""Flow matching (arXiv 2210.02747) as Wan is trained: which noise level a clip gets, what the model sees, the loss.

``noisy = (1 - level) latents + level noise``; the model predicts the flow ``noise - latents`` at timestep 1000 level.

Shapes: B batch, C latent channels, f h w latent frames, height, width; S text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from swiftwan.errors import RequestError
from swiftwan.models.dit import WanTransformer
from swiftwan.train.loop import seed_of

GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Levels:
    """The distribution of noise levels.

    Args:
        distribution: logit-normal with mean 0 and deviation 1 (arXiv 2403.03206), or uniform; before the shift.
        shift: k of ``k u / (1 + (k - 1) u)``; more leans towards noise.
        low, high: the part of [0, 1] that is drawn from; inside it the distribution keeps its form, as if all
            other draws were rejected. A two-expert model's transformers own one part each.
    """

    distribution: Literal["logit-normal", "uniform"] = "logit-normal"
    shift: float = 3.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise RequestError(f"shift is {self.shift}; it must be above 0 (1 is no shift).")

    def quantile(self, share: Tensor) -> Tensor:
        """The level below which ``share`` of the draws fall: any shape in [0, 1]; float32."""
        low, high = self.share_below(self.low), self.share_below(self.high)
        share = low + share.double() * (high - low)
        plain = torch.sigmoid(torch.special.ndtri(share)) if self.distribution == "logit-normal" else share
        return (self.shift * plain / (1 + (self.shift - 1) * plain)).float()

    def share_below(self, level: float) -> float:
        """What part of the draws of the whole distribution falls below a level."""
        plain = torch.tensor(level / (self.shift - (self.shift - 1) * level), dtype=torch.float64)
        if self.distribution == "logit-normal":
            plain = torch.special.ndtr(torch.logit(plain))
        return float(plain)


def spread(seed: int, number: int) -> float:
    """The place in [0, 1) of batch ``number``: steps of the golden ratio, so that any few batches in a row cover the
    levels evenly, where independent draws leave gaps and clusters that show in the loss as noise."""
    start = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return float((start + number * GOLDEN) % 1)


def shares(place: float, count: int) -> Tensor:
    """Quantiles for the clips of a batch: evenly apart, from the batch's place on."""
    return (place + torch.arange(count, dtype=torch.float64) / count) % 1


@dataclass(frozen=True)
class Batch:
    """What a batch is trained on, on the device.

    Attributes:
        latents: (B, C, f, h, w), normalised, float32.
        text: (B, S, text_dim), zero behind each prompt's end.
        channels: (B, 4 + C, f, h, w) mask and image latents, of models that take them beside the noise.
        image_tokens: (B, 257, image_dim), of models that read them.
        given: (B,) booleans: of which clips the first latent frame is clean and does not count; None: of none.
    """

    latents: Tensor
    text: Tensor
    channels: Tensor | None = None
    image_tokens: Tensor | None = None
    given: Tensor | None = None


def predict(transformer: WanTransformer, batch: Batch, noisy: Tensor, level: Tensor) -> Tensor:
    """The model's flow, float32, of noisy latents (B, C, f, h, w) at levels (B,)."""
    timestep = 1000 * level
    if batch.given is not None:
        timestep = torch.stack((torch.where(batch.given, 0.0, timestep), timestep), dim=1)
    if batch.channels is not None:
        noisy = torch.cat((noisy, batch.channels), dim=1)
    condition = transformer.condition(batch.text, noisy.shape, batch.image_tokens)
    return transformer(noisy, timestep, condition).float()


def loss(
    transformer: WanTransformer,
    batch: Batch,
    level: Tensor,
    noise: Tensor,
    weighting: Literal["none", "bell"] = "none",
) -> Tensor:
    """Mean squared error of the predicted flow.

    Args:
        level: (B,).
        noise: (B, C, f, h, w).
        weighting: of each clip by its level: ``none`` is 1; ``bell`` counts the middle most and the ends not at all
            (github.com/modelscope/DiffSynth-Studio), for models trained with it.
    """
    latents, flow = batch.latents, noise - batch.latents
    noisy = torch.lerp(latents, noise, level.view(-1, 1, 1, 1, 1))
    if batch.given is not None:
        clean = batch.given.view(-1, 1, 1, 1, 1)
        noisy = torch.cat((torch.where(clean, latents[:, :, :1], noisy[:, :, :1]), noisy[:, :, 1:]), dim=2)
    error = (predict(transformer, batch, noisy, level) - flow).square().mean((1, 3, 4))  # (B, f)
    counts = torch.ones_like(error)
    if batch.given is not None:
        counts[:, 0] = (~batch.given).float()
    weight = bell(level)[:, None] if weighting == "bell" else 1.0
    return (error * counts * weight).sum() / counts.sum()


def bell(level: Tensor) -> Tensor:
    """A Gaussian around 0.5, 0 at the ends, with mean 1 over [0, 1]."""
    lowest = torch.tensor(-0.5).exp()
    area = 0.8556 - lowest  # of exp(-2 (x - 1/2)^2) over [0, 1], less the rectangle below its ends
    return ((-2 * (level - 0.5).square()).exp() - lowest) / area


def generator(seed: int, number: int, device: torch.device) -> torch.Generator:
    """The source of all chance in batch ``number``: nothing of it needs saving."""
    return torch.Generator(device).manual_seed(seed_of(seed, number))
