"""Where text is encoded, and where its embeddings are kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from swiftwan.errors import PlanError, did_you_mean
from swiftwan.techniques.base import Settings, Slot, Technique

if TYPE_CHECKING:
    from swiftwan.techniques.costs import Costs, Home
    from swiftwan.weights.build import Parts

PLACES = ("disk", "memory", "off")


@dataclass(frozen=True)
class PromptCaching(Technique):
    """``prompt-cache:disk`` (what an unsaid plan does), ``memory`` (this process alone), or ``off``."""

    value: str = "disk"

    name = "prompt-cache"
    kind = "exact"
    reason = "a repeated prompt takes its embedding, bit for bit, from the cache"
    slot = Slot.RESIDENCY
    switch = "nothing"
    claims = ("prompts",)

    def __post_init__(self) -> None:
        if self.value not in PLACES:
            raise PlanError(f"prompt-cache is '{self.value}'." + did_you_mean(self.value, PLACES))

    def apply(self, settings: Settings) -> Settings:
        return replace(settings, prompt_cache=self.value)


HOMES = ("gpu", "cpu", "unload")


@dataclass(frozen=True)
class TextEncoderHome(Technique):
    """``text-encoder:gpu`` (what an unsaid plan does: loaded with the first new prompt, then kept), ``cpu`` (works and
    stays in host memory; 11 GB less on the GPU), or ``unload`` (leaves the GPU once a run's prompts are encoded)."""

    value: str

    name = "text-encoder"
    kind = "exact"
    reason = "the same encoder in another place; a CPU rounds differently"
    slot = Slot.RESIDENCY
    claims = ("text",)

    def __post_init__(self) -> None:
        if self.value not in HOMES:
            raise PlanError(f"text-encoder is '{self.value}'." + did_you_mean(self.value, HOMES))

    def cost(self, costs: Costs) -> Costs:
        return replace(costs, text_home=cast("Home", self.value))

    def apply(self, settings: Settings) -> Settings:
        return replace(settings, text_on_host=self.value == "cpu")

    def install(self, parts: Parts) -> None:
        parts.text.stays_loaded = self.value != "unload"
