"""Step-distilled models: a LoRA, and the schedule that it was trained for."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

from swiftwan.errors import PlanError, WeightsError, did_you_mean
from swiftwan.models.config import POCKET
from swiftwan.sampling import SCHEDULERS, FewStep
from swiftwan.techniques.base import Settings, Slot, Technique
from swiftwan.techniques.lora import Lora, MergedLora, shipped
from swiftwan.weights.lora import LoraFile

if TYPE_CHECKING:
    from swiftwan.models.config import KnownModel
    from swiftwan.weights.build import Parts

RECIPES: dict[str, FewStep] = {
    # github.com/ModelTC/LightX2V, configs/distill/wan21 and wan/step_distill/scheduler.py: fresh noise at each step
    "lightx2v": FewStep(4, "lcm", 5.0),
    # the same for Wan2.2, whose scheduler goes straight on; the second expert takes the last two steps
    "lightning": FewStep(4, "euler", 5.0),
    # github.com/hao-ai-lab/FastVideo, DmdDenoisingStage: timesteps 1000, 757, 522
    "fastwan": FewStep(3, "lcm", 8.0, (1.0, 0.757, 0.522)),
    # github.com/NVlabs/rcm and thu-ml/TurboDiffusion: angles, of which sin / (sin + cos) is noise
    "rcm": FewStep(4, "lcm", 5.0, tuple(1 / (1 + 1 / math.tan(angle)) for angle in (math.atan(80), 1.5, 1.4, 1.0))),
    # github.com/ModelTC/LightX2V, configs/causvid and wan/causvid/scheduler.py: timesteps of the 14B student
    "causvid": FewStep(9, "euler", 8.0, (0.999, 0.934, 0.862, 0.756, 0.603, 0.41, 0.25, 0.14, 0.074)),
}
"""How the published distillations are sampled, by family."""

_FAMILIES = (
    (r"lightning|(?=.*wan[_.-]?2[_.]?2)(?=.*lightx2v)", "lightning"),
    (r"lightx2v|self[_-]?forcing", "lightx2v"),
    (r"fast[_-]?wan", "fastwan"),
    (r"rcm|turbo[_-]?(?:wan|diffusion)", "rcm"),
    (r"causvid", "causvid"),
)
"""What a file's name says about its family; the first that fits."""

METADATA_KEY = "swiftwan.few_step"
"""Where ``swiftwan train distill`` writes the schedule into a LoRA's header, as JSON of :class:`FewStep`'s fields."""

_SHIPPED = (4, 8)
_OPTIONS = re.compile(r":(?=recipe=|steps=)|,(?=recipe=|steps=)")


def to_metadata(few_step: FewStep) -> str:
    """JSON for a LoRA's header."""
    return json.dumps(vars(few_step))


def from_metadata(text: str, path: Path) -> FewStep:
    """What :func:`to_metadata` wrote.

    Raises:
        WeightsError: it is not a schedule.
    """
    try:
        values = json.loads(text)
        found = FewStep(
            int(values["steps"]),
            str(values["scheduler"]),
            float(values["flow_shift"]),
            tuple(map(float, values.get("levels", ()))),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        raise WeightsError(f"{path}: its header's {METADATA_KEY} is no schedule ({problem}); give recipe=") from problem
    falls = all(a > b for a, b in zip((1.0 + 1e-9, *found.levels), (*found.levels, 0.0), strict=True))
    if found.steps < 1 or found.flow_shift <= 0 or found.scheduler not in SCHEDULERS or not falls:
        raise WeightsError(f"{path}: its header's {METADATA_KEY} is no schedule: {text}; give recipe=")
    return found


def _student(steps: int) -> Path:
    return shipped(f"few_step_{steps}")


@dataclass(frozen=True)
class FewStepModel(Technique):
    """``few-step[:FILE.safetensors[=STRENGTH][:expert=high|low|both]][:recipe=NAME][:steps=N]``: a step-distilled LoRA,
    merged, with its schedule and without guidance.

    Alone it is the embedded model's own, with 4 or 8 steps. With a recipe alone it is the schedule, for a checkpoint
    that is distilled itself, or for a LoRA that is loaded live. What a request says itself stands above the recipe.

    Attributes:
        lora: None where the weights are distilled already.
        recipe: a name of :data:`RECIPES`; empty finds it in the file's header, or by the file's name.
        steps: instead of the recipe's; 0 leaves them.
    """

    lora: Lora | None
    recipe: str = ""
    steps: int = 0

    name = "few-step"
    kind = "retrained"
    reason = "a student that jumps where its teacher walks, with guidance learned"
    slot = Slot.WEIGHTS
    claims = ()
    refuses = MappingProxyType(
        {
            "guided": "a few-step model runs without guidance, so there is none to change; drop one",
            "steps-reused": "a few steps differ too much to reuse one for the next; drop one",
        }
    )

    @classmethod
    def read(cls, text: str) -> Self:
        file, *options = _OPTIONS.split(f":{text}" if text else "")
        given: dict[str, str] = {}
        for option in options:
            key, _, value = option.partition("=")
            given[key] = value
        recipe = given.get("recipe", "")
        if recipe and recipe not in RECIPES:
            raise PlanError(f"few-step: there is no recipe '{recipe}'." + did_you_mean(recipe, RECIPES))
        try:
            steps = int(given.get("steps", 0))
        except ValueError:
            raise PlanError(f"few-step: steps is '{given['steps']}'; it must be a number.") from None
        if "steps" in given and steps < 1:
            raise PlanError(f"few-step: steps is {steps}; it is 1 or more.")
        if file := file.removeprefix(":"):
            lora = Lora.read(file)
            if lora.mode == "live":
                raise PlanError(f"few-step merges its LoRA; for a live one: lora:{file} few-step:recipe=NAME.")
            return cls(MergedLora(lora.path, lora.strength, lora.expert), recipe, steps)
        if recipe:
            return cls(None, recipe, steps)
        if (steps or _SHIPPED[0]) not in _SHIPPED:
            known = " or ".join(map(str, _SHIPPED))
            raise PlanError(f"few-step: steps is {steps}; the embedded model's own LoRAs are for {known}.")
        return cls(MergedLora(str(_student(steps or _SHIPPED[0]))), "", steps)

    @property
    def spec(self) -> str:
        words = [self.name]
        if self.lora and not self._is_shipped:
            words.append(Lora(self.lora.path, self.lora.strength, self.lora.expert).spec.removeprefix("lora:"))
        words += [f"recipe={self.recipe}"] * bool(self.recipe) + [f"steps={self.steps}"] * bool(self.steps)
        return ":".join(words)

    @property
    def _is_shipped(self) -> bool:
        return self.lora is not None and Path(self.lora.path) in map(_student, _SHIPPED)

    def schedule(self) -> tuple[FewStep, str]:
        """The schedule, and what says that it is this one.

        Raises:
            WeightsError: nothing does, or the file cannot be read.
        """
        if self.lora is None or self.recipe:
            found, source = RECIPES[self.recipe], f"recipe {self.recipe}"
        else:
            found, source = _find(LoraFile.open(Path(self.lora.path).expanduser()))
        return (replace(found, steps=self.steps) if self.steps else found), source

    def unreadable(self) -> str:
        try:
            self.schedule()
        except WeightsError as problem:
            return str(problem)
        return self.lora.unreadable() if self.lora else ""

    def conflict(self, other: Technique) -> str:
        if isinstance(other, FewStepModel):
            if self.lora is None or other.lora is None or (self.recipe, self.steps) != (other.recipe, other.steps):
                return "two schedules: drop one, or give both files the same recipe and steps"
            return self.lora.conflict(other.lora)
        return super().conflict(other)

    def fit(self, model: KnownModel) -> list[str]:
        if self._is_shipped and model.transformer != POCKET.transformer:
            raise PlanError(
                f"no few-step LoRA for '{model.name}' comes with swiftwan; give one: few-step:FILE.safetensors"
            )
        schedule, source = self.schedule()
        levels = ", ".join(f"{1000 * level:.0f}" for level in schedule.levels_for(schedule.steps, schedule.flow_shift))
        told = f"sets {schedule.steps} steps of {schedule.scheduler} at timesteps {levels}, no guidance ({source})"
        return [told, *(self.lora.fit(model) if self.lora else ())]

    def apply(self, settings: Settings) -> Settings:
        settings = replace(settings, few_step=self.schedule()[0])
        return self.lora.apply(settings) if self.lora else settings

    def install(self, parts: Parts) -> None:
        if self.lora:
            self.lora.install(parts)


def _find(file: LoraFile) -> tuple[FewStep, str]:
    if text := file.metadata.get(METADATA_KEY):
        return from_metadata(text, file.path), "from the file's header"
    for pattern, family in _FAMILIES:
        if re.search(pattern, file.path.stem, re.IGNORECASE):
            return RECIPES[family], f"recipe {family}, by the file's name"
    known = ", ".join(RECIPES)
    raise WeightsError(f"{file.path} does not say how it is sampled; add recipe=NAME, one of {known}")
