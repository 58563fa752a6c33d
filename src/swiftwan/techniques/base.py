"""The vocabulary of techniques: what one claims, its kind, and how it changes a run's settings."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, ClassVar, Literal

from swiftwan.guidance import Guide, SequentialGuidance
from swiftwan.models.vae import Tiling

if TYPE_CHECKING:
    import torch

    from swiftwan.device import Device

Kind = Literal["exact", "near", "approximate", "retrained"]
"""exact: the same maths; near: 8 bits and the like; approximate: skips work; retrained: few-step models."""


class Slot(IntEnum):
    """What a technique touches, in order of application."""

    WEIGHTS = 0
    LINEAR = 1
    ADAPTER = 2
    ATTENTION = 3
    RESIDENCY = 4
    BLOCKS = 5
    GUIDANCE = 6
    SCHEDULE = 7
    COMPILE = 8


@dataclass(frozen=True)
class Claim:
    """Module paths (a glob) in a slot; two techniques may not claim the same."""

    slot: Slot
    paths: str


@dataclass(frozen=True)
class Settings:
    """What techniques decide before anything loads."""

    dtype: torch.dtype
    guide: Guide = SequentialGuidance
    tiling: Tiling | None = None
    tf32: bool = False


@dataclass(frozen=True)
class Technique:
    """One named way to run faster or in less memory.

    Subclasses are frozen dataclasses; their fields are the options of ``name:value:key=value``.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    reason: ClassVar[str]
    claim: ClassVar[Claim]

    def missing_on(self, device: Device) -> str:
        """What this machine lacks to run it, in words; empty if nothing."""
        return ""

    def apply(self, settings: Settings) -> Settings:
        raise NotImplementedError
