"""What a user asks for, and what they get.

A request is frozen. Fields left at None take the model's official default when the engine completes it;
the completed request travels in the result and in the file, so that a run can be repeated.

Images and videos are paths, which travel in the file with it, or PIL images, of which only a hash does.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, MISSING, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from swiftwan.errors import RequestError, did_you_mean
from swiftwan.models.config import Defaults, KnownModel

if TYPE_CHECKING:
    from PIL.Image import Image

    ImageSource = str | Path | Image

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

    def check_model(self, model: KnownModel) -> None:
        """Raise RequestError where the model cannot do this task at all, naming one that can."""
        if model.image_start == "channels":
            raise RequestError(
                f"'{model.name}' makes videos from an image, and this is {type(self).__name__}: give ImageToVideo "
                "(--image, and an .mp4), or take a text-to-video model, for example 'wan2.1-t2v-1.3b'."
            )

    @property
    def steps_to_run(self) -> int:
        """How many of a completed request's steps run."""
        assert self.num_inference_steps is not None
        return self.num_inference_steps

    def sources(self) -> dict[str, Any]:
        """The images that the request brings, by the name of their field."""
        return {}

    @property
    def brings_pixels(self) -> bool:
        """Whether an image or a video comes with it."""
        return bool(self.sources())

    def to_json(self) -> dict[str, Any]:
        """Return the task's name and every field that is set; of an image in memory its hash."""
        told = {f.name: _plain(value) for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return {"task": type(self).__name__} | told


# Tasks


@dataclass(frozen=True)
class TextToVideo(Request):
    """A video from words."""


@dataclass(frozen=True, kw_only=True)
class TextToImage(Request):
    """One picture from words: a video of one frame, for which Wan has a path of its own."""

    num_frames: Literal[1] = 1


@dataclass(frozen=True, kw_only=True)
class ImageToVideo(Request):
    """A video that begins with an image.

    Args:
        image: its first frame. Cropped to the video's aspect, evenly on both sides, where they differ.
        last_image: its last frame, for models that know one: Wan2.1-FLF2V, and Wan2.2-I2V-A14B.
    """

    image: ImageSource
    last_image: ImageSource | None = None

    def check(self, grid: Grid, *, experts: int) -> None:
        super().check(grid, experts=experts)
        if self.num_frames == 1:
            raise RequestError(
                f"num_frames is 1, and ImageToVideo's first frame is its image; take {grid.temporal + 1} or more, "
                "or ImageToImage with a creativity."
            )

    def check_model(self, model: KnownModel) -> None:
        if model.image_start is None:
            raise RequestError(
                f"'{model.name}' cannot begin a video with an image; take one that can: 'wan2.1-i2v-14b-480p', "
                "'wan2.2-i2v-a14b', 'wan2.2-ti2v-5b' or 'pocket'. ImageToImage and VideoToVideo run on this one."
            )
        if self.last_image is not None and model.image_end == "never":
            raise RequestError(
                f"'{model.name}' knows no last image; leave it out, or take 'wan2.1-flf2v-14b' or 'wan2.2-i2v-a14b'."
            )
        if self.last_image is None and model.image_end == "always":
            raise RequestError(
                f"'{model.name}' goes from a first image to a last one; give last_image (--last-image) too, or take "
                "'wan2.1-i2v-14b-720p'."
            )

    def sources(self) -> dict[str, Any]:
        last = {} if self.last_image is None else {"last_image": self.last_image}
        return {"image": self.image, **last}


@dataclass(frozen=True, kw_only=True)
class _FromPixels(Request):
    """What starts from given latents, part of the way up the noise schedule (SDEdit, arXiv 2108.01073)."""

    creativity: float

    def check(self, grid: Grid, *, experts: int) -> None:
        super().check(grid, experts=experts)
        _within("creativity", self.creativity, 0, 1)

    @property
    def steps_to_run(self) -> int:
        """How many of the schedule's last steps run; at least one unless creativity is 0."""
        assert self.num_inference_steps is not None
        steps = int(round(self.num_inference_steps * self.creativity, 6))  # 0.29 x 100 is 28.99... in floats
        return steps if self.creativity == 0 else max(1, steps)


@dataclass(frozen=True, kw_only=True)
class ImageToImage(_FromPixels):
    """A picture from a picture and words.

    Args:
        image: where to start.
        creativity: how far up the noise schedule the image starts: 0 gives it back through the VAE, 1 ignores it.
    """

    image: ImageSource
    creativity: float = 0.6
    num_frames: Literal[1] = 1

    def sources(self) -> dict[str, Any]:
        return {"image": self.image}


@dataclass(frozen=True, kw_only=True)
class Blend(_FromPixels):
    """A picture from several pictures and words: the weighted mean of their latents, denoised.

    Args:
        images: two or more, of one size.
        weights: one an image, 0 or more; None weighs them alike. Only their ratios count.
        creativity: as in ImageToImage.
    """

    images: tuple[ImageSource, ...]
    weights: tuple[float, ...] | None = None
    creativity: float = 0.6
    num_frames: Literal[1] = 1

    def __post_init__(self) -> None:
        # A list, as JSON has it, would leave a frozen request open to change.
        object.__setattr__(self, "images", tuple(self.images))
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(self.weights))

    def check(self, grid: Grid, *, experts: int) -> None:
        super().check(grid, experts=experts)
        if len(self.images) < 2:
            raise RequestError(
                f"a blend of {len(self.images)} image; it takes two or more. For one, ImageToImage with a creativity."
            )
        if self.weights is None:
            return
        if len(self.weights) != len(self.images):
            raise RequestError(f"{len(self.weights)} weights for {len(self.images)} images; give one an image.")
        for weight in self.weights:
            _within("a weight", weight, 0, 1_000_000)
        if sum(self.weights) == 0:
            raise RequestError(f"the weights {self.weights} sum to zero; make at least one larger than 0.")

    def sources(self) -> dict[str, Any]:
        return {f"image {number}": image for number, image in enumerate(self.images, 1)}


@dataclass(frozen=True, kw_only=True)
class VideoToVideo(_FromPixels):
    """A video from a video and words.

    Args:
        video: an .mp4, .mov, .mkv, .webm or .avi file, or a sequence of PIL images.
        creativity: as in ImageToImage.
    """

    video: str | Path | Sequence[Image]
    creativity: float = 0.6

    def __post_init__(self) -> None:
        if not isinstance(self.video, str | Path):
            object.__setattr__(self, "video", tuple(self.video))

    @property
    def brings_pixels(self) -> bool:
        return True


TASKS: dict[str, type[Request]] = {
    task.__name__: task for task in (TextToVideo, ImageToVideo, TextToImage, ImageToImage, Blend, VideoToVideo)
}


def request_from_json(values: Mapping[str, Any]) -> Request:
    """Rebuild a request from :meth:`Request.to_json`.

    Raises:
        RequestError: unknown task or field, a value of the wrong type, or one that is needed and not there.
    """
    options = dict(values)
    task = TASKS.get(str(options.pop("task", "")))
    if task is None:
        raise RequestError(f"task is {values.get('task')!r}." + did_you_mean(str(values.get("task")), TASKS))
    known = {f.name: f for f in fields(task)}
    for name in options:
        if name not in known:
            raise RequestError(f"{task.__name__} has no field '{name}'." + did_you_mean(name, known))
        _check_type(name, options[name])
    needed = [f.name for f in known.values() if f.default is MISSING]
    if missing := [name for name in needed if name not in options]:
        raise RequestError(
            f"{task.__name__} needs {' and '.join(missing)}; give {'it' if len(missing) == 1 else 'them'}."
        )
    return task(**options)


# Values


def _within(name: str, value: float | None, low: float, high: float) -> None:
    if value is None or not low <= value <= high:  # NaN fails the comparison too
        least, most = (str(limit) if isinstance(limit, int) else f"{limit:g}" for limit in (low, high))
        raise RequestError(f"{name} is {value}; allowed: {least} to {most}.")


_MEMORY = "memory:"


def _plain(value: Any) -> Any:
    """What JSON holds of a field's value."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, Path):
        return str(value)
    return _MEMORY + hashlib.sha256(value.tobytes()).hexdigest()[:16]


def _check_type(name: str, value: object) -> None:
    """A file's values may be of any type; a bool counts as no number."""
    wanted = _NUMBERS.get(name, (str,))
    if name in ("images", "weights"):
        if not isinstance(value, list | tuple):
            raise RequestError(f"{name} is {value!r}; it must be a list.")
        for item in value:
            _check_type("weight" if name == "weights" else "image", item)
        return
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise RequestError(f"{name} is {value!r}; it must be {_WORDS[wanted]}.")
    if isinstance(value, str) and value.startswith(_MEMORY) and name in ("image", "last_image", "video"):
        raise RequestError(f"{name} was given in memory ('{value}'), so no file holds it; give one.")


_NUMBERS: dict[str, tuple[type, ...]] = dict.fromkeys(
    ("width", "height", "num_frames", "fps", "num_inference_steps", "seed"), (int,)
) | dict.fromkeys(("guidance_scale", "guidance_scale_2", "flow_shift", "creativity", "weight"), (int, float))

_WORDS: dict[tuple[type, ...], str] = {(str,): "text", (int,): "a whole number", (int, float): "a number"}
