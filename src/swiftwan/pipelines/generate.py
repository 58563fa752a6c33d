"""A whole run, from a request to a result: the file to read first."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from swiftwan.device import peak_bytes, versions
from swiftwan.pipelines.clock import Clock
from swiftwan.pipelines.request import Phase, Request, Result, StepEvent
from swiftwan.pipelines.stages import decode, denoise, encode_text, start_latents
from swiftwan.sampling import make_scheduler

if TYPE_CHECKING:
    from swiftwan.engine import Engine

OnStep = Callable[[StepEvent], None]


def text_to_video(engine: Engine, request: Request, on_step: OnStep | None) -> Result:
    """Run a completed, checked request; one frame makes a picture."""
    assert request.scheduler is not None
    assert request.num_inference_steps is not None
    assert request.flow_shift is not None
    assert request.seed is not None
    clock, progress = Clock(engine.torch_device), Progress(on_step)
    parts, plan = engine.parts, engine.plan

    text = encode_text(parts.text, request)
    clock.mark("text")
    progress.tell("text", 1)

    scheduler = make_scheduler(
        request.scheduler,
        num_inference_steps=request.num_inference_steps,
        flow_shift=request.flow_shift,
        device=engine.torch_device,
    )
    steps = len(scheduler.timesteps)

    def after_step() -> None:
        clock.mark("denoise")
        progress.tell("denoise", steps)

    noise = start_latents(engine.latent_shape(request), request.seed, engine.torch_device)
    latents = denoise(parts, plan.guide, scheduler, request, text, noise, after_step)

    def after_chunk() -> None:
        clock.mark("decode")
        progress.tell("decode", latents.shape[2])

    frames = decode(parts.vae, latents, plan.tiling, after_chunk)
    return Result(
        frames=frames,
        latents=latents.float().cpu(),
        seconds=clock.seconds(),
        step_seconds=clock.units("denoise"),
        peak_bytes=peak_bytes(engine.device),
        request=request,
        plan=plan.specs,
        model=engine.model_name,
        device=engine.device.name,
        dtype=engine.dtype_name,
        versions=versions(engine.device),
    )


class Progress:
    """Counts the units of each phase for the caller; costs nothing where nobody listens."""

    def __init__(self, on_step: OnStep | None) -> None:
        self.on_step = on_step
        self.done: dict[Phase, int] = {}
        self.began = time.perf_counter()

    def tell(self, phase: Phase, steps: int) -> None:
        self.done[phase] = self.done.get(phase, 0) + 1
        if self.on_step is not None:
            seconds = time.perf_counter() - self.began
            self.on_step(StepEvent(phase, self.done[phase], steps, seconds))
