"""What a run tells while it goes on, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from swiftwan import media
from swiftwan.inputs import Input
from swiftwan.pipelines.request import Request

if TYPE_CHECKING:
    from torch import Tensor

Phase = Literal["image", "text", "denoise", "decode"]


@dataclass(frozen=True)
class StepEvent:
    """Progress, told after each unit of work: the images or one text encoded, one denoising step, one decoded chunk.

    Attributes:
        phase: where the run is.
        step, steps: how many units of this phase are done, and how many there are.
        seconds: time since the run began (host clock; no device sync).
        latents: of a denoising step, what it left: (1, C, f, h, w) on the run's device, whose work on them may still
            be in its queue; to be read, not changed. None in other phases.
        timestep: how noisy these latents are, from 1000 (noise alone) to 0 (none).
    """

    phase: Phase
    step: int
    steps: int
    seconds: float
    latents: Tensor | None = field(default=None, compare=False, repr=False)
    timestep: float | None = None


@dataclass(frozen=True, kw_only=True)
class Origin:
    """All that decides a result's pixels.

    Attributes:
        request: completed, so that running it again gives the same frames on the same machine.
        inputs: the images or the video that the request brought, and how each was fitted.
        plan: the technique specs that ran, in order of application.
        model, device, dtype: what ran where.
        versions: of swiftwan and the libraries that shape the numbers.
    """

    request: Request
    inputs: tuple[Input, ...] = ()
    plan: tuple[str, ...]
    model: str
    device: str
    dtype: str
    versions: dict[str, str]

    def record(self) -> dict[str, Any]:
        """What travels inside the file: nothing in it changes from run to run."""
        inputs = {"inputs": [vars(given) for given in self.inputs]} if self.inputs else {}
        return {
            "model": self.model,
            "request": self.request.to_json(),
            **inputs,
            "plan": list(self.plan),
            "device": self.device,
            "dtype": self.dtype,
            "versions": self.versions,
        }


@dataclass(frozen=True)
class Out:
    """A file to write a result to while its frames are decoded; ``quality`` as in :meth:`Result.save`."""

    path: Path
    quality: int = 8

    def check(self, request: Request) -> None:
        """Raise OutputError before the run for what is already known to fail after it."""
        media.check_writable(self.path, **_size(request))

    def writing(self, origin: Origin) -> AbstractContextManager[Callable[[Tensor], None]]:
        """Takes the frames in pieces; the file is the one that :meth:`Result.save` would write."""
        request = origin.request
        assert request.fps is not None
        record = origin.record()
        return media.writing(self.path, **_size(request), fps=request.fps, quality=self.quality, record=record)


def _size(request: Request) -> dict[str, int]:
    assert request.num_frames is not None
    assert request.height is not None
    assert request.width is not None
    return {"num_frames": request.num_frames, "height": request.height, "width": request.width}


@dataclass(frozen=True, kw_only=True)
class Result(Origin):
    """A finished run, with all that is needed to believe and to repeat it.

    Attributes:
        frames: uint8 (F, H, W, 3), on the CPU.
        latents: float32 (1, C, f, h, w), normalised, before VAE decode, on the CPU.
        seconds: wall time by stage: image (where the request brings one), text, denoise, decode, total.
        step_seconds: time of each denoising step.
        peak_bytes: peak device memory (torch's allocator); on a CPU the peak of the process.
    """

    frames: Tensor
    latents: Tensor
    seconds: dict[str, float]
    step_seconds: tuple[float, ...]
    peak_bytes: int

    def save(self, path: str | Path, *, quality: int = 8) -> Path:
        """Write an .mp4 (H.264) or, for one frame, a .png; whole or not at all.

        Args:
            path: where to; its folder must exist.
            quality: 1 (small) to 10 (visually lossless), as in diffusers' export_to_video.

        Raises:
            OutputError: the ending is not known, or the file cannot be written.
        """
        assert self.request.fps is not None
        return media.write(Path(path), self.frames, fps=self.request.fps, quality=quality, record=self.record())
