"""The kernel of :mod:`swiftwan.ops.vae_between`. Imported only where Triton is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from swiftwan.ops.vae_between import Entered, Repeated, Step, Sum

ELEMENTS = 4096  # of one program: 32 positions of 96 channels, 4 of 1024


@triton.jit(do_not_specialize=["frames", "height", "width"])
def _enter(  # type: ignore[no-untyped-def]
    y,
    bias,
    residual,
    gamma,
    past,
    buffer,
    new_past,
    kept,
    frames,
    height,
    width,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    POSITIONS: tl.constexpr,
    Y_GROUP: tl.constexpr,
    FOLDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,  # 0 none, 1 of the same shape, 2 repeated
    FACTOR_T: tl.constexpr,
    REPEATS: tl.constexpr,
    SKIP: tl.constexpr,
    NORM: tl.constexpr,
    SILU: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_PAST: tl.constexpr,
    REACH: tl.constexpr,
    GROUP: tl.constexpr,
):
    area = height * width
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    channel = tl.arange(0, PADDED)
    step = tl.program_id(1)  # counts the past too
    mask = (position < area)[:, None] & (channel < CHANNELS)[None, :]
    dense = position[:, None] * CHANNELS + channel[None, :]
    frame_size = (area * CHANNELS).to(tl.int64)

    if step < REACH:
        if HAS_PAST:
            value = tl.load(past + step * frame_size + dense, mask, other=0.0).to(tl.float32)
        else:
            value = tl.zeros((POSITIONS, PADDED), tl.float32)
    else:
        frame = step - REACH
        row = position // width
        column = position % width
        if FOLDED:
            across = width // 2 + 1
            place = (row // 2 + row % 2) * across + column // 2 + column % 2
            place = place * 4 + (row % 2) * 2 + column % 2
            start = frame * ((height // 2 + 1) * across * (4 * CHANNELS)).to(tl.int64)
        else:
            place = position * Y_GROUP
            start = (frame // Y_GROUP) * (frame_size * Y_GROUP) + (frame % Y_GROUP) * CHANNELS
        value = tl.load(y + start + place[:, None] * CHANNELS + channel[None, :], mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            value += tl.load(bias + channel, channel < CHANNELS, other=0.0).to(tl.float32)[None, :]
        if RESIDUAL == 1:
            value += tl.load(residual + frame * frame_size + dense, mask, other=0.0).to(tl.float32)
        if RESIDUAL == 2:
            copy = frame + SKIP
            small = (row // 2) * (width // 2) + column // 2
            inner = ((copy % FACTOR_T) * 2 + row % 2) * 2 + column % 2
            source = (channel[None, :] * (FACTOR_T * 4) + inner[:, None]) // REPEATS
            width_in: tl.constexpr = CHANNELS * FACTOR_T * 4 // REPEATS
            start = (copy // FACTOR_T) * ((area // 4) * width_in).to(tl.int64)
            value += tl.load(residual + start + small[:, None] * width_in + source, mask, other=0.0).to(tl.float32)
        if KEEP:
            tl.store(kept + frame * frame_size + dense, value, mask)
        if NORM:
            # Lanes beyond the channels hold zeros.
            scale = tl.rsqrt(tl.maximum(tl.sum(value * value, 1) / CHANNELS, 1e-24))
            value = value * scale[:, None] * tl.load(gamma + channel, channel < CHANNELS, other=0.0).to(tl.float32)
        if SILU:
            value = value * tl.sigmoid(value)

    if REACH > 0:
        if step >= frames:
            tl.store(new_past + (step - frames) * frame_size + dense, value, mask)
    if GROUP == 0:
        tl.store(buffer + step * frame_size + dense, value, mask)
    else:
        slots: tl.constexpr = GROUP + REACH
        stacked = position[:, None] * (slots * CHANNELS) + channel[None, :]
        for copy in tl.static_range((slots + GROUP - 1) // GROUP):
            slot = step % GROUP + GROUP * copy
            group = step // GROUP - copy
            fits = (slot < slots) & (group >= 0) & (group < frames // GROUP)
            tl.store(buffer + group * (frame_size * slots) + slot * CHANNELS + stacked, value, mask & fits)


def enter(total: Sum, step: Step, past: Tensor | None) -> Entered:
    """:func:`swiftwan.ops.vae_between.enter` on a GPU."""
    frames, height, width, channels = total.shape
    y, window, residual = total.y, step.window, total.residual
    assert y.is_contiguous()
    buffer = y.new_empty(window.shape(frames, height, width, channels))
    kept = y.new_empty(frames, height, width, channels) if step.keep else None
    new_past = y.new_empty(window.reach, height, width, channels) if window.reach else None
    repeated = isinstance(residual, Repeated)
    source = residual.x if isinstance(residual, Repeated) else residual
    assert source is None or source.is_contiguous()
    factor_t = residual.factor_t if isinstance(residual, Repeated) else 1
    padded = triton.next_power_of_2(channels)
    positions = max(1, ELEMENTS // padded)
    grid = (triton.cdiv(height * width, positions), frames + window.reach)
    with torch.cuda.device(y.device) if y.is_cuda else torch.no_grad():
        _enter[grid](
            y,
            y if total.bias is None else total.bias,
            y if source is None else source,
            y if step.gamma is None else step.gamma,
            y if past is None else past,
            buffer,
            buffer if new_past is None else new_past,
            buffer if kept is None else kept,
            frames,
            height,
            width,
            CHANNELS=channels,
            PADDED=padded,
            POSITIONS=positions,
            Y_GROUP=1 if y.ndim == 6 else y.shape[3],
            FOLDED=y.ndim == 6,
            HAS_BIAS=total.bias is not None,
            RESIDUAL=0 if source is None else 2 if repeated else 1,
            FACTOR_T=factor_t,
            REPEATS=residual.repeats if isinstance(residual, Repeated) else 1,
            SKIP=source.shape[0] * factor_t - frames if repeated and source is not None else 0,
            NORM=step.gamma is not None,
            SILU=step.silu,
            KEEP=step.keep,
            HAS_PAST=past is not None,
            REACH=window.reach,
            GROUP=window.group,
        )
    return Entered(buffer, new_past, kept)


@triton.jit(do_not_specialize=["frames", "height", "width"])
def _gather_taps(  # type: ignore[no-untyped-def]
    products,
    past,
    bias,
    out,
    frames,
    height,
    width,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    HAS_PAST: tl.constexpr,
):
    area = height * width
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    frame = tl.program_id(1)
    channel = tl.program_id(2)
    row = position // width
    column = position % width
    inside = position < area
    total = tl.zeros((POSITIONS,), tl.float32) + tl.load(bias + channel).to(tl.float32)
    for t in tl.static_range(3):
        source = frame + t - 2
        for i in tl.static_range(3):
            for j in tl.static_range(3):
                near = inside & (row + i >= 1) & (row + i <= height) & (column + j >= 1) & (column + j <= width)
                plane = ((t * 3 + i) * 3 + j) * CHANNELS + channel
                place = position + (i - 1) * width + (j - 1)
                if source >= 0:
                    start = (plane * frames + source) * area.to(tl.int64)
                    total += tl.load(products + start + place, near, other=0.0).to(tl.float32)
                elif HAS_PAST:
                    start = (plane * 2 + source + 2) * area.to(tl.int64)
                    total += tl.load(past + start + place, near, other=0.0).to(tl.float32)
    tl.store(out + (channel * frames + frame) * area.to(tl.int64) + position, total, inside)


def gather_taps(products: Tensor, past: Tensor | None, bias: Tensor) -> Tensor:
    """:func:`swiftwan.ops.vae_between.gather_taps` on a GPU."""
    _, frames, height, width = products.shape
    assert products.is_contiguous() and (past is None or past.is_contiguous())
    out = products.new_empty(bias.shape[0], frames, height, width)
    positions = 256
    grid = (triton.cdiv(height * width, positions), frames, bias.shape[0])
    with torch.cuda.device(products.device) if products.is_cuda else torch.no_grad():
        _gather_taps[grid](
            products,
            products if past is None else past,
            bias,
            out,
            frames,
            height,
            width,
            CHANNELS=bias.shape[0],
            POSITIONS=positions,
            HAS_PAST=past is not None,
        )
    return out
