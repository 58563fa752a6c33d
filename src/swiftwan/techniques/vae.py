"""How latents become frames."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import nn

from swiftwan.device import parse_dtype
from swiftwan.errors import PlanError, did_you_mean
from swiftwan.models.vae import Tiling
from swiftwan.techniques.base import Settings, Slot, Technique
from swiftwan.weights.tiny import check_tiny, find_tiny, load_tiny

if TYPE_CHECKING:
    from swiftwan.device import Device
    from swiftwan.models.config import KnownModel
    from swiftwan.techniques.costs import Costs
    from swiftwan.weights.build import Parts


@dataclass(frozen=True)
class Vae(Technique):
    """``vae:fast``, ``vae:tiling``, ``vae:tiny``, ``vae:bf16``, ``fp16`` or ``fp32``; each a technique of its own."""

    name = "vae"
    kind = "exact"
    reason = "one of several"
    slot = Slot.BLOCKS

    @classmethod
    def read(cls, text: str) -> Technique:  # type: ignore[override]
        word = re.split("[:=]", text)[0]
        if not word:
            raise PlanError(f"technique 'vae' needs a value: {', '.join(_BY_WORD)}.")
        if word not in _BY_WORD:
            raise PlanError(f"vae:{word} is not known." + did_you_mean(word, _BY_WORD))
        return _BY_WORD[word].read(text)


@dataclass(frozen=True)
class TiledVae(Technique):
    """``vae:tiling[:sample=256,stride=192]``: decode in overlapping tiles of so many pixels, blended, for less memory.
    May run beside ``vae:fast``."""

    value: str
    sample: int = 256
    stride: int = 192

    name = "vae"
    kind = "approximate"
    reason = "a tile does not see beyond its border; overlaps are blended"
    slot = Slot.BLOCKS
    switch = "nothing"
    claims = ("vae.frame",)

    def __post_init__(self) -> None:
        if not 0 < self.stride <= self.sample:
            raise PlanError(
                f"vae:tiling has sample {self.sample} and stride {self.stride}; the stride must be 1 to sample."
            )

    def apply(self, settings: Settings) -> Settings:
        return replace(settings, tiling=Tiling(self.sample, self.stride))


@dataclass(frozen=True)
class FastVae(Technique):
    """``vae:fast``: encoder and decoder channels-last, with one kernel between two convolutions."""

    value: str

    name = "vae"
    kind = "exact"
    reason = "the same sums in another order; in bfloat16 its error is no larger than diffusers'"
    slot = Slot.BLOCKS
    switch = "nothing"
    claims = ("vae.layers",)

    def missing_on(self, device: Device) -> str:
        if device.capability is None:
            return "its kernels need an NVIDIA GPU"
        return "" if find_spec("triton") else "its kernels need Triton: pip install triton"

    def cost(self, costs: Costs) -> Costs:
        return replace(costs, decoder="fast")

    def install(self, parts: Parts) -> None:
        parts.vae.run_fast()


@dataclass(frozen=True)
class VaeDtype(Technique):
    """``vae:bf16``, ``vae:fp16`` or ``vae:fp32``: the VAE's own format, whatever the transformer's is."""

    value: str

    name = "vae"
    kind = "exact"
    reason = "the same maths in the format named"
    slot = Slot.WEIGHTS
    claims = ("vae",)

    def apply(self, settings: Settings) -> Settings:
        return replace(settings, vae_dtype=parse_dtype(self.value))


@dataclass(frozen=True)
class TinyVae(Technique):
    """``vae:tiny=FILE``: frames by a small decoder that imitates the VAE's, in TAEHV's format (``taew2_1`` for Wan2.1
    and A14B, ``taew2_2`` for TI2V-5B, of github.com/madebyollin/taehv); FILE may be ``OWNER/NAME/FILE`` on the hub.
    ``swiftwan train pocket-tiny`` makes one for the embedded model. Encoding stays the VAE's."""

    path: str

    name = "vae"
    kind = "approximate"
    reason = "a small network trained to draw what the VAE's decoder would"
    slot = Slot.BLOCKS
    claims = ("vae.layers", "vae.frame")

    @classmethod
    def read(cls, text: str) -> Technique:  # type: ignore[override]
        word, _, path = text.partition("=")
        if word != "tiny" or not path:
            raise PlanError(f"vae:{text} names no file; a tiny decoder is given as vae:tiny=FILE.")
        return cls(path)

    @property
    def spec(self) -> str:
        return f"vae:tiny={self.path}"

    def fit(self, model: KnownModel) -> list[str]:
        check_tiny(find_tiny(self.path), model.vae)
        return []

    def cost(self, costs: Costs) -> Costs:
        return replace(costs, decoder="tiny")

    def install(self, parts: Parts) -> None:
        weight = parts.vae.decoder.conv_out.weight
        parts.vae.tiny = load_tiny(find_tiny(self.path), device=weight.device, dtype=weight.dtype)


_BY_WORD: dict[str, type[Technique]] = {
    "fast": FastVae,
    "tiling": TiledVae,
    "tiny": TinyVae,
    "bf16": VaeDtype,
    "fp16": VaeDtype,
    "fp32": VaeDtype,
}


@dataclass(frozen=True)
class ChannelsLast(Technique):
    """The VAE's convolutions read and write channels last, as tensor cores want them: 348 instead of 258 to 279
    TFLOP/s for the largest of Wan2.1's on an H200. ``vae:fast`` does this and more."""

    name = "channels-last"
    kind = "exact"
    reason = "the same sums over another layout of memory"
    slot = Slot.BLOCKS
    claims = ("vae.layers",)

    def missing_on(self, device: Device) -> str:
        if device.torch_device == "cpu":
            return "convolutions are channels-last there in any plan"
        return ""

    def install(self, parts: Parts) -> None:
        channels_last(parts.vae)


def channels_last(vae: nn.Module) -> None:
    """Lay the weights of all 3D convolutions out channels last; activations follow them from the first on."""
    for layer in vae.modules():
        if isinstance(layer, nn.Conv3d):
            layer.weight.data = layer.weight.data.to(memory_format=torch.channels_last_3d)
