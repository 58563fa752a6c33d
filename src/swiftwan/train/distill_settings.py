"""What decides a distillation's result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from swiftwan.errors import RequestError
from swiftwan.models.config import KnownModel
from swiftwan.sampling import FewStep
from swiftwan.train.distill import Phases
from swiftwan.weights.lora_write import check_form

FOR_SMALL = {
    "rank": 10,
    "batch": 128,
    "walks": 4096,
    "regression": 1200,
    "consistency": 800,
    "learning_rate": 3e-3,
}
"""What made the embedded model's 4-step student: 161 s on an H200."""

FOR_LARGE = {"rank": 32, "batch": 1, "walks": 0, "regression": 300, "consistency": 500, "learning_rate": 1e-4}
"""What others take for LoRAs of this kind; no student of a published model was made with it yet."""


@dataclass(frozen=True)
class Settings:
    """What decides a run's result; another value is another run.

    Attributes:
        steps: of the student.
        flow_shift, guidance_scale: of the teacher's walk, and the first also of the student's schedule.
        walk: the teacher's steps, a multiple of the student's.
        rank: of the LoRA.
        batch: clips of a step.
        walks: so many prompts the teacher walks for, the last ones; 0 is all.
        regression, consistency, matching: updates of each stage.
        learning_rate: of the first two stages; ``matching`` takes a third.
        expert: which transformer of a two-expert model learns; it owns the phases that begin at its levels.
        boundary: the lowest level of the high-noise expert.
        guidance_scale_2: of the low-noise expert.
        format: of the file, as ``weights.lora_write`` has them.
    """

    steps: int
    flow_shift: float
    guidance_scale: float
    walk: int
    rank: int
    batch: int
    walks: int
    regression: int
    consistency: int
    matching: int
    learning_rate: float
    seed: int
    expert: Literal["", "high", "low"] = ""
    boundary: float = 0.0
    guidance_scale_2: float = 1.0
    format: str = "diffusers"

    def __post_init__(self) -> None:
        check_form(self.format)
        for name in ("steps", "rank", "batch"):
            if (value := getattr(self, name)) < 1:
                raise RequestError(f"{name} is {value}; it must be at least 1.")
        for name in ("regression", "consistency", "matching", "walks"):
            if (value := getattr(self, name)) < 0:
                what = "walks" if name == "walks" else "updates"
                raise RequestError(f"{name} is {value}; it is a number of {what}, 0 or more.")
        if self.walk < self.steps or self.walk % self.steps:
            near = max(1, round(self.walk / self.steps)) * self.steps
            raise RequestError(f"walk is {self.walk}; it must be a multiple of steps, {self.steps}: take {near}.")
        if not 0 < self.learning_rate < 1:
            raise RequestError(f"learning rate is {self.learning_rate}; it must be between 0 and 1.")
        if not 0.01 <= self.flow_shift <= 100:
            raise RequestError(f"flow shift is {self.flow_shift}; it must be from 0.01 to 100.")
        if not 0 <= self.guidance_scale <= 100:
            raise RequestError(f"guidance is {self.guidance_scale}; it must be from 0 to 100.")
        if not self.own:
            raise RequestError(
                f"none of {self.steps} steps begins at the {self.expert}-noise expert's levels ({self.boundary:g} and "
                f"{'above' if self.expert == 'high' else 'below'}); take more steps, or another shift."
            )

    @property
    def phases(self) -> Phases:
        return Phases.of(self.steps, self.flow_shift, self.walk)

    @property
    def own(self) -> range:
        """The phases that the student learns."""
        begins = self.phases.edges[:-1]
        high = sum(level >= self.boundary for level in begins)
        return {"": range(len(begins)), "high": range(high), "low": range(high, len(begins))}[self.expert]

    @property
    def few_step(self) -> FewStep:
        """How the student is to be sampled."""
        return FewStep(self.steps, "euler", self.flow_shift)


def refuse_unfit(model: KnownModel, expert: str) -> None:
    """Raise RequestError for a model that this cannot distill, before anything loads."""
    wanted = ("high", "low") if model.boundary_ratio else ("",)
    if expert not in wanted and model.boundary_ratio:
        raise RequestError(f"'{model.name}' has two transformers: give --expert high, and in another run --expert low.")
    if expert not in wanted:
        raise RequestError(f"--expert is '{expert}', and '{model.name}' has one transformer: leave it out.")
    if model.image_start == "channels":
        raise RequestError(
            f"'{model.name}' makes videos from images, and train distill has prompts alone; take a text-to-video one, "
            "for example wan2.1-t2v-1.3b."
        )
