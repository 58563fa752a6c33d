"""What the page's inputs say, in the words of the HTTP interface; and back, from a record to the inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from swiftwan.errors import RequestError
from swiftwan.models.config import KnownModel
from swiftwan.pipelines.request import Grid

KINDS = {
    "Text to video": "TextToVideo",
    "Image to video": "ImageToVideo",
    "Video to video": "VideoToVideo",
    "Text to image": "TextToImage",
    "Image to image": "ImageToImage",
    "Blend": "Blend",
}
FILES = {
    "ImageToVideo": ("image", "last_image"),
    "VideoToVideo": ("video",),
    "ImageToImage": ("image",),
    "Blend": ("images",),
}
"""Fields of a task that hold files; what begins a video and what a picture starts from are two inputs of the page."""

PICTURES = ("TextToImage", "ImageToImage", "Blend")
WITH_CREATIVITY = ("VideoToVideo", "ImageToImage", "Blend")

DEFAULT, OWN = "Default", "Own"
HEIGHTS = {"240p": 240, "360p": 360, "480p": 480, "720p": 720}

FASTEST, PLAIN, CHOSEN = "As started", "Plain", "My own"
PLANS = [FASTEST, PLAIN, CHOSEN]


@dataclass(frozen=True)
class Inputs:
    """The values of the page's inputs, in the order of its components.

    Attributes:
        kind: a key of ``KINDS``.
        resolution: a key of ``HEIGHTS``, ``DEFAULT``, or ``OWN`` for ``width`` and ``height``.
        seed, weights: as typed; empty is unsaid.
        plan: one of ``PLANS``; ``techniques`` are the specs of CHOSEN, as typed.
    """

    kind: str
    prompt: str
    negative: str
    resolution: str
    width: float
    height: float
    frames: float
    fps: float
    steps: float
    guidance: float
    scheduler: str
    seed: str
    model: str
    creativity: float
    weights: str
    plan: str
    techniques: str

    @property
    def task(self) -> str:
        return KINDS[self.kind]

    @property
    def picture(self) -> bool:
        return self.task in PICTURES

    def said(self, known: KnownModel, grid: Grid) -> dict[str, Any]:
        """The body of a call, without its files.

        Raises:
            RequestError: the seed or a weight is no number.
        """
        said: dict[str, Any] = {"task": self.task, "model": self.model, "prompt": self.prompt}
        said |= {"num_inference_steps": int(self.steps), "guidance_scale": float(self.guidance)}
        said |= {"scheduler": self.scheduler, "fps": int(self.fps)} | self._size(known, grid)
        if self.negative.strip():
            said["negative_prompt"] = self.negative
        if not self.picture:
            said["num_frames"] = int(self.frames)
        if seed := self.seed.strip():
            if not seed.isdecimal():
                raise RequestError(f"seed is '{seed[:40]}'; it is a whole number, or empty to draw one.")
            said["seed"] = int(seed)
        if self.task in WITH_CREATIVITY:
            said["creativity"] = float(self.creativity)
        if self.task == "Blend" and self.weights.strip():
            said["weights"] = _numbers(self.weights)
        if self.plan != FASTEST:
            said["plan"] = self.techniques.split() if self.plan == CHOSEN else []
        return said

    def _size(self, known: KnownModel, grid: Grid) -> dict[str, int]:
        """Width and height on the model's grid; what is unsaid follows the image."""
        if self.resolution == OWN:
            return {"width": int(self.width), "height": int(self.height)}
        follows_image = self.task in ("ImageToVideo", "ImageToImage", "Blend")
        shape = known.defaults
        if self.resolution not in HEIGHTS:
            return {} if follows_image else {"width": shape.width, "height": shape.height}
        height = HEIGHTS[self.resolution] // grid.spatial * grid.spatial
        if follows_image:
            return {"height": height}
        return {"width": round(height * shape.width / shape.height / grid.spatial) * grid.spatial, "height": height}


def from_request(request: Mapping[str, Any], plan: str | Sequence[str], model: str) -> Inputs:
    """The inputs that say a completed request again.

    Args:
        request: as ``Request.to_json`` tells it.
        plan: a recipe's name or the specs that ran.
        model: one that the server has.
    """
    kinds = {task: kind for kind, task in KINDS.items()}
    weights = " ".join(f"{weight:g}" for weight in request.get("weights") or ())
    named = {"auto": FASTEST, "none": PLAIN}
    chosen = named.get(plan, FASTEST) if isinstance(plan, str) else CHOSEN if plan else PLAIN
    return Inputs(
        kind=kinds[request["task"]],
        prompt=request["prompt"],
        negative=request["negative_prompt"],
        resolution=OWN,
        width=request["width"],
        height=request["height"],
        frames=request["num_frames"],
        fps=request["fps"],
        steps=request["num_inference_steps"],
        guidance=request["guidance_scale"],
        scheduler=request["scheduler"],
        seed=str(request["seed"]),
        model=model,
        creativity=request.get("creativity", 0.6),
        weights=weights,
        plan=chosen,
        techniques="" if isinstance(plan, str) else " ".join(plan),
    )


NAMES = tuple(field.name for field in fields(Inputs))


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise RequestError(f"weights are '{text[:40]}'; they are numbers, one an image, for example '1 2'.") from None
