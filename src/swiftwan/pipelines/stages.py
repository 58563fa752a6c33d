"""The stages of a run. Each can run alone; what one returns is what the next takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from swiftwan.guidance import Embeddings, Guide
from swiftwan.inputs import Given
from swiftwan.models.clip import ImageEncoder
from swiftwan.models.dit import WanTransformer
from swiftwan.models.text import TextEncoder
from swiftwan.models.vae import Tiling, WanVAE
from swiftwan.pipelines.request import ImageToVideo, Request
from swiftwan.pipelines.start import Start
from swiftwan.progressive import Progressive, Watched
from swiftwan.sampling import FewStep, make_scheduler
from swiftwan.weights.build import Parts

TRAIN_TIMESTEPS = 1000


# Text and image


def encode_text(text: TextEncoder, request: Request, image: Tensor | None) -> Embeddings:
    """Encode the prompt and, where guidance uses it, the negative prompt; ``image`` are CLIP tokens to go with them.

    Raises:
        RequestError: either is longer than Wan reads.
    """
    text.check(request.prompt)
    text.check(request.negative_prompt or "")
    positive, *negative = map(text.encode, words(request))
    text.release()
    return Embeddings(positive, negative[0] if negative else None, image)


def words(request: Request) -> tuple[str, ...]:
    """The prompts that a completed request has encoded: the negative one only where guidance uses it."""
    guided = any(scale is not None and scale > 1 for scale in (request.guidance_scale, request.guidance_scale_2))
    return (request.prompt, request.negative_prompt or "") if guided else (request.prompt,)


def encode_image(encoder: ImageEncoder | None, request: Request, given: Given | None) -> Tensor | None:
    """CLIP tokens of the images that a video begins and ends with, (1 or 2, 257, D), for models that read them."""
    if encoder is None or given is None or not isinstance(request, ImageToVideo):
        return None
    return encoder.encode(given.pixels[:, 0])


def schedule(request: Request, few_step: FewStep | None, device: torch.device) -> Any:
    """The request's scheduler at its first step; a few-step model says at which noise levels it is evaluated."""
    assert request.scheduler is not None
    assert request.num_inference_steps is not None
    assert request.flow_shift is not None
    return make_scheduler(
        request.scheduler,
        num_inference_steps=request.num_inference_steps,
        flow_shift=request.flow_shift,
        device=device,
        levels=few_step.levels_for(request.num_inference_steps, request.flow_shift) if few_step else None,
    )


# Denoising

AfterStep = Callable[[Tensor, float], None]
"""Told the latents (1, C, f, h, w) that a step left, and the timestep they have come down to."""


@dataclass(frozen=True)
class Expert:
    """A transformer, its guidance scale, and the timesteps that are its own."""

    transformer: WanTransformer
    guidance_scale: float
    timesteps: Tensor


def experts(parts: Parts, request: Request, timesteps: Tensor) -> Iterator[Expert]:
    """Split the timesteps, which fall, between the transformers at the model's boundary."""
    assert request.guidance_scale is not None
    if not len(timesteps):
        return
    if parts.transformer_2 is None or parts.boundary_ratio is None:
        parts.enter("transformer")
        yield Expert(parts.transformer, request.guidance_scale, timesteps)
        return
    high = int((timesteps >= parts.boundary_ratio * TRAIN_TIMESTEPS).sum())
    low_scale = request.guidance_scale if request.guidance_scale_2 is None else request.guidance_scale_2
    if high:
        parts.enter("transformer")
        yield Expert(parts.transformer, request.guidance_scale, timesteps[:high])
    if high < len(timesteps):
        parts.enter("transformer_2")
        yield Expert(parts.transformer_2, low_scale, timesteps[high:])


@torch.no_grad()
def denoise(
    parts: Parts,
    guide: Guide,
    scheduler: Any,
    request: Request,
    text: Embeddings,
    start: Start,
    after_step: AfterStep,
) -> Tensor:
    """Follow the flow from where the task starts to a clean latent video (1, C, f, h, w), float32.

    ``after_step`` is told behind each model evaluation and solver step; what it raises ends the run.
    """
    latents, given = start.latents, start.given
    shape = tuple(latents.shape)
    assert request.seed is not None
    noise = torch.Generator("cpu").manual_seed(request.seed + 1)
    # Only the few-step solver draws noise; the others have no such argument.
    options = {"generator": noise} if request.scheduler == "lcm" else {}
    reached = iter([*start.timesteps[1:].tolist(), start.ends_at])
    for expert in experts(parts, request, start.timesteps):
        predict = guide.guidance(expert.transformer, text, shape, expert.guidance_scale, expert.timesteps.tolist())
        for timestep in expert.timesteps:
            flow = predict(*given.inputs(latents, timestep.expand(1)))
            latents = scheduler.step(flow, timestep, latents, return_dict=False, **options)[0]
            after_step(latents, next(reached))
    return given.kept(latents)


def denoise_progressively(
    progressive: Progressive,
    parts: Parts,
    guide: Guide,
    scheduler: Any,
    request: Request,
    text: Embeddings,
    start: Start,
    after_step: AfterStep,
) -> Tensor:
    """As :func:`denoise`, from pure noise, with the first steps on smaller latents."""
    noise, order = start.latents, scheduler.order
    levels = (start.timesteps[::order] / TRAIN_TIMESTEPS).tolist()
    count = progressive.small_steps(levels)
    if count == 0:
        return denoise(parts, guide, scheduler, request, text, start, after_step)
    # Solvers of a higher order remember steps, which are of the other size: the large ones begin with their own.
    index, afresh = count * order, deepcopy(scheduler)
    afresh.set_begin_index(index)
    sigma = float(afresh.sigmas[index])

    small = replace(
        start,
        latents=progressive.shrink(noise, parts.transformer.config.patch_size[1]),
        timesteps=start.timesteps[:index],
        ends_at=float(start.timesteps[index]),
    )
    watched = Watched(scheduler)
    denoise(parts, guide, watched, request, text, small, after_step)
    assert watched.clean is not None
    large = replace(start, latents=progressive.enlarge(watched.clean, noise, sigma), timesteps=start.timesteps[index:])
    return denoise(parts, guide, afresh, request, text, large, after_step)


# Decoding


def decode(
    vae: WanVAE,
    latents: Tensor,
    tiling: Tiling | None,
    after_chunk: Callable[[Tensor], None],
) -> Tensor:
    """Decode to uint8 frames (F, H, W, 3) on the CPU, a chunk at a time, so that memory stays bounded.

    ``after_chunk`` is given each chunk's frames as soon as they are there. They lie in page-locked memory where there
    is CUDA, and a chunk is waited for when the next one is in the GPU's queue, which so never runs empty.
    """
    _, _, count, rows, columns = latents.shape
    time, space = vae.config.scale_factor_temporal, vae.config.scale_factor_spatial
    shape = ((count - 1) * time + 1, rows * space, columns * space, 3)
    frames = torch.empty(shape, dtype=torch.uint8, pin_memory=latents.is_cuda)
    at, copied = 0, None
    for chunk in vae.stream_frames(latents, vae.latent_frames_at_once(latents), tiling):
        before, copied = copied, _Copied(frames[at : at + len(chunk)], chunk)
        at += len(chunk)
        if before is not None:
            after_chunk(before.frames())
    assert copied is not None
    after_chunk(copied.frames())
    return frames


class _Copied:
    """A chunk on its way to the host."""

    def __init__(self, host: Tensor, chunk: Tensor) -> None:
        self._host = host.copy_(chunk, non_blocking=True)
        self._done = torch.cuda.Event(blocking=True) if chunk.is_cuda else None
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(chunk.device))

    def frames(self) -> Tensor:
        if self._done is not None:
            self._done.synchronize()
        return self._host
