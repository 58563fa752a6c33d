"""Where text is encoded, and where its embeddings are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from swiftwan.errors import PlanError, did_you_mean
from swiftwan.models.parking import take_turns
from swiftwan.models.streaming import bring_own
from swiftwan.models.umt5 import UMT5Encoder
from swiftwan.techniques.base import ByValue, Settings, Slot, Technique

if TYPE_CHECKING:
    import torch

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


_HOMES = {
    "gpu": "it stays on the device, ready for the next prompt",
    "cpu": "it waits and computes in host memory, which rounds differently",
    "blocks": "it waits in host memory and computes on the device a block at a time: the same bits",
    "unload": "it leaves the device once the prompts are encoded",
}
HOMES = tuple(_HOMES)


@dataclass(frozen=True)
class TextEncoderHome(Technique):
    """``text-encoder:gpu`` (what an unsaid plan does: loaded with the first new prompt, then kept), ``unload``
    (leaves the GPU once a run's prompts are encoded), ``blocks`` (waits in host memory, works on the GPU a block at a
    time: 0.4 GB instead of 11), or ``cpu`` (works in host memory as well)."""

    value: str

    name = "text-encoder"
    kind = "exact"
    reason = ByValue("the same encoder in another place", _HOMES)
    slot = Slot.RESIDENCY
    claims = ("text",)

    @property
    def refuses(self) -> Mapping[str, str]:  # type: ignore[override]
        moving = "bitsandbytes keeps them out of reach of a copy; take quantize:int4:on=text"
        return {"scales beside text weights": moving} if self.value == "blocks" else {}

    def __post_init__(self) -> None:
        if self.value not in HOMES:
            raise PlanError(f"text-encoder is '{self.value}'." + did_you_mean(self.value, HOMES))

    def cost(self, costs: Costs) -> Costs:
        return replace(costs, text_home=cast("Home", self.value))

    def apply(self, settings: Settings) -> Settings:
        return replace(settings, text_home=self.value)

    def install(self, parts: Parts) -> None:
        if self.value == "blocks":
            parts.text.after_load.append(partial(_by_blocks, device=parts.device))
        parts.text.stays_loaded = self.value != "unload"


def _by_blocks(encoder: nn.Module, device: torch.device) -> None:
    """Make an encoder that lies in host memory compute on the device block by block."""
    assert isinstance(encoder, UMT5Encoder)
    stack = encoder.encoder
    stack.embed_tokens = HostEmbedding(stack.embed_tokens, device)
    bring_own(stack.final_layer_norm, device)
    take_turns(stack.block, device)


class HostEmbedding(nn.Module):
    """Rows looked up in host memory (UMT5-XXL's table is 2 GB), sent to a device."""

    def __init__(self, table: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.table, self.device = table, device

    def forward(self, ids: Tensor) -> Tensor:
        """(1, S) token numbers to (1, S, D)."""
        rows: Tensor = self.table(ids.cpu())
        return rows.to(self.device)
