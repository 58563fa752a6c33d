"""What a run computes: tokens, predictions and operations (two a multiply-add), counted from its request and plan."""

from __future__ import annotations

from functools import cache

import torch

from swiftwan.composition import Plan
from swiftwan.facts import Facts
from swiftwan.guidance import Mode
from swiftwan.models.config import VAEConfig
from swiftwan.pipelines.request import Request
from swiftwan.sampling import warped
from swiftwan.techniques.costs import Costs
from swiftwan.weights.build import transformer_bytes

TEXT_TOKENS = 512


def plain_costs(request: Request, facts: Facts, dtype: torch.dtype) -> Costs:
    """A completed request's costs before any technique."""
    frames, rows, columns = latent_grid(request, facts)
    blocks, rest = transformer_bytes(facts.known.transformer, dtype)
    _, patch_h, patch_w = facts.known.transformer.patch_size
    return Costs(
        model=facts.known,
        dtype=dtype,
        tokens=frames * (rows // patch_h) * (columns // patch_w),
        block_bytes=blocks,
        rest_bytes=rest,
        text_bytes=facts.text_parameters * dtype.itemsize,
        text_linear_parameters=facts.text_parameters - facts.text_kept_parameters,
        text_block_share=facts.text_block_parameters / facts.text_parameters,
        product="fp32" if dtype is torch.float32 else "16",
    )


def latent_grid(request: Request, facts: Facts) -> tuple[int, int, int]:
    """Latent frames, rows and columns."""
    assert request.num_frames
    assert request.width
    assert request.height
    vae = facts.known.vae
    frames = (request.num_frames - 1) // vae.scale_factor_temporal + 1
    return frames, request.height // vae.scale_factor_spatial, request.width // vae.scale_factor_spatial


def guided_steps(request: Request, facts: Facts, plan: Plan) -> list[int]:
    """How many predictions each evaluation of the model computes, 1 or 2, in order."""
    noise = levels(request, plan)
    boundary = facts.known.boundary_ratio or 0.0
    high = [level for level in noise if level >= boundary]
    low_scale = request.guidance_scale_2 or request.guidance_scale
    counts: list[int] = []
    for part, scale in ((high, request.guidance_scale), (noise[len(high) :], low_scale)):
        if (scale or 1) <= 1:
            counts += [1] * len(part)
        else:
            modes = plan.guide.when.modes([1000 * level for level in part])
            counts += [2 if mode is Mode.BOTH else 1 for mode in modes]
    return counts


def levels(request: Request, plan: Plan) -> list[float]:
    """The noise levels, timestep / 1000, at which the model is evaluated."""
    assert request.num_inference_steps
    assert request.flow_shift
    steps, shift, few = request.num_inference_steps, request.flow_shift, plan.settings.few_step
    noise = few.levels_for(steps, shift) if few else [warped(1 - step / steps, shift) for step in range(steps)]
    noise = list(noise)[len(noise) - request.steps_to_run :]
    if request.scheduler == "heun":  # two evaluations a step, but for the last
        noise = sorted([*noise, *noise[1:]], reverse=True)
    return noise


def linear_flop(costs: Costs) -> float:
    """Of one prediction: q, k, v, out of self-attention; q, out of cross-attention; the feed-forward."""
    dim, ffn = costs.sizes.dim, costs.sizes.ffn_dim
    return costs.sizes.num_layers * costs.tokens * (12 * dim**2 + 4 * dim * ffn)


def attention_flop(costs: Costs) -> float:
    """Of one prediction: self-attention over all tokens, cross-attention over the text's."""
    return costs.sizes.num_layers * 4.0 * costs.tokens * (costs.tokens + TEXT_TOKENS) * costs.sizes.dim


@cache
def decoder_flop(config: VAEConfig) -> tuple[int, int]:
    """Operations to decode a cell of a clip of one latent frame, and what a second adds; those of all convolutions.

    Counted from their weights. torch's counter runs the layers on meta, which imports its compiler, a second; it has
    the attention of the middle block too, 0.5 % at 832x480.
    """
    from torch import nn

    from swiftwan.models.vae import WanVAE
    from swiftwan.models.vae_blocks import CausalConv3d, Upsample

    with torch.device("meta"):
        vae = WanVAE(config)
    alone = 2 * vae.post_quant_conv.weight.numel()
    both = 2 * alone
    places, frames = 1, 1  # that a cell of a following frame has become, where the walk through the layers has come to
    in_time = {id(layer.time_conv) for layer in vae.decoder.modules() if isinstance(layer, Upsample)}
    for layer in vae.decoder.modules():
        if isinstance(layer, Upsample):
            if layer.time_conv is not None:  # the clip's first frame stays single
                both += 2 * places * frames * layer.time_conv.weight.numel()
                frames *= 2
            places *= 4
        elif isinstance(layer, nn.Conv2d | nn.Conv3d) and id(layer) not in in_time:
            flop = 2 * places * layer.weight.numel()
            both += (1 + frames) * flop
            # A single frame has no past, so of a kernel's steps in time only the last is computed.
            alone += flop // layer.kernel_size[0] if isinstance(layer, CausalConv3d) else flop
    return alone, both - alone
