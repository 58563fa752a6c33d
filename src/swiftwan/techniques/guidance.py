"""How, and when, the two predictions of guidance are made."""

from __future__ import annotations

from dataclasses import dataclass, replace

from swiftwan.errors import PlanError
from swiftwan.guidance import BatchedGuidance
from swiftwan.techniques.base import Settings, Slot, Technique
from swiftwan.techniques.costs import Costs


@dataclass(frozen=True)
class BatchedCfg(Technique):
    """Both predictions in one pass. Pays where launches dominate: 2.0x for one 480p frame of 1.3B on an H200
    in eager mode, nothing from 17 frames on."""

    name = "batched-cfg"
    kind = "exact"
    reason = "the same two predictions, as a batch of two"
    slot = Slot.GUIDANCE
    switch = "nothing"
    makes = frozenset({"guided"})
    claims = ("pair",)

    def apply(self, settings: Settings) -> Settings:
        return replace(settings, guide=replace(settings.guide, kind=BatchedGuidance))

    def cost(self, costs: Costs) -> Costs:
        return replace(costs, batch=2)


@dataclass(frozen=True)
class CfgInterval(Technique):
    """``cfg-interval:from=0.1,to=0.9``: guidance only while the noise level, timestep / 1000, is between the two
    (arXiv 2404.07724); outside, one prediction does."""

    from_: float = 0.1
    to: float = 0.9

    name = "cfg-interval"
    kind = "approximate"
    reason = "guidance matters least at the ends of the schedule"
    slot = Slot.GUIDANCE
    switch = "nothing"
    makes = frozenset({"guided"})
    claims = ("interval",)

    def __post_init__(self) -> None:
        if not 0 <= self.from_ < self.to <= 1:
            raise PlanError(
                f"cfg-interval: from {self.from_} to {self.to}; both are noise levels in [0, 1], 'from' the lower one."
            )

    def apply(self, settings: Settings) -> Settings:
        when = replace(settings.guide.when, low=self.from_, high=self.to)
        return replace(settings, guide=replace(settings.guide, when=when))


@dataclass(frozen=True)
class CfgSkip(Technique):
    """``cfg-skip:every=2,first=4``: after ``first`` steps only each ``every``-th computes both predictions; the others
    add the last difference of the two to the conditional one (FasterCache, arXiv 2410.19355, without its filter)."""

    every: int = 2
    first: int = 4

    name = "cfg-skip"
    kind = "approximate"
    reason = "the difference of the two predictions changes slowly from step to step"
    slot = Slot.GUIDANCE
    switch = "nothing"
    makes = frozenset({"guided"})
    claims = ("reuse",)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise PlanError(f"cfg-skip: every is {self.every}; it is 1 or more steps.")
        if self.first < 0:
            raise PlanError(f"cfg-skip: first is {self.first}; it is 0 or more steps.")

    def apply(self, settings: Settings) -> Settings:
        when = replace(settings.guide.when, every=self.every, first=self.first)
        return replace(settings, guide=replace(settings.guide, when=when))
