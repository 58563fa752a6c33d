"""A whole run, from a request to a result: the file to read first."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swiftwan.device import peak_bytes, versions
from swiftwan.inputs import read
from swiftwan.pipelines.clock import Clock
from swiftwan.pipelines.request import Request
from swiftwan.pipelines.result import Origin, Out, Phase, Result, StepEvent
from swiftwan.pipelines.stages import decode, denoise, denoise_progressively, encode_image, encode_text, schedule
from swiftwan.pipelines.start import Material, begin, draw_noise

if TYPE_CHECKING:
    from swiftwan.engine import Engine

OnStep = Callable[[StepEvent], None]


def generate(engine: Engine, request: Request, on_step: OnStep | None, out: Out | None = None) -> Result:
    """Run a completed, checked request of any task; one frame makes a picture."""
    assert request.seed is not None
    parts, plan = engine.parts, engine.plan
    progress = Progress(engine.torch_device, on_step)

    scheduler = schedule(request, plan.settings.few_step, engine.torch_device)
    noise = draw_noise(engine.latent_shape(request), request.seed, engine.torch_device)

    given = read(request)
    parts.enter("vae")
    start = begin(Material(parts, request, given, noise, scheduler, plan.tiling))
    image = encode_image(parts.image_encoder, request, given)
    if given is not None:
        progress.tell("image", 1)

    parts.enter("text_encoder")
    text = encode_text(parts.text, request, image)
    progress.tell("text", 1)

    progressive = plan.settings.progressive
    walk = denoise if progressive is None else partial(denoise_progressively, progressive)
    steps = len(start.timesteps)
    latents = walk(
        parts, plan.guide, scheduler, request, text, start, lambda *reached: progress.tell("denoise", steps, *reached)
    )
    parts.enter("vae")
    chunks = -(-latents.shape[2] // parts.vae.latent_frames_at_once(latents))
    origin = Origin(
        request=request,
        inputs=given.inputs if given else (),
        plan=plan.specs,
        model=engine.model_name,
        device=engine.device.name,
        dtype=engine.dtype_name,
        versions=versions(engine.device),
    )
    with out.writing(origin) if out else nullcontext(lambda frames: None) as write:

        def after_chunk(frames: Tensor) -> None:
            write(frames)
            progress.tell("decode", chunks)

        frames = decode(parts.vae, latents, plan.tiling, after_chunk)

    return Result(
        frames=frames,
        latents=latents.float().cpu(),
        seconds=progress.clock.seconds(),
        step_seconds=progress.clock.units("denoise"),
        peak_bytes=peak_bytes(engine.device),
        **vars(origin),
    )


class Progress:
    """Times the units of each phase, and tells them to the caller, if one listens."""

    def __init__(self, device: torch.device, on_step: OnStep | None) -> None:
        self.clock = Clock(device)
        self.on_step = on_step
        self.done: dict[Phase, int] = {}
        self.began = time.perf_counter()

    def tell(self, phase: Phase, steps: int, latents: Tensor | None = None, timestep: float | None = None) -> None:
        """A unit of ``phase``, of which there are ``steps``, has just ended and left ``latents`` at ``timestep``."""
        self.clock.mark(phase)
        self.done[phase] = self.done.get(phase, 0) + 1
        if self.on_step is not None:
            seconds = time.perf_counter() - self.began
            self.on_step(StepEvent(phase, self.done[phase], steps, seconds, latents, timestep))
