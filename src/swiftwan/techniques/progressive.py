"""Small pictures first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from swiftwan.errors import PlanError
from swiftwan.pipelines.request import TextToImage, TextToVideo
from swiftwan.progressive import Progressive
from swiftwan.techniques.base import Settings, Slot, Technique

if TYPE_CHECKING:
    from swiftwan.pipelines.request import Request
    from swiftwan.techniques.costs import Costs


@dataclass(frozen=True)
class ProgressiveResolution(Technique):
    """``progressive-resolution:scale=0.5,until=0.95``: steps above the noise level ``until``, timestep / 1000, run on
    latents of ``scale`` the height and width; then these are enlarged and noised again. For words alone."""

    scale: float = 0.5
    until: float = 0.95

    name = "progressive-resolution"
    kind = "approximate"
    reason = "under high noise only the layout is decided, which a small picture shows as well"
    slot = Slot.SCHEDULE
    switch = "nothing"
    claims = ("latents",)

    def __post_init__(self) -> None:
        if not 0.25 <= self.scale < 1:
            raise PlanError(f"progressive-resolution: scale is {self.scale}; it is a share of a side, 0.25 to below 1.")
        if not 0 < self.until < 1:
            raise PlanError(f"progressive-resolution: until is {self.until}; it is a noise level between 0 and 1.")

    def unfit_for_request(self, request: Request) -> str:
        if isinstance(request, TextToVideo | TextToImage):
            return ""
        return f"a {type(request).__name__} begins with pixels at the full size; take it for words alone"

    def apply(self, settings: Settings) -> Settings:
        return replace(settings, progressive=Progressive(self.scale, self.until))

    def cost(self, costs: Costs) -> Costs:
        return replace(costs, skips=True)
