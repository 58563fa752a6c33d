"""How latents become frames."""

from __future__ import annotations

from dataclasses import dataclass, replace

from swiftwan.errors import PlanError
from swiftwan.models.vae import Tiling
from swiftwan.techniques.base import Settings, Slot, Technique


@dataclass(frozen=True)
class Vae(Technique):
    """``vae:tiling[:sample=256,stride=192]``: decode in overlapping tiles of so many pixels, blended."""

    value: str
    sample: int = 256
    stride: int = 192

    name = "vae"
    kind = "approximate"
    reason = "a tile does not see beyond its border; overlaps are blended"
    slot = Slot.BLOCKS
    claims = ("vae",)

    def __post_init__(self) -> None:
        if self.value != "tiling":
            raise PlanError(f"vae:{self.value} is not known; there is vae:tiling.")
        if not 0 < self.stride <= self.sample:
            raise PlanError(
                f"vae:tiling has sample {self.sample} and stride {self.stride}; the stride must be 1 to sample."
            )

    def apply(self, settings: Settings) -> Settings:
        return replace(settings, tiling=Tiling(self.sample, self.stride))
