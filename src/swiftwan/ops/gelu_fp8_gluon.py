# mypy: disable-error-code="no-untyped-def"
"""8-bit matrix product with GELU and rounding behind it, for Hopper, in Gluon. Imported only there.

Programs stay, one a processor, and go from tile to tile, 256 tokens by 128 channels. One warp asks TMA for blocks, and
two groups of four warps, of 128 tokens each, multiply; while one takes GELU of its tile, the other one multiplies, and
its blocks are fetched already. What leaves is a byte a number: (L, ffn_dim) is neither written nor read in 16 bits.
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

TILE = 128
"""Tokens of one group of warps, channels of a tile, and inputs of a block."""

STAGES = 4
"""Blocks on their way at once: 192 of 227 KB of shared memory."""

GROUP = 16
"""Tiles of tokens that are worked on side by side, for the cache."""

_MMA = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 32]))
# What a thread has of a tile once channels are in order: 16 in a row of two groups of 64, of four tokens.
_ROWS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 8], [0, 64], [8, 0], [64, 0]],
        lane_bases=[[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[TILE, TILE],
    )
)


@gluon.jit
def _place(tile, m_tiles, n_tiles, GROUP: gl.constexpr):
    """Of a tile: GROUP tiles of tokens for one of channels, then the next of channels."""
    first = tile // (GROUP * n_tiles) * GROUP
    size = gl.minimum(m_tiles - first, GROUP)
    within = tile % (GROUP * n_tiles)
    return first + within % size, within // size


@gluon.jit
def _multiply(
    PART: gl.constexpr, memory, tensors, sizes, bound,
    STAGES: gl.constexpr, GROUP: gl.constexpr, TURN: gl.constexpr,
):  # fmt: skip
    x_ring, w_ring, ready, free = memory
    x_scale, w_scale, bias, values, scale = tensors
    m_tiles, n_tiles, rows, width, turns = sizes
    slope, offset = bound
    TILE: gl.constexpr = w_ring.shape[1]
    step = 0
    for tile in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
        m, n = _place(tile, m_tiles, n_tiles, GROUP)
        total = gl.zeros([TILE, TILE], gl.float32, _MMA)
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

        row = m * (2 * TILE) + PART * TILE + gl.arange(0, TILE, gl.SliceLayout(1, _MMA))
        place = gl.arange(0, TILE, gl.SliceLayout(0, _MMA))
        channel = n * TILE + place // 64 * 64 + (place // 2 % 4) * 16 + (place // 8 % 8) * 2 + place % 2
        row_scale = gl.load(x_scale + row, row < rows, other=1.0)
        out_scale = row_scale * slope + offset
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
        value = gl.permute(gl.reshape(half * tanh + half, [TILE, 2, 8, 4, 2]), [0, 1, 3, 2, 4])
        value = gl.convert_layout(gl.reshape(value, [TILE, TILE]), _ROWS, assert_trivial=True)
        if n == 0:
            gl.store(scale + row, out_scale, row < rows)
        row = m * (2 * TILE) + PART * TILE + gl.arange(0, TILE, gl.SliceLayout(1, _ROWS))
        channel = n * TILE + gl.arange(0, TILE, gl.SliceLayout(0, _ROWS))
        gl.store(values + row.to(gl.int64)[:, None] * width + channel[None, :], to_e4m3(value), (row < rows)[:, None])


@gluon.jit
def _fetch(x_map, w_map, memory, sizes, STAGES: gl.constexpr, GROUP: gl.constexpr, TURN: gl.constexpr):
    x_ring, w_ring, ready, free = memory
    m_tiles, n_tiles, rows, width, turns = sizes
    TILE: gl.constexpr = w_ring.shape[1]
    step = 0
    for tile in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
        m, n = _place(tile, m_tiles, n_tiles, GROUP)
        for block in range(turns * TURN):
            slot = step % STAGES
            bar = ready.index(slot)
            mbarrier.wait(free.index(slot), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, 2 * x_map.block_type.nbytes + w_map.block_type.nbytes)
            # The order of channels that makes a thread's results neighbours: see _weights.
            w_block = w_ring.index(slot)._reinterpret(w_map.dtype, w_map.block_shape, w_map.layout)
            tma.async_copy_global_to_shared(x_map, [m * 2 * TILE, block * TILE], bar, x_ring.index(2 * slot))
            tma.async_copy_global_to_shared(w_map, [2 * n, 0, 0, 0, block * TILE], bar, w_block)
            tma.async_copy_global_to_shared(x_map, [(m * 2 + 1) * TILE, block * TILE], bar, x_ring.index(2 * slot + 1))
            step += 1


@gluon.jit
def _linear_gelu_kernel(
    x_map, w_map, x_scale, w_scale, bias, values, scale, m_tiles, n_tiles, rows, width, turns, slope, offset,
    STAGES: gl.constexpr, GROUP: gl.constexpr, TURN: gl.constexpr,
):  # fmt: skip
    TILE: gl.constexpr = x_map.block_shape[0]
    x_ring = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, TILE, TILE], x_map.layout)
    w_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, TILE, TILE], x_map.layout)
    ready, free = ring_barriers(STAGES, 2)
    fence_async_shared()
    memory = (x_ring, w_ring, ready, free)
    tensors = (x_scale, w_scale, bias, values, scale)
    sizes = (m_tiles, n_tiles, rows, width, turns)
    bound = (slope, offset)
    gl.warp_specialize(
        [
            (_multiply, (gl.constexpr(0), memory, tensors, sizes, bound, STAGES, GROUP, TURN)),
            (_multiply, (gl.constexpr(1), memory, tensors, sizes, bound, STAGES, GROUP, TURN)),
            (_fetch, (x_map, w_map, memory, sizes, STAGES, GROUP, TURN)),
        ],
        [4, 1],
        [240, 24],
    )


def fits(linear: Fp8Linear) -> bool:
    """Whether a layer divides into whole tiles and turns and has a bias, as every published Wan's."""
    whole = linear.in_features % TILE == linear.out_features % TILE == 0
    return whole and bool(turn_of(linear.in_features // TILE)) and linear.bias is not None


def linear_gelu(linear: Fp8Linear, x: Rounded, bound: Bound) -> Rounded:
    """:func:`swiftwan.ops.gelu_fp8.linear_gelu` in one kernel, for layers that :func:`fits`."""
    rows, width = x.values.numel() // linear.in_features, linear.out_features
    device = x.values.device
    values = torch.empty(*x.values.shape[:-1], width, dtype=torch.float8_e4m3fn, device=device)
    scale = torch.empty_like(x.scale)
    m_tiles, n_tiles = triton.cdiv(rows, 2 * TILE), width // TILE
    turn = turn_of(linear.in_features // TILE)
    programs = min(m_tiles * n_tiles, torch.cuda.get_device_properties(device).multi_processor_count)
    with torch.cuda.device_of(values):
        _linear_gelu_kernel[(programs,)](
            _tokens(x.values.view(rows, -1)), _weights(linear.weight),
            x.scale, linear.scale, linear.bias, values, scale,
            m_tiles, n_tiles, rows, width, linear.in_features // (turn * TILE), *bound,
            STAGES=STAGES, GROUP=GROUP, TURN=turn, num_warps=4,
        )  # fmt: skip
    return Rounded(values, scale)


def _tokens(x: Tensor) -> TensorDescriptor:
    shape = [TILE, TILE]
    return TensorDescriptor.from_tensor(x, shape, gl.NVMMASharedLayout.get_default_for(shape, gl.float8e4nv))


def _weights(weight: Tensor) -> TensorDescriptor:
    """Channels c, j, e of 16 c + 2 j + e in the order j, c, e: a thread of the tensor cores gets two neighbours of
    every eight, and so 16 neighbours of every 64."""
    width, inner = weight.shape
    shape, strides = [width // 64, 8, 4, 2, inner], [64 * inner, 2 * inner, 16 * inner, inner, 1]
    block = [TILE // 64, 8, 4, 2, TILE]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.float8e4nv)
    return TensorDescriptor(weight, shape, strides, block, layout)
