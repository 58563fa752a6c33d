"""What a run will take, told before anything loads: memory by phase, and time.

Formulas count the tensors that live together where a phase is fullest; their constants are from runs on an H200 with
torch 2.11 (benchmarks/h200_techniques.jsonl has the estimate beside each measured peak).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from swiftwan.ceilings import Ceilings
from swiftwan.composition import Plan
from swiftwan.facts import Facts
from swiftwan.models.config import ClipConfig, VAEConfig
from swiftwan.models.vae_fast import PEAKS, goes_by_pairs, latent_frames_at_once
from swiftwan.models.vae_tiles import Tiling
from swiftwan.pipelines.request import Request
from swiftwan.techniques.costs import Costs
from swiftwan.weights.build import parameter_count
from swiftwan.work import attention_flop, decoder_flop, guided_steps, latent_grid, levels, linear_flop, plain_costs

WORKSPACE = 100_000_000
"""Bytes that matrix products and attention take beside tensors."""
TEXT_ACTIVATIONS = 80_000_000
PROCESS = 2_000_000_000
"""Bytes of host memory that Python, torch and the CUDA libraries take."""
PLAIN_PASSES, FUSED_PASSES = 197, 20
"""How often a block's norms, gates, RoPE and GELU read or write a tensor of all tokens."""
TINY_SHARE = 0.09
"""Of the decoder's time, that of ``vae:tiny``: 0.13 s of 832x480x81 on an H200. Of its operations it has 0.03."""
TINY_COPIES = 14
"""Of four frames of 64 channels, that ``vae:tiny`` takes: 2.8 GB at 832x480."""
FLOAT32_SHARE = 0.53
"""Of the rate of float32 products, what a decoder reaches in it: 10.0 s of 832x480x81 on an H200."""
FLOAT32_FRAMES = 10
"""What cuDNN's convolutions in float32 take beside tensors, in frames of the last level: 1.5 GB at 832x480."""
EXPANSION = 40
"""Bytes read and written to expand one weight of 4 or 8 bits."""


@dataclass(frozen=True)
class Phase:
    """One phase of a run: what is on the device, the part of it that is no weight, and on the host."""

    name: Literal["image", "text", "denoise", "decode"]
    weight_bytes: int
    activation_bytes: int
    host_bytes: int

    @property
    def device_bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes


@dataclass(frozen=True)
class Load:
    """The work, the memory and the time of a run.

    Attributes:
        tokens: video tokens of a forward.
        forwards: predictions in all; two a step with guidance.
        tflop_per_forward: operations of one, if nothing is skipped.
        phases: in the order in which they come.
        transformer_bytes: of the transformers' weights on the device while it denoises.
        step_seconds: of a step that computes both predictions; None where the machine's rates are unknown.
        denoise_seconds, decode_seconds: of the whole phase.
        at_most: steps may be skipped, so that it may be faster than told.
    """

    tokens: int
    forwards: int
    tflop_per_forward: float
    phases: tuple[Phase, ...]
    transformer_bytes: int = 0
    step_seconds: float | None = None
    denoise_seconds: float | None = None
    decode_seconds: float | None = None
    at_most: bool = False

    @property
    def fullest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.device_bytes)

    @property
    def peak_bytes(self) -> int:
        return self.fullest.device_bytes

    @property
    def weight_bytes(self) -> int:
        """Of weights on the device where it is fullest."""
        return self.fullest.weight_bytes

    @property
    def activation_bytes(self) -> int:
        return self.fullest.activation_bytes

    @property
    def host_bytes(self) -> int:
        return max(phase.host_bytes for phase in self.phases)


def estimate(
    request: Request,
    facts: Facts,
    plan: Plan,
    total_bytes: int,
    ceilings: Ceilings | None = None,
    *,
    new_prompt: bool = True,
) -> Load:
    """Count a completed request's operations (two a multiply-add), bytes and seconds under a plan.

    Args:
        total_bytes: of the device's memory; ``vae:fast`` makes its chunks by it.
        ceilings: of the device; None leaves the times out.
        new_prompt: False leaves out the text encoder, which is not loaded for prompts in the cache.
    """
    costs = plain_costs(request, facts, plan.settings.dtype)
    for technique in plan.techniques:
        costs = technique.cost(costs)
    if plan.settings.one_memory:
        costs = costs.in_one_memory()
    if not new_prompt:
        costs = replace(costs, text_bytes=0)
    steps = guided_steps(request, facts, plan)
    forwards = sum(steps)
    flop = linear_flop(costs) + attention_flop(costs)
    phases = tuple(_phases(request, facts, plan, costs, total_bytes))
    resident = int(_transformer_bytes(facts, costs)[0])
    load = Load(costs.tokens, forwards, flop / 1e12, phases, resident, at_most=costs.skips)
    if ceilings is None:
        return load
    forward = _forward_seconds(costs, ceilings)
    small = 0.0
    if (progressive := plan.settings.progressive) is not None:
        few = progressive.small_steps(levels(request, plan))
        less = replace(costs, tokens=int(costs.tokens * progressive.scale**2))
        small = sum(steps[:few]) * (_forward_seconds(less, ceilings) - forward)
    decode = _decode_seconds(request, facts, plan, costs, ceilings)
    bring = 0.0
    if costs.residency == "one at a time":
        bring = facts.experts * (costs.block_bytes + costs.rest_bytes) / ceilings.bus
    return replace(
        load,
        step_seconds=max(steps, default=0) * forward + ceilings.around_forwards,
        denoise_seconds=forwards * forward + len(steps) * ceilings.around_forwards + small + bring,
        decode_seconds=decode,
    )


# Time


def _forward_seconds(costs: Costs, ceilings: Ceilings) -> float:
    """One prediction: products, attention and what lies between; or launches, or copies, where those take longer."""
    layers = costs.sizes.num_layers
    passes = FUSED_PASSES if costs.fused else PLAIN_PASSES
    between = layers * passes * costs.token_bytes + costs.expanded_parameters * EXPANSION
    attention = "fp32" if costs.dtype is torch.float32 else costs.attention
    computing = (
        linear_flop(costs) / ceilings.products[costs.product] / 1e12
        + costs.attention_share * attention_flop(costs) / ceilings.attention[attention] / 1e12
        + between / ceilings.memory
        + layers * ceilings.gap_seconds[costs.fused] / costs.batch
    )
    if not costs.graphs:
        computing = max(computing, layers * ceilings.launch_seconds[costs.fused] / costs.batch)
    seconds = computing * costs.block_share
    if costs.residency == "streamed":
        streamed = 1 - costs.resident_blocks / layers
        resident = seconds * (1 - streamed)
        seconds = resident + max(seconds * streamed, streamed * costs.block_bytes / ceilings.bus / costs.batch)
    return seconds + ceilings.around_blocks / costs.batch


def _decode_seconds(request: Request, facts: Facts, plan: Plan, costs: Costs, ceilings: Ceilings) -> float:
    frames, rows, columns = latent_grid(request, facts)
    first, following = decoder_flop(facts.known.vae)
    flop: float = rows * columns * (first + (frames - 1) * following)
    if plan.tiling is not None:
        flop *= (plan.tiling.sample / plan.tiling.stride) ** 2
    width = _last_width(facts.known.vae)
    rates = ceilings.decode[min(ceilings.decode, key=lambda known: abs(known - width))]
    rate = rates[costs.decoder == "fast"]
    if costs.decoder == "tiny":
        flop *= TINY_SHARE
    if vae_dtype(plan) is torch.float32 and costs.product == "tf32":
        rate *= ceilings.products["tf32"] / ceilings.products["16"]
    elif vae_dtype(plan) is torch.float32:
        rate = FLOAT32_SHARE * ceilings.products["fp32"]
    return flop / rate / 1e12


# Memory


def _phases(request: Request, facts: Facts, plan: Plan, costs: Costs, total_bytes: int) -> Iterator[Phase]:
    size = vae_dtype(plan).itemsize
    vae = parameter_count(facts.known.vae) * size
    if facts.known.transformer.image_dim is not None:
        vae += parameter_count(ClipConfig()) * plan.settings.dtype.itemsize
    transformers, slots, host = _transformer_bytes(facts, costs)
    on_host = PROCESS + host + (costs.text_bytes if costs.text_home in ("cpu", "blocks") else 0)
    share = {"cpu": 0.0, "blocks": costs.text_block_share}.get(costs.text_home, 1.0)
    text = costs.text_bytes * share
    stays = costs.text_bytes if costs.text_home == "gpu" else 0
    # One at a time, the transformers are away but for their own turn; so are the slots of streamed blocks.
    around = 0.0 if costs.residency == "one at a time" else transformers - slots

    def phase(name: Literal["image", "text", "denoise", "decode"], weights: float, activations: float) -> Phase:
        frames = 2 * 3 * (request.width or 0) * (request.height or 0) * (request.num_frames or 0)
        return Phase(name, int(weights), int(activations), int(on_host + (frames if name == "decode" else 0)))

    if request.sources():
        yield phase("image", vae + around, _encoding(request, facts, size))
    yield phase("text", vae + around + text, TEXT_ACTIVATIONS if text else 0)
    yield phase("denoise", vae + stays + transformers, _denoising(costs))
    yield phase("decode", vae + stays + around, _decoding(request, facts, plan, costs, total_bytes))


def _transformer_bytes(facts: Facts, costs: Costs) -> tuple[float, float, float]:
    """Of weights on the device while it denoises, those of them in slots, and those in host memory."""
    whole = costs.block_bytes + costs.rest_bytes
    if costs.residency == "resident":
        return facts.experts * whole, 0.0, 0.0
    if costs.residency == "one at a time":
        return whole, 0.0, facts.experts * whole
    layers = costs.sizes.num_layers
    block = costs.block_bytes / layers
    away = facts.experts * (layers - costs.resident_blocks)
    slots = 2 * block if away else 0.0
    return facts.experts * (costs.rest_bytes + costs.resident_blocks * block) + slots, slots, away * block


def _denoising(costs: Costs) -> float:
    """Where a block is fullest: in the feed-forward, or between the projections and attention."""
    size, dim, ffn = costs.dtype.itemsize, costs.sizes.dim, costs.sizes.ffn_dim
    if costs.fused:
        fullest = size * max(10 * dim, ffn + 6 * dim)
    else:
        # RoPE and norms compute in float32.
        fullest = max(size * (2 * ffn + 6 * dim), size * 6 * dim + 16 * dim)
    rope = 2 * costs.sizes.attention_head_dim * 4  # two predictions, cosine and sine
    memories = 2 * 2 * costs.sizes.num_layers * 128 * dim * size
    opening = costs.token_bytes if costs.batch == 1 and costs.residency == "resident" else 0
    return (
        costs.batch * costs.tokens * fullest
        + costs.tokens * rope
        + opening
        + memories
        + costs.scratch_bytes
        + (costs.kept_bytes + WORKSPACE)
    )


def _last_width(vae: VAEConfig) -> int:
    """Channels of the decoder's last level."""
    return (vae.decoder_base_dim or vae.base_dim) * vae.dim_mult[0]


def vae_dtype(plan: Plan) -> torch.dtype:
    return plan.settings.vae_dtype or plan.settings.dtype


def _decoding(request: Request, facts: Facts, plan: Plan, costs: Costs, total_bytes: int) -> float:
    """A chunk at its last level, and what later chunks need of it."""
    vae, size = facts.known.vae, vae_dtype(plan).itemsize
    frames, rows, columns = latent_grid(request, facts)
    width = _last_width(vae)
    patch = vae.patch_size or 1
    pixels: int = rows * columns * (vae.scale_factor_spatial // patch) ** 2
    if costs.decoder == "tiny":
        return TINY_COPIES * 4 * 64 * pixels * size + WORKSPACE
    tile: int = pixels
    covered: int = pixels
    if plan.tiling is not None:
        tiling = plan.tiling.over(patch)
        tile = min(pixels, tiling.sample**2)
        covered = math.prod(_covered(side // patch, tiling) for side in (request.width or 0, request.height or 0))
    if costs.decoder == "fast":
        peak, four_frames = PEAKS[vae.is_residual], 4 * width * size
        chunk = min(frames, latent_frames_at_once(width, rows, columns, size, total_bytes))
        if plan.tiling is not None:
            copies = peak.each * chunk * tile + (peak.held - 0.7) * covered
        elif frames == 1:
            copies = peak.picture * pixels
        elif goes_by_pairs(peak, four_frames * pixels, total_bytes):
            copies = peak.by_pairs * pixels
        else:
            copies = peak.copies(chunk) * pixels
        return copies * four_frames + WORKSPACE
    in_float32, past = (16, 28) if vae.is_residual else (8, 25)
    # Four frames while a layer computes, and what each convolution keeps of the frames before, of all tiles.
    fullest = tile * 4 * (in_float32 + 4 * size) + covered * past * size
    if vae_dtype(plan) is torch.float32 and costs.product != "tf32" and not plan.settings.one_memory:
        fullest += tile * FLOAT32_FRAMES * size
    return width * fullest + WORKSPACE


def _covered(length: int, tiling: Tiling) -> int:
    """The sum of the tiles' lengths."""
    return sum(min(tiling.sample, length - start) for start in range(0, length, tiling.stride))


def _encoding(request: Request, facts: Facts, size: int) -> float:
    vae = facts.known.vae
    _, rows, columns = latent_grid(request, facts)
    pixels = rows * columns * (vae.scale_factor_spatial // (vae.patch_size or 1)) ** 2
    return pixels * vae.base_dim * 44 * size + WORKSPACE
