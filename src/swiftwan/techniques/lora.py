"""LoRA files of every family: merged into the weights, or live beside them."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self, cast

from swiftwan.errors import PlanError, WeightsError, did_you_mean
from swiftwan.models.adapter import Change, attach, merge, quantised, set_strength
from swiftwan.techniques.base import Settings, Slot, Technique
from swiftwan.weights.lora import PICKLES, Expert, Fit, LoraFile

if TYPE_CHECKING:
    from swiftwan.models.config import KnownModel, TransformerConfig
    from swiftwan.models.dit import WanTransformer
    from swiftwan.techniques.costs import Costs
    from swiftwan.weights.build import Parts

log = logging.getLogger(__name__)

_ENDINGS = "|".join(ending[1:] for ending in (".safetensors", *PICKLES))
STYLE = "silhouettes"
"""The embedded model's own style LoRA, asked for by this name."""
# A path may hold ':' and '=': it ends with its ending, and what follows is the strength and the options.
_SPEC = re.compile(
    rf"(?P<path>{STYLE}|.+\.(?:{_ENDINGS}))(?:=(?P<strength>[^:=]*))?(?P<options>(?::[^:]*)*)\Z", re.IGNORECASE
)
# At the name's end, but for a version, rank or format; "low_poly" is a style.
_NAMED_EXPERT = re.compile(
    r"(?<![a-z])(high|low)(?:[ _.-]?noise|(?:[ _.-](?:v?\d[\d.]*|r(?:ank)?\d+|b?fp?16))*\Z)", re.IGNORECASE
)


def shipped(name: str) -> Path:
    """A LoRA of the embedded model, in the package."""
    return Path(str(files("swiftwan.pocket") / "lora" / f"{name}.safetensors"))


@dataclass(frozen=True)
class Lora(Technique):
    """``lora:FILE.safetensors[=STRENGTH][:mode=merged|live][:expert=high|low|both]``: a LoRA of any family.

    ``lora:silhouettes`` is the style that comes with the embedded model.
    Where no mode is asked for, it is merged if all weights that it changes are floats, and live otherwise.
    Where no expert is, the names in the file say for which of a model's two it is, or else the file's own
    name (``high_noise``, ``low_noise``), or else it is for both.
    """

    path: str
    strength: float = 1.0
    expert: Literal["", "high", "low", "both"] = ""

    name = "lora"
    kind = "retrained"
    reason = "another model, on purpose; merged into float weights, live beside quantised ones"
    slot = Slot.ADAPTER
    claims = ()
    mode: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise PlanError(f"lora: the strength of {self.path} is {self.strength}; it must be a finite number.")
        if self.expert not in ("", "high", "low", "both"):
            raise PlanError(f"lora: expert is '{self.expert}'; it is high, low or both.")

    @classmethod
    def read(cls, text: str) -> Self:
        match = _SPEC.match(text)
        if match is None:
            raise PlanError(f"lora needs a file: '{text}' does not name a .safetensors file.")
        options = {"mode": "", "expert": ""}
        for option in filter(None, re.split("[:,]", match["options"])):
            key, _, value = option.partition("=")
            if key not in options:
                raise PlanError(f"technique 'lora' has no option '{key}'.{did_you_mean(key, options)}")
            options[key] = value
        try:
            strength = 1.0 if match["strength"] is None else float(match["strength"])
        except ValueError:
            raise PlanError(f"lora: strength is '{match['strength']}'; it must be a number.") from None
        kinds = {"": Lora, "merged": MergedLora, "live": LiveLora}
        if (mode := options["mode"]) not in kinds:
            raise PlanError(f"lora: mode is '{mode}'; it is merged or live.")
        return cast("Self", kinds[mode](match["path"], strength, options["expert"]))  # type: ignore[arg-type]

    @property
    def spec(self) -> str:
        strength = "" if self.strength == 1 else f"={self.strength:.15g}"
        mode = self.mode and f":mode={self.mode}"
        expert = self.expert and f":expert={self.expert}"
        return f"{self.name}:{self.path}{strength}{mode}{expert}"

    @property
    def file(self) -> Path:
        return shipped(STYLE) if self.path == STYLE else Path(self.path).expanduser()

    def unreadable(self) -> str:
        try:
            self._open()
        except WeightsError as problem:
            return str(problem)
        return ""

    def conflict(self, other: Technique) -> str:
        if isinstance(other, Lora) and other.path == self.path:
            pair = {self.expert, other.expert}
            if pair != {"high", "low"}:
                return "the same LoRA twice: give it once, with one strength, or once for each expert"
        return super().conflict(other)

    def fit(self, model: KnownModel) -> list[str]:
        fits = self._fits(model.transformer, two=model.boundary_ratio is not None)
        return [line for expert, fitted in fits.items() for line in self._report(fitted, expert)]

    def cost(self, costs: Costs) -> Costs:
        live = self.mode == "live" or (not self.mode and costs.quantized)
        size = self.file.stat().st_size if live and self.file.is_file() else 0
        return replace(costs, kept_bytes=costs.kept_bytes + size)

    def install(self, parts: Parts) -> None:
        transformers = self._transformers(parts)
        for expert, fitted in self._fits(parts.transformer.config, two=parts.transformer_2 is not None).items():
            transformer, changes = transformers[expert], fitted.load()
            live = self._runs_live(transformer, changes)
            if live and fitted.is_dora:
                raise WeightsError(_dora(self.path, "these weights are quantised; load them in floats"))
            log.info("%s: %s: %s", self.path, "live" if live else "merged", "; ".join(self._report(fitted, expert)))
            if left_out := fitted.report.left_out():
                log.warning("%s: %s", self.path, left_out)
            if live:
                attach(transformer, changes, self.path, self.strength, device=parts.device, dtype=transformer.dtype)
            else:
                merge(transformer, changes, self.strength, parts.device)

    def change(self, parts: Parts) -> None:
        """Give a live LoRA that is loaded the strength of this one.

        Raises:
            PlanError: it is merged.
        """
        transformers = self._transformers(parts)
        experts = self._experts(two=parts.transformer_2 is not None)
        found = [set_strength(transformers[expert], self.path, self.strength) for expert in experts]
        if not all(found):
            raise PlanError(
                f"'{self.label}' is merged into the weights, so its strength cannot change; load it with "
                f"lora:{self.path}:mode=live."
            )

    @property
    def label(self) -> str:
        """Its short name: the file's, and the expert where it is for one."""
        return Path(self.path).stem + (f":{self.expert}" if self.expert in ("high", "low") else "")

    def _open(self) -> LoraFile:
        return LoraFile.open(self.file)

    def _experts(self, *, two: bool) -> tuple[Expert | None, ...]:
        if not two:
            if self.expert in ("high", "low"):
                raise WeightsError(
                    f"{self.path} is asked for the {self.expert}-noise expert; this model has one transformer: "
                    f"drop expert={self.expert}"
                )
            return (None,)
        if self.expert in ("high", "low"):
            return (self.expert,)
        if not self.expert and (named := self._open().experts or _named_by(Path(self.path))):
            return tuple(sorted(named))
        return ("high", "low")

    def _fits(self, config: TransformerConfig, *, two: bool) -> dict[Expert | None, Fit]:
        file = self._open()
        return {expert: file.fit(config, expert) for expert in self._experts(two=two)}

    @staticmethod
    def _transformers(parts: Parts) -> dict[Expert | None, WanTransformer]:
        if parts.transformer_2 is None:
            return {None: parts.transformer}
        return {"high": parts.transformer, "low": parts.transformer_2}

    def _runs_live(self, transformer: WanTransformer, changes: dict[str, Change]) -> bool:
        return bool(quantised(transformer, changes))

    def _report(self, fitted: Fit, expert: Expert | None) -> list[str]:
        where = f" in the {expert}-noise expert" if expert else ""
        return [f"{self.label}{where}: {line}" for line in fitted.report.lines()]


@dataclass(frozen=True)
class MergedLora(Lora):
    """Merged before anything quantises the weights; a step costs nothing more."""

    reason = "another model, on purpose; merged into the weights"
    slot = Slot.WEIGHTS
    mode = "merged"

    def apply(self, settings: Settings) -> Settings:
        return replace(settings, merges=True)

    def _runs_live(self, transformer: WanTransformer, changes: dict[str, Change]) -> bool:
        if packed := quantised(transformer, changes):
            raise WeightsError(
                f"{self.path} cannot be merged: {packed[0]} and {len(packed) - 1} others are quantised; take mode=live"
            )
        return False


@dataclass(frozen=True)
class LiveLora(Lora):
    """Beside the weights, with a strength that changes between requests."""

    reason = "another model, on purpose; beside the weights, its strength can change between requests"
    mode = "live"

    def _report(self, fitted: Fit, expert: Expert | None) -> list[str]:
        if fitted.is_dora:
            raise WeightsError(_dora(self.path, "take mode=merged"))
        return super()._report(fitted, expert)

    def _runs_live(self, transformer: WanTransformer, changes: dict[str, Change]) -> bool:
        return True


def _named_by(path: Path) -> frozenset[Expert]:
    """The experts that a file's own name speaks of."""
    return frozenset(cast("Expert", found.lower()) for found in _NAMED_EXPERT.findall(path.stem))


def _dora(path: str, way_out: str) -> str:
    return f"{path} is a DoRA, whose change depends on the weights, so it can only be merged: {way_out}"


# A plan's


def _loras(techniques: Iterable[Technique]) -> Iterator[Lora]:
    return (technique for technique in techniques if isinstance(technique, Lora))


def labels(techniques: Iterable[Technique]) -> dict[str, Lora]:
    """The LoRAs among techniques, by label, or by path where labels are the same."""
    loras = list(_loras(techniques))
    short = [lora.label for lora in loras]
    return {lora.label if short.count(lora.label) == 1 else lora.path: lora for lora in loras}


def find_loras(techniques: Iterable[Technique], name: str) -> list[Lora]:
    """Those that a label or a path names: two where one file is loaded for each expert.

    Raises:
        PlanError: none, or files of different folders that share the name.
    """
    known = labels(techniques)
    if name in known:
        return [known[name]]
    found = [lora for lora in known.values() if name in (lora.path, Path(lora.path).stem)]
    if not found:
        raise PlanError(f"no LoRA '{name}' is loaded." + (did_you_mean(name, known) if known else ""))
    if len({lora.path for lora in found}) > 1:
        raise PlanError(f"'{name}' is {' and '.join(lora.path for lora in found)}; give the path.")
    return found
