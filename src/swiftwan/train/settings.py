"""What a LoRA run is told."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from swiftwan.errors import RequestError, did_you_mean
from swiftwan.weights.lora_write import FORMATS

_CHOICES = {
    "optimizer": ("adamw", "adamw8bit"),
    "timesteps": ("logit-normal", "uniform"),
    "weighting": ("none", "bell"),
    "experts": ("high", "low", "both", "shared"),
    "base": ("bf16", "fp8", "fp8-attention"),
    "weights": ("whole", "sharded", "offloaded"),
    "keep": ("auto", "all", "products", "attention", "nothing"),
    "format": FORMATS,
}

_LEAST = {
    "steps": 1, "rank": 1, "accumulate": 1, "validate_every": 1, "checkpoint_every": 1,
    "warmup": 0, "weight_decay": 0, "batch_tokens": 0, "sample_every": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What decides a run's numbers, and (from ``validate_every`` on) what only decides what is told of it.

    Attributes:
        rank, alpha: of the adapter; alpha None is the rank, a scale of 1.
        targets: words of ``adapter.TARGETS`` and ``adapter.GROUPS``.
        width, height: their product is the most pixels of a frame; clips keep their aspects. None: the model's own.
        frames: most frames of an item. None: the model's own.
        batch_tokens: most tokens of a batch, which holds one item at least.
        accumulate: batches of a step.
        shift: of the noise levels; None is the model's own for sampling, at most 5.
        experts: of a two-expert model: high, low, both (an adapter each) or shared (one for both).
        first_frame: share of clips that begin with a given frame, for models that take it as such (TI2V-5B).
        drop_caption: share of clips trained without their caption, so that guidance keeps working.
        ema: decay of the averaged adapter, which is what is then delivered; 0 keeps none.
        base: bf16 (as loaded), fp8 for the products with the frozen weights, or fp8-attention for the forward pass of
            self-attention too.
        weights: frozen ones, ``whole`` on each device, ``sharded`` over all, or ``offloaded`` to host memory.
        keep: what blocks keep for the backward pass; auto is the most that fits.
    """

    steps: int = 1000
    rank: int = 32
    alpha: float | None = None
    targets: tuple[str, ...] = ("all",)
    learning_rate: float = 1e-4
    warmup: int = 20
    weight_decay: float = 0.01
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    batch_tokens: int = 0
    accumulate: int = 1
    clip: float = 1.0
    timesteps: Literal["logit-normal", "uniform"] = "logit-normal"
    shift: float | None = None
    weighting: Literal["none", "bell"] = "none"
    experts: Literal["high", "low", "both", "shared"] = "both"
    first_frame: float = 0.0
    drop_caption: float = 0.1
    ema: float = 0.0
    held_out: float = 0.1
    seed: int = 0
    base: Literal["bf16", "fp8", "fp8-attention"] = "bf16"
    weights: Literal["whole", "sharded", "offloaded"] = "whole"
    validate_every: int = 100
    sample_every: int = 0
    prompts: tuple[str, ...] = ()
    checkpoint_every: int = 100
    keep: Literal["auto", "all", "products", "attention", "nothing"] = "auto"
    format: str = "diffusers"

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on; its end may move."""
        names = [f.name for f in fields(self)]
        told = names[names.index("validate_every") :]
        return {name: value for name, value in asdict(self).items() if name not in (*told, "steps")}

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise RequestError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        for name, allowed in _CHOICES.items():
            if (said := getattr(self, name)) not in allowed:
                raise RequestError(f"{name} is '{said}'." + did_you_mean(said, allowed))
        for name in ("first_frame", "drop_caption", "ema", "held_out"):
            if not 0 <= getattr(self, name) < 1 and not (name == "first_frame" and self.first_frame == 1):
                raise RequestError(f"{name} is {getattr(self, name)}; it is a share, from 0 to below 1.")
        for name in ("learning_rate", "clip", "alpha", "shift"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise RequestError(f"{name} is {value}; it must be above 0.")

    @property
    def scale(self) -> float:
        """alpha: the rank unless said otherwise."""
        return float(self.rank if self.alpha is None else self.alpha)
