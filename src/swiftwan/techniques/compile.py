"""torch.compile, one block at a time."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from swiftwan.errors import PlanError, did_you_mean
from swiftwan.models.dit import each_block
from swiftwan.places import cache_folder
from swiftwan.techniques.base import Slot, Technique

if TYPE_CHECKING:
    from swiftwan.device import Device
    from swiftwan.techniques.costs import Costs
    from swiftwan.weights.build import Parts

MODES = ("default", "max-autotune-no-cudagraphs")
"""torch's names; those with CUDA graphs are left out, since a block's output is the next one's input."""


def _keep_in(folder: Path) -> None:
    """Have torch keep what it compiles in a folder, unless the user named another."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Torch itself sets the variable as it is imported, to a folder of temporary files.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


@dataclass(frozen=True)
class Compile(Technique):
    """``compile[:mode=max-autotune-no-cudagraphs]``: blocks are equal, so that one compilation serves them all.

    What is compiled stays in the user's cache folder (``TORCHINDUCTOR_CACHE_DIR``, if set, is left alone).
    """

    mode: str = "default"

    name = "compile"
    kind = "exact"
    reason = "the same maths, fused by torch.compile"
    slot = Slot.COMPILE
    switch = "compiles at the next run"
    claims = ("blocks.*",)
    refuses = MappingProxyType(
        {"fused-blocks": "its kernels are what compile would make, and faster (437 against 468 ms a forward); drop one"}
    )

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise PlanError(f"compile: mode is '{self.mode}'." + did_you_mean(self.mode, MODES))

    def missing_on(self, device: Device) -> str:
        if device.torch_device == "mps":
            return "torch.compile is not tested on mps"
        return ""

    def cost(self, costs: Costs) -> Costs:
        return replace(costs, fused=True)

    def install(self, parts: Parts) -> None:
        _keep_in(cache_folder() / "inductor")
        # One compilation a shape: a run over many sizes must not hit torch's limit of eight.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        for transformer in filter(None, (parts.transformer, parts.transformer_2)):
            transformer.takes_opening = False
        for block in each_block(parts.transformer, parts.transformer_2):
            block.compile(mode=self.mode, dynamic=False, fullgraph=True)
