"""How latents become frames."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from swiftwan.errors import PlanError
from swiftwan.models.vae import Tiling
from swiftwan.techniques.base import Settings, Slot, Technique

if TYPE_CHECKING:
    from swiftwan.device import Device
    from swiftwan.weights.build import Parts


@dataclass(frozen=True)
class Vae(Technique):
    """``vae:fast``: its layers channels-last in fused kernels. ``vae:tiling[:sample=256,stride=192]``: decode in
    overlapping tiles of so many pixels, blended, for less memory. Both may run at once."""

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
        if self.value != "tiling":
            raise PlanError(f"vae:{self.value} is not known; there are vae:fast and vae:tiling.")
        if not 0 < self.stride <= self.sample:
            raise PlanError(
                f"vae:tiling has sample {self.sample} and stride {self.stride}; the stride must be 1 to sample."
            )

    @classmethod
    def read(cls, text: str) -> Technique:  # type: ignore[override]
        return FastVae.read(text) if text.partition(":")[0] == "fast" else super().read(text)

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

    def install(self, parts: Parts) -> None:
        parts.vae.run_fast()
