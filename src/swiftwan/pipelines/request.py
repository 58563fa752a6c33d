"""What a user asks for, and what they get.

A request is frozen. Fields left at None take the model's official default when the engine completes it;
the completed request travels in the result and in the file, so that a run can be repeated.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from swiftwan.errors import RequestError, did_you_mean
from swiftwan.models.config import Defaults

if TYPE_CHECKING:
    from torch import Tensor

MAX_SEED = 2**63 - 1
MAX_STEPS = 1000
"""The models were trained on 1000 timesteps; there are no more to visit."""


@dataclass(frozen=True)
class Grid:
    """What a model's VAE and patches divide: the limits of sizes and frame counts."""

    spatial: int
    temporal: int

    def check_size(self, name: str, value: int) -> None:
        if value < self.spatial or value % self.spatial:
            low = max(self.spatial, value // self.spatial * self.spatial)
            raise RequestError(
                f"{name} is {value}; this model needs a multiple of {self.spatial}. "
                f"Nearest: {_either(low, low + self.spatial)}."
            )

    def check_frames(self, value: int) -> None:
        if value < 1 or (value - 1) % self.temporal:
            low = max(1, (value - 1) // self.temporal * self.temporal + 1)
            raise RequestError(
                f"num_frames is {value}; Wan needs {self.temporal}k + 1. Nearest: {_either(low, low + self.temporal)}."
            )


def _either(low: int, high: int) -> str:
    return f"{low} or {high}"


@dataclass(frozen=True)
class Request:
    """The fields every task shares. Use one of its subclasses.

    Args:
        prompt: what to show, in plain words.
        negative_prompt: what to steer away from; None is the model's official one, "" is none.
        width, height: pixels.
        num_frames: 4k + 1.
        fps: frames per second of the written file.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 turns it off and halves the work.
        guidance_scale_2: the same for the low-noise expert of two-expert models.
        flow_shift: how far the noise schedule leans towards high noise.
        scheduler: unipc, euler, heun, dpm++ or lcm.
        seed: of the noise; None draws one, which the result records.
    """

    prompt: str
    _: KW_ONLY
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    flow_shift: float | None = None
    scheduler: str | None = None
    seed: int | None = None

    def completed(self, defaults: Defaults) -> Self:
        """Return this request with every None replaced by the model's default, and a seed drawn."""
        missing: dict[str, Any] = {
            f.name: getattr(defaults, f.name)
            for f in fields(self)
            if hasattr(defaults, f.name) and getattr(self, f.name) is None
        }
        if self.seed is None:
            missing["seed"] = secrets.randbelow(2**31)
        return replace(self, **missing)

    def check(self, grid: Grid, *, experts: int) -> None:
        """Raise RequestError for the first value of this completed request that the model cannot take."""
        if not self.prompt.strip():
            raise RequestError("prompt is empty; say what to show, for example 'a red circle moves left'.")
        assert self.width is not None
        assert self.height is not None
        assert self.num_frames is not None
        grid.check_size("width", self.width)
        grid.check_size("height", self.height)
        grid.check_frames(self.num_frames)
        _within("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        _within("fps", self.fps, 1, 240)
        _within("guidance_scale", self.guidance_scale, 0, 100)
        _within("flow_shift", self.flow_shift, 0.01, 100)
        _within("seed", self.seed, 0, MAX_SEED)
        if self.guidance_scale_2 is not None:
            _within("guidance_scale_2", self.guidance_scale_2, 0, 100)
            if experts == 1:
                raise RequestError(
                    f"guidance_scale_2 is {self.guidance_scale_2}, but this model has one transformer; "
                    "it is for the low-noise expert of Wan2.2 A14B. Leave it out."
                )

    def to_json(self) -> dict[str, Any]:
        """Return the task's name and every field that is set."""
        return {"task": type(self).__name__} | {k: v for k, v in asdict(self).items() if v is not None}


def _within(name: str, value: float | None, low: float, high: float) -> None:
    if value is None or not low <= value <= high:  # NaN fails the comparison too
        raise RequestError(f"{name} is {value}; allowed: {low} to {high}.")


@dataclass(frozen=True)
class TextToVideo(Request):
    """A video from words."""


@dataclass(frozen=True)
class TextToImage(Request):
    """One picture from words: a video of one frame, for which Wan has a path of its own."""

    num_frames: Literal[1] = 1


TASKS: dict[str, type[Request]] = {task.__name__: task for task in (TextToVideo, TextToImage)}


def request_from_json(values: Mapping[str, Any]) -> Request:
    """Rebuild a request from :meth:`Request.to_json`.

    Raises:
        RequestError: unknown task or field.
    """
    options = dict(values)
    task = TASKS.get(str(options.pop("task", "")))
    if task is None:
        raise RequestError(f"task is {values.get('task')!r}." + did_you_mean(str(values.get("task")), TASKS))
    known = {f.name for f in fields(task)}
    for name in options:
        if name not in known:
            raise RequestError(f"{task.__name__} has no field '{name}'." + did_you_mean(name, known))
    return task(**options)


Phase = Literal["text", "denoise", "decode"]


@dataclass(frozen=True)
class StepEvent:
    """Progress, told after each unit of work: one text encoding, one denoising step, one decoded chunk.

    Attributes:
        phase: where the run is.
        step, steps: how many units of this phase are done, and how many there are.
        seconds: time since the run began (host clock; no device sync).
    """

    phase: Phase
    step: int
    steps: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """A finished run, with all that is needed to believe and to repeat it.

    Attributes:
        frames: uint8 (F, H, W, 3), on the CPU.
        latents: float32 (1, C, f, h, w), normalised, before VAE decode, on the CPU.
        seconds: wall time by stage: text, denoise, decode, total.
        step_seconds: time of each denoising step.
        peak_bytes: peak device memory (torch's allocator); on a CPU the peak of the process.
        request: completed, so that running it again gives the same frames on the same machine.
        plan: the technique specs that ran, in order of application.
        model, device, dtype: what ran where.
        versions: of swiftwan and the libraries that shape the numbers.
    """

    frames: Tensor
    latents: Tensor
    seconds: dict[str, float]
    step_seconds: tuple[float, ...]
    peak_bytes: int
    request: Request
    plan: tuple[str, ...]
    model: str
    device: str
    dtype: str
    versions: dict[str, str]

    def record(self) -> dict[str, Any]:
        """What travels inside the file: all that decides its pixels, nothing that changes from run to run."""
        return {
            "model": self.model,
            "request": self.request.to_json(),
            "plan": list(self.plan),
            "device": self.device,
            "dtype": self.dtype,
            "versions": self.versions,
        }

    def save(self, path: str | Path, *, quality: int = 8) -> Path:
        """Write an .mp4 (H.264) or, for one frame, a .png; whole or not at all.

        Args:
            path: where to; its folder must exist.
            quality: 1 (small) to 10 (visually lossless), as in diffusers' export_to_video.

        Raises:
            OutputError: the ending is not known, or the file cannot be written.
        """
        from swiftwan import media

        assert self.request.fps is not None
        return media.write(Path(path), self.frames, fps=self.request.fps, quality=quality, record=self.record())
