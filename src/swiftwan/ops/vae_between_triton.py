"""The kernels of :mod:`swiftwan.ops.vae_between`. Imported only where Triton is.

A program takes a few positions of all channels. Offsets within a frame fit 32 bits, those of frames do not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from swiftwan.ops.vae_between import Entered, Products, Repeated, Step, Sum

# Of one program: 8 positions of 96 channels, 1 of 1024. At 4096 the Winograd kernel takes 255 registers and spills: a
# whole decode of 832x480x81 in 484 ms instead of 468 (H200).
ELEMENTS = 1024
SIZES = ["frames", "height", "width"]
NONE, SAME, REPEATED = 0, 1, 2  # kinds of residual
FRAMES, FOLDED, PRODUCTS = 0, 1, 2  # kinds of y


@triton.jit
def _sum(  # type: ignore[no-untyped-def]
    y,
    y1,
    y2,
    y3,
    bias,
    residual,
    kept,
    frame,
    position,
    channel,
    mask,
    height,
    width,
    CHANNELS: tl.constexpr,
    SOURCE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FACTOR_T: tl.constexpr,
    REPEATS: tl.constexpr,
    SKIP: tl.constexpr,
    KEEP: tl.constexpr,
):
    """One frame's sum at some positions, float32; stored too if kept."""
    area = height * width
    frame_size = (area * CHANNELS).to(tl.int64)
    dense = position[:, None] * CHANNELS + channel[None, :]
    row = position // width
    column = position % width
    if SOURCE == 2:
        place = (frame // 2) * frame_size + dense
        value = tl.load(y1 + place, mask, other=0.0).to(tl.float32)
        difference = tl.load(y2 + place, mask, other=0.0).to(tl.float32)
        if frame % 2 == 0:
            value = value + difference + tl.load(y + place, mask, other=0.0).to(tl.float32)
        else:
            value = value - difference - tl.load(y3 + place, mask, other=0.0).to(tl.float32)
    else:
        if SOURCE == 1:
            across = width // 2 + 1
            place = (row // 2 + row % 2) * across + column // 2 + column % 2
            place = place * 4 + (row % 2) * 2 + column % 2
            start = frame * ((height // 2 + 1) * across * (4 * CHANNELS)).to(tl.int64)
        else:
            place = position
            start = frame * frame_size
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
    return value


@triton.jit
def _activate(value, gamma, channel, CHANNELS: tl.constexpr, NORM: tl.constexpr, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    if NORM:
        # Lanes beyond the channels hold zeros.
        scale = tl.rsqrt(tl.maximum(tl.sum(value * value, 1) / CHANNELS, 1e-24))
        gain = tl.load(gamma + channel, channel < CHANNELS, other=0.0).to(tl.float32)
        value = value * scale[:, None] * gain[None, :]
    if SILU:
        value = value * tl.sigmoid(value)
    return value


@triton.jit(do_not_specialize=SIZES)
def _enter(  # type: ignore[no-untyped-def]
    y,
    y1,
    y2,
    y3,
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
    SOURCE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FACTOR_T: tl.constexpr,
    REPEATS: tl.constexpr,
    SKIP: tl.constexpr,
    NORM: tl.constexpr,
    SILU: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_PAST: tl.constexpr,
    REACH: tl.constexpr,
    STACKED: tl.constexpr,
):
    """One program a frame, those of the past too."""
    area = height * width
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    channel = tl.arange(0, PADDED)
    step = tl.program_id(1)
    mask = (position < area)[:, None] & (channel < CHANNELS)[None, :]
    dense = position[:, None] * CHANNELS + channel[None, :]
    frame_size = (area * CHANNELS).to(tl.int64)

    if step < REACH:
        if HAS_PAST:
            value = tl.load(past + step * frame_size + dense, mask, other=0.0).to(tl.float32)
        else:
            value = tl.zeros((POSITIONS, PADDED), tl.float32)
    else:
        value = _sum(
            y, y1, y2, y3, bias, residual, kept, step - REACH, position, channel, mask, height, width,
            CHANNELS, SOURCE, HAS_BIAS, RESIDUAL, FACTOR_T, REPEATS, SKIP, KEEP,
        )  # fmt: skip
        value = _activate(value, gamma, channel, CHANNELS, NORM, SILU)

    if REACH > 0 and step >= frames:
        tl.store(new_past + (step - frames) * frame_size + dense, value, mask)
    if STACKED:
        slots: tl.constexpr = REACH + 1
        stacked = position[:, None] * (slots * CHANNELS) + channel[None, :]
        for slot in tl.static_range(slots):
            reader = step - slot
            fits = (reader >= 0) & (reader < frames)
            tl.store(buffer + reader * (frame_size * slots) + slot * CHANNELS + stacked, value, mask & fits)
    else:
        tl.store(buffer + step * frame_size + dense, value, mask)


@triton.jit(do_not_specialize=SIZES)
def _enter_winograd(  # type: ignore[no-untyped-def]
    y,
    y1,
    y2,
    y3,
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
    SOURCE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FACTOR_T: tl.constexpr,
    REPEATS: tl.constexpr,
    SKIP: tl.constexpr,
    NORM: tl.constexpr,
    SILU: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_PAST: tl.constexpr,
    REACH: tl.constexpr,
    STACKED: tl.constexpr,
):
    """One program all frames, two at a time: each pair meets the one before it in registers."""
    area = height * width
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    channel = tl.arange(0, PADDED)
    mask = (position < area)[:, None] & (channel < CHANNELS)[None, :]
    dense = position[:, None] * CHANNELS + channel[None, :]
    frame_size = (area * CHANNELS).to(tl.int64)
    pairs = frames // 2

    if HAS_PAST:
        d0 = tl.load(past + dense, mask, other=0.0).to(tl.float32)
        d1 = tl.load(past + frame_size + dense, mask, other=0.0).to(tl.float32)
    else:
        d0 = tl.zeros((POSITIONS, PADDED), tl.float32)
        d1 = tl.zeros((POSITIONS, PADDED), tl.float32)
    for pair in range(pairs):
        d2 = _sum(
            y, y1, y2, y3, bias, residual, kept, 2 * pair, position, channel, mask, height, width,
            CHANNELS, SOURCE, HAS_BIAS, RESIDUAL, FACTOR_T, REPEATS, SKIP, KEEP,
        )  # fmt: skip
        d3 = _sum(
            y, y1, y2, y3, bias, residual, kept, 2 * pair + 1, position, channel, mask, height, width,
            CHANNELS, SOURCE, HAS_BIAS, RESIDUAL, FACTOR_T, REPEATS, SKIP, KEEP,
        )  # fmt: skip
        d2 = _activate(d2, gamma, channel, CHANNELS, NORM, SILU)
        d3 = _activate(d3, gamma, channel, CHANNELS, NORM, SILU)
        tl.store(buffer + pair * frame_size + dense, d0 - d2, mask)
        tl.store(buffer + (pairs + pair) * frame_size + dense, d1 + d2, mask)
        tl.store(buffer + (2 * pairs + pair) * frame_size + dense, d2 - d1, mask)
        tl.store(buffer + (3 * pairs + pair) * frame_size + dense, d1 - d3, mask)
        d0 = d2
        d1 = d3
    tl.store(new_past + dense, d0, mask)
    tl.store(new_past + frame_size + dense, d1, mask)


def enter(total: Sum, step: Step, past: Tensor | None) -> Entered:
    """:func:`swiftwan.ops.vae_between.enter` on a GPU."""
    frames, height, width, channels = total.shape
    y, window, residual = total.tensor, step.window, total.residual
    parts = tuple(total.y) if isinstance(total.y, Products) else (y,) * 4
    assert all(part.is_contiguous() for part in parts)
    buffer = y.new_empty(window.shape(frames, height, width, channels))
    kept = y.new_empty(frames, height, width, channels) if step.keep else None
    new_past = y.new_empty(window.reach, height, width, channels) if window.reach else None
    copies = residual if isinstance(residual, Repeated) else None
    source = residual.x if isinstance(residual, Repeated) else residual
    assert source is None or source.is_contiguous()
    factor_t = copies.factor_t if copies else 1
    padded = triton.next_power_of_2(channels)
    positions = max(1, ELEMENTS // padded)
    across = triton.cdiv(height * width, positions)
    kernel, grid = (
        (_enter_winograd, (across,)) if window.form == "winograd" else (_enter, (across, frames + window.reach))
    )
    with torch.cuda.device_of(y):
        kernel[grid](
            *parts,
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
            SOURCE=PRODUCTS if isinstance(total.y, Products) else FOLDED if y.ndim == 6 else FRAMES,
            HAS_BIAS=total.bias is not None,
            RESIDUAL=NONE if source is None else REPEATED if copies else SAME,
            FACTOR_T=factor_t,
            REPEATS=copies.repeats if copies else 1,
            SKIP=copies.x.shape[0] * factor_t - frames if copies else 0,
            NORM=step.gamma is not None,
            SILU=step.silu,
            KEEP=step.keep,
            HAS_PAST=past is not None,
            REACH=window.reach,
            STACKED=window.form == "stacked",
        )
    return Entered(buffer, new_past, kept)


@triton.jit(do_not_specialize=SIZES)
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
    assert products.is_contiguous()
    assert past is None or past.is_contiguous()
    out = products.new_empty(bias.shape[0], frames, height, width)
    positions = 256
    grid = (triton.cdiv(height * width, positions), frames, bias.shape[0])
    with torch.cuda.device_of(products):
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
