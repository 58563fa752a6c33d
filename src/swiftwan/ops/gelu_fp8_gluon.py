# mypy: disable-error-code="no-untyped-def"
"""8-bit matrix product with GELU and rounding behind it, for Hopper, in Gluon. Imported only there.

Programs stay, one a processor, and go from tile to tile, 128 tokens by 256 channels. One warp asks TMA for blocks, and
two groups of four warps, of 64 tokens each, multiply; while one takes GELU of its tile, the other one multiplies, and
its blocks are fetched already. What leaves is a byte a number: (L, ffn_dim) is neither written nor read in 16 bits.
Tiles of 256 x 128 took 90 instead of 85 us for two pictures (sustained, an H200), and 1 % more energy for a video.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from swiftwan.ops.fp8 import Fp8Linear, Rounded
from swiftwan.ops.gelu_fp8 import Bound
from swiftwan.ops.hopper import ring_barriers, to_e4m3, turn_of

ROWS = 64
"""Tokens of one group of warps."""

COLUMNS = 256
"""Channels of a tile."""

INNER = 128
"""Inputs of a block."""

STAGES = 4
"""Blocks on their way at once: 224 of 227 KB of shared memory."""

SIDE_BY_SIDE = 32
"""Tiles of tokens that are worked on side by side, for the cache."""

# What a thread has of half a tile's channels once they are in order: 16 in a row of two groups of 64, of two tokens.
_NEIGHBOURS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 8], [0, 64], [8, 0]],
        lane_bases=[[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[ROWS, COLUMNS // 2],
    )
)


@gluon.jit
def _place(tile, m_tiles, n_tiles, SIDE_BY_SIDE: gl.constexpr):
    """Of a tile: SIDE_BY_SIDE tiles of tokens for one of channels, then the next of channels."""
    first = tile // (SIDE_BY_SIDE * n_tiles) * SIDE_BY_SIDE
    size = gl.minimum(m_tiles - first, SIDE_BY_SIDE)
    within = tile % (SIDE_BY_SIDE * n_tiles)
    return first + within % size, within // size


@gluon.jit
def _halves(total):
    """Both halves of a tile's channels, in order."""
    ROWS: gl.constexpr = total.shape[0]
    HALF: gl.constexpr = total.shape[1] // 2
    # A thread has two neighbours of every eight channels, of every 64 those that _weights made neighbours.
    moved = gl.permute(gl.reshape(total, [ROWS, 2, HALF // 64, 8, 4, 2]), [0, 2, 4, 3, 5, 1])
    one, other = gl.split(gl.reshape(moved, [ROWS, HALF, 2]))
    one = gl.convert_layout(one, _NEIGHBOURS, assert_trivial=True)
    return one, gl.convert_layout(other, _NEIGHBOURS, assert_trivial=True)


@gluon.jit
def _finish(total, first_row, first_channel, tensors, sizes, bound):
    """Scales, bias, GELU and rounding of half a tile."""
    x_scale, w_scale, bias, values, scale = tensors
    m_tiles, n_tiles, rows, width, turns = sizes
    slope, offset = bound
    row = first_row + gl.arange(0, total.shape[0], gl.SliceLayout(1, _NEIGHBOURS))
    channel = first_channel + gl.arange(0, total.shape[1], gl.SliceLayout(0, _NEIGHBOURS))
    row_scale = gl.load(x_scale + row, row < rows, other=1.0)
    out_scale = row_scale * slope + offset
    if first_channel == 0:
        gl.store(scale + row, out_scale, row < rows)
    value = total * row_scale[:, None] * gl.load(w_scale + channel)[None, :]
    value += gl.load(bias + channel)[None, :].to(gl.float32)
    tanh = gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;",
        "=f,f",
        [value * (0.7978845608028654 + 0.035677408136300125 * value * value)],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )
    half = value * (0.5 / out_scale)[:, None]
    place = values + row.to(gl.int64)[:, None] * width + channel[None, :]
    gl.store(place, to_e4m3(half * tanh + half), (row < rows)[:, None])


@gluon.jit
def _multiply(
    PART: gl.constexpr, memory, tensors, sizes, bound,
    STAGES: gl.constexpr, SIDE_BY_SIDE: gl.constexpr, TURN: gl.constexpr,
):  # fmt: skip
    x_ring, w_ring, ready, free = memory
    m_tiles, n_tiles, rows, width, turns = sizes
    ROWS: gl.constexpr = x_ring.shape[1]
    COLUMNS: gl.constexpr = w_ring.shape[1]
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    step = 0
    for tile in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
        m, n = _place(tile, m_tiles, n_tiles, SIDE_BY_SIDE)
        total = gl.zeros([ROWS, COLUMNS], gl.float32, MMA)
        for _ in range(turns):
            total = warpgroup_mma_init(total)
            for part in gl.static_range(TURN):
                slot = step % STAGES
                mbarrier.wait(ready.index(slot), (step // STAGES) & 1)
                weights = w_ring.index(slot).permute((1, 0))
                total = warpgroup_mma(x_ring.index(2 * slot + PART), weights, total, is_async=True)
                if part > 0:
                    total = warpgroup_mma_wait(1, deps=(total,))
                    mbarrier.arrive(free.index((step - 1) % STAGES))
                step += 1
            total = warpgroup_mma_wait(0, deps=(total,))
            mbarrier.arrive(free.index((step - 1) % STAGES))
        one, other = _halves(total)
        first_row = (2 * m + PART) * ROWS
        _finish(one, first_row, n * COLUMNS, tensors, sizes, bound)
        _finish(other, first_row, n * COLUMNS + COLUMNS // 2, tensors, sizes, bound)


@gluon.jit
def _fetch(x_map, w_map, memory, sizes, STAGES: gl.constexpr, SIDE_BY_SIDE: gl.constexpr, TURN: gl.constexpr):
    x_ring, w_ring, ready, free = memory
    m_tiles, n_tiles, rows, width, turns = sizes
    ROWS: gl.constexpr = x_ring.shape[1]
    INNER: gl.constexpr = x_ring.shape[2]
    step = 0
    for tile in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
        m, n = _place(tile, m_tiles, n_tiles, SIDE_BY_SIDE)
        for block in range(turns * TURN):
            slot = step % STAGES
            bar = ready.index(slot)
            mbarrier.wait(free.index(slot), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, 2 * x_map.block_type.nbytes + w_map.block_type.nbytes)
            # The order of channels that makes a thread's results neighbours: see _weights.
            w_block = w_ring.index(slot)._reinterpret(w_map.dtype, w_map.block_shape, w_map.layout)
            tma.async_copy_global_to_shared(w_map, [n * w_map.block_shape[0], 0, 0, 0, block * INNER], bar, w_block)
            for part in gl.static_range(2):
                x_block = x_ring.index(2 * slot + part)
                tma.async_copy_global_to_shared(x_map, [(2 * m + part) * ROWS, block * INNER], bar, x_block)
            step += 1


@gluon.jit
def _linear_gelu_kernel(
    x_map, w_map, x_scale, w_scale, bias, values, scale, m_tiles, n_tiles, rows, width, turns, slope, offset,
    STAGES: gl.constexpr, SIDE_BY_SIDE: gl.constexpr, TURN: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = x_map.block_shape[0]
    INNER: gl.constexpr = x_map.block_shape[1]
    COLUMNS: gl.constexpr = 64 * w_map.block_shape[0]
    x_ring = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, ROWS, INNER], x_map.layout)
    w_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, COLUMNS, INNER], x_map.layout)
    ready, free = ring_barriers(STAGES, 2)
    fence_async_shared()
    memory = (x_ring, w_ring, ready, free)
    tensors = (x_scale, w_scale, bias, values, scale)
    sizes = (m_tiles, n_tiles, rows, width, turns)
    bound = (slope, offset)
    gl.warp_specialize(
        [
            (_multiply, (gl.constexpr(0), memory, tensors, sizes, bound, STAGES, SIDE_BY_SIDE, TURN)),
            (_multiply, (gl.constexpr(1), memory, tensors, sizes, bound, STAGES, SIDE_BY_SIDE, TURN)),
            (_fetch, (x_map, w_map, memory, sizes, STAGES, SIDE_BY_SIDE, TURN)),
        ],
        [4, 1],
        [240, 24],
    )


def fits(linear: Fp8Linear) -> bool:
    """Whether a layer divides into whole tiles and turns and has a bias, as every published Wan's."""
    whole = linear.in_features % INNER == linear.out_features % COLUMNS == 0
    return whole and bool(turn_of(linear.in_features // INNER)) and linear.bias is not None


def linear_gelu(linear: Fp8Linear, x: Rounded, bound: Bound) -> Rounded:
    """:func:`swiftwan.ops.gelu_fp8.linear_gelu` in one kernel, for layers that :func:`fits`."""
    rows, width = x.values.numel() // linear.in_features, linear.out_features
    device = x.values.device
    values = torch.empty(*x.values.shape[:-1], width, dtype=torch.float8_e4m3fn, device=device)
    scale = torch.empty_like(x.scale)
    m_tiles, n_tiles = triton.cdiv(rows, 2 * ROWS), width // COLUMNS
    turn = turn_of(linear.in_features // INNER)
    programs = min(m_tiles * n_tiles, torch.cuda.get_device_properties(device).multi_processor_count)
    with torch.cuda.device_of(values):
        _linear_gelu_kernel[(programs,)](
            _tokens(x.values.view(rows, -1)), _weights(linear.weight),
            x.scale, linear.scale, linear.bias, values, scale,
            m_tiles, n_tiles, rows, width, linear.in_features // (turn * INNER), *bound,
            STAGES=STAGES, SIDE_BY_SIDE=SIDE_BY_SIDE, TURN=turn, num_warps=4,
        )  # fmt: skip
    return Rounded(values, scale)


def _tokens(x: Tensor) -> TensorDescriptor:
    shape = [ROWS, INNER]
    return TensorDescriptor.from_tensor(x, shape, gl.NVMMASharedLayout.get_default_for(shape, gl.float8e4nv))


def _weights(weight: Tensor) -> TensorDescriptor:
    """Channels c, j, e of 16 c + 2 j + e in the order j, c, e: a thread of the tensor cores gets two neighbours of
    every eight, and so 16 neighbours of every 64."""
    width, inner = weight.shape
    shape, strides = [width // 64, 8, 4, 2, inner], [64 * inner, 2 * inner, 16 * inner, inner, 1]
    block = [COLUMNS // 64, 8, 4, 2, INNER]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.float8e4nv)
    return TensorDescriptor(weight, shape, strides, block, layout)
