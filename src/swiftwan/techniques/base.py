"""The vocabulary of techniques: what one claims, its kind, and how it changes a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from enum import IntEnum
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Self, TypeVar, get_type_hints

from swiftwan.errors import PlanError, did_you_mean
from swiftwan.guidance import Guide
from swiftwan.models.vae import Tiling

if TYPE_CHECKING:
    import torch

    from swiftwan.device import Device
    from swiftwan.models.config import KnownModel
    from swiftwan.pipelines.request import Request
    from swiftwan.progressive import Progressive
    from swiftwan.sampling import FewStep
    from swiftwan.techniques.costs import Costs
    from swiftwan.weights.build import Parts, ResidentBlocks
    from swiftwan.weights.load import AsLoaded

Kind = Literal["exact", "near", "approximate", "retrained"]
"""exact: the same maths; near: 8 bits and the like; approximate: skips work; retrained: few-step models."""

RELOAD = "loads the model anew"

Told = TypeVar("Told")


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
class Settings:
    """What techniques decide before anything loads.

    ``as_loaded`` changes layers as they get their weights; ``merges`` says that something is to be added to the
    weights first, so that they must stay as they are until then; ``resident_blocks`` says which blocks of transformers
    that load on the host go straight to the device; ``few_step`` is how a distilled model is sampled;
    ``vae_dtype`` is the VAE's own format; ``progressive`` makes the first steps smaller. ``one_memory`` no technique
    decides: whether the device computes in host memory, as a CPU does.
    """

    dtype: torch.dtype
    guide: Guide = Guide()
    tiling: Tiling | None = None
    tf32: bool = False
    prompt_cache: str = "disk"
    transformers_on_host: bool = False
    resident_blocks: ResidentBlocks | None = None
    text_home: str = "gpu"
    as_loaded: AsLoaded | None = None
    merges: bool = False
    vae_dtype: torch.dtype | None = None
    progressive: Progressive | None = None
    few_step: FewStep | None = None
    one_memory: bool = False


class ByValue(Generic[Told]):
    """What a technique says of itself where its values differ: the class says the usual, an instance its value's."""

    def __init__(self, usual: Told, by_value: Mapping[str, Told]) -> None:
        self.usual, self.by_value = usual, by_value

    def __get__(self, technique: Any, of: type) -> Told:
        return self.usual if technique is None else self.by_value.get(technique.value, self.usual)


@dataclass(frozen=True)
class Technique:
    """One named way to run faster or in less memory.

    Subclasses are frozen dataclasses; their fields are the options of ``name[:value][:key=value,...]``.

    Attributes:
        kind, reason: how near it stays to the plain run, and what it does; a :class:`ByValue` where values differ.
        slot: what it touches, and so when it is applied.
        claims: globs of module paths that it alone decides in its slot; () shares the slot with others.
        makes: facts about the run that others may refuse.
        refuses: facts it cannot work beside, each with the reason and the way out.
        switch: what it costs to switch it on or off on a loaded engine.
        values: what stands behind its name, where that is a choice that machines restrict.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    reason: ClassVar[str]
    slot: ClassVar[Slot]
    claims: ClassVar[tuple[str, ...]] = ("*",)
    makes: ClassVar[frozenset[str]] = frozenset()
    refuses: ClassVar[Mapping[str, str]] = MappingProxyType({})
    switch: ClassVar[str] = RELOAD
    values: ClassVar[tuple[str, ...]] = ()

    def missing_on(self, device: Device) -> str:
        """What this machine lacks to run it, in words; empty if nothing."""
        return ""

    def unreadable(self) -> str:
        """What is wrong with a file that it needs, in words; empty if nothing."""
        return ""

    def fit(self, model: KnownModel) -> list[str]:
        """What it will do to this model, a line each, beyond its reason.

        Raises:
            PlanError, WeightsError: the model cannot take it; says why.
        """
        return []

    def unfit_for_request(self, request: Request) -> str:
        """Why it cannot meet this request, in words; empty if it can."""
        return ""

    def conflict(self, other: Technique) -> str:
        """Why it cannot run beside ``other``, in words; empty if it can."""
        if self.slot is other.slot and _overlap(self.claims, other.claims):
            named = " and ".join(sorted({*self.claims, *other.claims} - {"*"}))
            return f"both decide {self.slot.name.lower()}{' of ' if named else ''}{named}: drop one"
        for one, two in ((self, other), (other, self)):
            for fact in one.refuses.keys() & two.makes:
                return f"{one.name} cannot run beside {two.name}: {one.refuses[fact]}"
        return ""

    def apply(self, settings: Settings) -> Settings:
        """Decide what is settled before loading."""
        return settings

    def cost(self, costs: Costs) -> Costs:
        """What it changes of a run's memory and work, told before anything loads."""
        return costs

    def begin(self, device: torch.device) -> None:
        """Begin, before anything loads, what the first run would wait for and needs no weights."""

    def install(self, parts: Parts) -> None:
        """Change what was loaded, before the first run; techniques install in the order of their slots."""

    @classmethod
    def read(cls, text: str) -> Self:
        """Make one from what follows ``name:`` in its spec.

        Raises:
            PlanError: an option is unknown, missing or of the wrong type.
        """
        types = get_type_hints(cls)
        known = {_word(f.name): f for f in fields(cls)}
        options: dict[str, Any] = {}
        for part in text.split(":") if text else ():
            pairs = [pair.partition("=") for pair in part.split(",")] if "=" in part else [("value", "=", part)]
            for key, _, value in pairs:
                key = key.replace("_", "-")
                if key not in known:
                    what = f"takes no value '{value}'" if key == "value" else f"has no option '{key}'"
                    raise PlanError(f"technique '{cls.name}' {what}." + (did_you_mean(key, known) if known else ""))
                if known[key].name in options:
                    raise PlanError(f"technique '{cls.name}' has {key} twice: give it once.")
                try:
                    options[known[key].name] = types[known[key].name](value)
                except ValueError:
                    wanted = "a whole number" if types[known[key].name] is int else "a number"
                    raise PlanError(f"{cls.name}: {key} is '{value}'; it must be {wanted}.") from None
        if "value" in known and "value" not in options and known["value"].default is MISSING:
            raise PlanError(f"technique '{cls.name}' needs a value: {_summary(cls.__doc__ or '')}")
        return cls(**options)

    @property
    def spec(self) -> str:
        """The text that :meth:`read` takes back, its name before it."""
        said = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        said |= {key: int(item) for key, item in said.items() if isinstance(item, float) and item.is_integer()}
        value = said.pop("value", None)
        options = ",".join(f"{_word(key)}={item}" for key, item in said.items())
        return ":".join(part for part in (self.name, value, options) if part)


def _summary(told: str) -> str:
    """What a docstring says before it goes into options, on one line."""
    return " ".join(told.partition("Args:")[0].replace("``", "").split())


def _word(field: str) -> str:
    """An option as it is written: ``dense_steps`` is dense-steps, ``from_`` from."""
    return field.rstrip("_").replace("_", "-")


def _overlap(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    return any(fnmatchcase(a, b) or fnmatchcase(b, a) for a in one for b in other)
