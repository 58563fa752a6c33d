"""How long a run took: the definitions of docs/measuring.md, from what the run itself recorded.

A run marks moments by device events (``swiftwan.pipelines.clock``), so nothing here costs it a sync.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from swiftwan.plan import Load


class Timed(Protocol):
    """What a timeline reads: ``Result``, or a peer's run.

    Attributes:
        frames: uint8 (F, H, W, 3).
        seconds: by phase, and ``total``.
        step_seconds: of each denoising step.
    """

    @property
    def frames(self) -> Tensor: ...
    @property
    def seconds(self) -> dict[str, float]: ...
    @property
    def step_seconds(self) -> tuple[float, ...]: ...


@dataclass(frozen=True)
class Timeline:
    """One run's efficiency.

    Attributes:
        clip_latency_seconds: from the request to its last frame on the host (t_end - t_start).
        frame_latency_seconds: clip latency / frames.
        throughput_frames_per_second: frames / clip latency.
        phase_seconds: text, denoise, decode and, where there is one, image.
        step_seconds: of each denoising step.
        step_median_seconds: their median, which a slow first step does not move.
        denoise_tflop_per_second: operations of the plain run's forwards / denoise time; None without a count.
            A technique that skips work shows the rate that the plain run would need to keep up.
    """

    clip_latency_seconds: float
    frame_latency_seconds: float
    throughput_frames_per_second: float
    phase_seconds: dict[str, float]
    step_seconds: tuple[float, ...]
    step_median_seconds: float
    denoise_tflop_per_second: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def timeline(run: Timed, load: Load | None = None) -> Timeline:
    """Compute a run's efficiency; ``load`` (``swiftwan.plan.estimate``) has the operations it came to."""
    total, frames = run.seconds["total"], len(run.frames)
    phases = {phase: seconds for phase, seconds in run.seconds.items() if phase != "total"}
    tflop = load.forwards * load.tflop_per_forward if load else None
    denoise = phases.get("denoise", 0.0)
    return Timeline(
        clip_latency_seconds=total,
        frame_latency_seconds=total / frames,
        throughput_frames_per_second=frames / total,
        phase_seconds=phases,
        step_seconds=tuple(run.step_seconds),
        step_median_seconds=median(run.step_seconds),
        denoise_tflop_per_second=tflop / denoise if tflop is not None and denoise > 0 else None,
    )
