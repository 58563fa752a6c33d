"""Who learns, by which optimizer, with which attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from swiftwan.device import Device
from swiftwan.engine import Engine
from swiftwan.errors import RequestError, UnavailableError
from swiftwan.models.dit import Block, WanTransformer, each_block
from swiftwan.ops.attention import Attend, kernel, sdpa
from swiftwan.ops.attention_fp8_training import attention_fp8
from swiftwan.ops.few_keys_training import to_prompt
from swiftwan.ops.flash4 import package
from swiftwan.ops.flash4_training import flash4
from swiftwan.train import adapter, flow
from swiftwan.train.settings import Settings
from swiftwan.weights.lora import Expert


@dataclass(frozen=True)
class Trainee:
    """A transformer that learns, and the noise levels that are its own.

    Attributes:
        expert: high, low, or None for a model's only transformer.
        share: which part of all batches is drawn for it.
    """

    expert: Expert | None
    transformer: WanTransformer
    levels: flow.Levels
    share: float = 1.0


def trainees(engine: Engine, settings: Settings) -> list[Trainee]:
    """Who learns at which noise levels, the low-noise expert first.

    Raises:
        RequestError: one of two experts is asked for, and the model has one transformer.
    """
    known, parts = engine.facts.known, engine.parts
    shift = settings.shift or min(5.0, known.defaults.flow_shift)
    whole = flow.Levels(settings.timesteps, shift)
    if parts.transformer_2 is None or parts.boundary_ratio is None:
        if settings.experts in ("high", "low"):
            raise RequestError(f"'{known.name}' has one transformer; leave out --experts {settings.experts}.")
        return [Trainee(None, parts.transformer, whole)]
    boundary = parts.boundary_ratio
    below = whole.share_below(boundary)
    low = flow.Levels(settings.timesteps, shift, high=boundary)
    high = flow.Levels(settings.timesteps, shift, low=boundary)
    if settings.experts == "low":
        return [Trainee("low", parts.transformer_2, low)]
    if settings.experts == "high":
        return [Trainee("high", parts.transformer, high)]
    return [Trainee("low", parts.transformer_2, low, below), Trainee("high", parts.transformer, high, 1 - below)]


def equip(transformer: WanTransformer, device: Device, attend: Attend) -> None:
    """Give its blocks, with their adapters, the fastest kernels here that have a backward pass.

    Args:
        attend: of self-attention, as :func:`attention` chooses it.
    """
    in_triton = device.capability is not None and transformer.dtype.itemsize == 2
    for block in each_block(transformer):
        block.attn1.attend = attend
        block.attn2.attend = to_prompt if in_triton else sdpa
        if in_triton:
            from swiftwan.ops.lora_gelu_training import lora_gelu
            from swiftwan.ops.norm_rope_training import TRAINING

            block.ops = TRAINING
            adapter.fuse_gelu(block, lora_gelu)


def attention(device: Device, dtype: torch.dtype, base: str = "bf16") -> Attend:
    """Of a video to itself. 12 x 32,760 x 128 in bf16 on an H200, forward and backward: FlashAttention-4 34 ms,
    cuDNN 41, torch's own choice 71 (benchmarks/h200_train_attention.jsonl)."""
    capability = device.capability
    if base == "fp8-attention":
        package()  # told where it keeps what it compiles
        return attention_fp8
    if dtype.itemsize > 2:
        return sdpa
    if not kernel("flash4").missing_on(capability):
        package()
        return flash4
    return kernel("cudnn").load() if capability and capability >= (9, 0) else sdpa


def compile_blocks(transformer: WanTransformer) -> None:
    """Compile each block for the shapes that come, and what it makes of the prompt: that is hundreds of tiny kernels at
    a step's beginning and end, and eager, the device waits for their launches."""
    for layer in transformer.blocks:
        block = cast(Block, layer)
        block.compile(dynamic=False)
        block.attn2.remember = torch.compile(block.attn2.remember, dynamic=False)  # type: ignore[method-assign]


def make_optimizer(settings: Settings, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' with its state in 8 bits.

    Raises:
        UnavailableError: bitsandbytes is not installed.
    """
    options: dict[str, Any] = {"lr": 0.0, "betas": (0.9, 0.99), "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=parameters[0].is_cuda, **options)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UnavailableError(
            "adamw8bit needs the package 'bitsandbytes': pip install 'swiftwan[quantize]'."
        ) from None
    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, **options)
    return optimizer
