"""Where prompt embeddings are kept."""

from __future__ import annotations

from dataclasses import dataclass, replace

from swiftwan.errors import PlanError, did_you_mean
from swiftwan.techniques.base import Settings, Slot, Technique

PLACES = ("disk", "memory", "off")


@dataclass(frozen=True)
class PromptCaching(Technique):
    """``prompt-cache:disk`` (what an unsaid plan does), ``memory`` (this process alone), or ``off``."""

    value: str = "disk"

    name = "prompt-cache"
    kind = "exact"
    reason = "a repeated prompt takes its embedding, bit for bit, from the cache"
    slot = Slot.RESIDENCY
    claims = ("prompts",)

    def __post_init__(self) -> None:
        if self.value not in PLACES:
            raise PlanError(f"prompt-cache is '{self.value}'." + did_you_mean(self.value, PLACES))

    def apply(self, settings: Settings) -> Settings:
        return replace(settings, prompt_cache=self.value)
