# mypy: disable-error-code="no-untyped-def"
"""An 8-bit matrix product in tiles of 320 rows by 128 columns, for Hopper, in Gluon. Imported only there.

Two pictures of 832x480 are 3120 tokens. Tiles of 128 x 128 cut a product of theirs to 1536 columns into 300, which 132
processors work off in three rounds, the last of them a quarter full; tiles of 320 x 128 are 120: one round, of the time
of two and a half. A program is a tile. Two groups of four warps multiply 128 rows of it each and one 64, and one warp
asks TMA for blocks. Five groups of 64 rows have not enough registers for one instruction, 80 each.

On an H200 a product from 1536 inputs takes 14.8 us so, cuBLASLt's 17.1, and one from 8960 inputs 61, cuBLASLt's 75 to
82. In 16 bits, where blocks are half as deep, such tiles were slower than cuBLASLt's: 23.3 beside 21.9 us, 124 beside
103.

Shapes: M rows, I and O in- and out-width.
"""

from __future__ import annotations

from functools import cache

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

from swiftwan.ops.fp8 import Fp8Linear
from swiftwan.ops.fp8 import scaled_product as by_cublas
from swiftwan.ops.hopper import in_order, neighbours, ring_barriers, turn_of
from swiftwan.ops.products import TALL_TILE, fills_one_round

BOX = 64
"""Rows of what TMA is asked for at once."""

INNER = 128
"""Inputs of a block."""

STAGES = 4
"""Blocks on their way at once: 224 of 227 KB of shared memory."""


@gluon.jit
def _multiply(
    FIRST: gl.constexpr, ROWS: gl.constexpr, memory, tensors, sizes, STAGES: gl.constexpr, TURN: gl.constexpr
):  # fmt: skip
    """ROWS rows of the tile from box FIRST on."""
    x_ring, w_ring, ready, free = memory
    x_scale, w_scale, bias, out = tensors
    rows, width, turns = sizes
    BOXES: gl.constexpr = x_ring.shape[0] // STAGES
    BOX: gl.constexpr = x_ring.shape[1]
    COLUMNS: gl.constexpr = w_ring.shape[1]
    NEIGHBOURS: gl.constexpr = neighbours(ROWS, COLUMNS)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    step = 0
    total = gl.zeros([ROWS, COLUMNS], gl.float32, MMA)
    for _ in range(turns):
        total = warpgroup_mma_init(total)
        for part in gl.static_range(TURN):
            slot = step % STAGES
            mbarrier.wait(ready.index(slot), (step // STAGES) & 1)
            x = x_ring.index(BOXES * slot + FIRST)._reinterpret(x_ring.dtype, [ROWS, x_ring.shape[2]], x_ring.layout)
            weights = w_ring.index(slot).permute((1, 0))
            total = warpgroup_mma(x, weights, total, is_async=True)
            if part > 0:
                total = warpgroup_mma_wait(1, deps=(total,))
                mbarrier.arrive(free.index((step - 1) % STAGES))
            step += 1
        total = warpgroup_mma_wait(0, deps=(total,))
        mbarrier.arrive(free.index((step - 1) % STAGES))

    value = gl.convert_layout(in_order(total), NEIGHBOURS, assert_trivial=True)
    row = (gl.program_id(0) * BOXES + FIRST) * BOX + gl.arange(0, ROWS, gl.SliceLayout(1, NEIGHBOURS))
    column = gl.program_id(1) * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, NEIGHBOURS))
    value *= gl.load(x_scale + row, row < rows, other=0.0)[:, None] * gl.load(w_scale + column)[None, :]
    value += gl.load(bias + column)[None, :].to(gl.float32)
    place = out + row.to(gl.int64)[:, None] * width + column[None, :]
    gl.store(place, value.to(out.dtype.element_ty), (row < rows)[:, None])


@gluon.jit
def _fetch(x_map, w_map, memory, sizes, STAGES: gl.constexpr, TURN: gl.constexpr):
    x_ring, w_ring, ready, free = memory
    rows, width, turns = sizes
    BOXES: gl.constexpr = x_ring.shape[0] // STAGES
    for step in range(turns * TURN):
        slot = step % STAGES
        bar = ready.index(slot)
        mbarrier.wait(free.index(slot), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(bar, BOXES * x_map.block_type.nbytes + w_map.block_type.nbytes)
        # The order of columns that makes a thread's results neighbours: see _weights.
        w_block = w_ring.index(slot)._reinterpret(w_map.dtype, w_map.block_shape, w_map.layout)
        first = gl.program_id(1) * w_map.block_shape[0]
        inner = step * x_ring.shape[2]
        tma.async_copy_global_to_shared(w_map, [first, 0, 0, 0, inner], bar, w_block)
        for box in gl.static_range(BOXES):
            row = (gl.program_id(0) * BOXES + box) * x_ring.shape[1]
            tma.async_copy_global_to_shared(x_map, [row, inner], bar, x_ring.index(BOXES * slot + box))


@gluon.jit(do_not_specialize=["rows", "turns"])
def _product_kernel(
    x_map, w_map, x_scale, w_scale, bias, out, rows, width, turns,
    BOXES: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, TURN: gl.constexpr,
):  # fmt: skip
    BOX: gl.constexpr = x_map.block_shape[0]
    INNER: gl.constexpr = x_map.block_shape[1]
    x_ring = gl.allocate_shared_memory(x_map.dtype, [BOXES * STAGES, BOX, INNER], x_map.layout)
    w_ring = gl.allocate_shared_memory(x_map.dtype, [STAGES, COLUMNS, INNER], x_map.layout)
    ready, free = ring_barriers(STAGES, 3)
    fence_async_shared()
    memory = (x_ring, w_ring, ready, free)
    tensors = (x_scale, w_scale, bias, out)
    sizes = (rows, width, turns)
    gl.warp_specialize(
        [
            (_multiply, (gl.constexpr(0), gl.constexpr(2 * BOX), memory, tensors, sizes, STAGES, TURN)),
            (_multiply, (gl.constexpr(2), gl.constexpr(2 * BOX), memory, tensors, sizes, STAGES, TURN)),
            (_multiply, (gl.constexpr(4), gl.constexpr(BOX), memory, tensors, sizes, STAGES, TURN)),
            (_fetch, (x_map, w_map, memory, sizes, STAGES, TURN)),
        ],
        [4, 4, 1],
        [184, 120, 24],
    )


def fits(linear: Fp8Linear) -> bool:
    """Whether a layer divides into whole columns of tiles and turns and has a bias, as every published Wan's."""
    blocks, rest = divmod(linear.in_features, INNER)
    return rest == linear.out_features % TALL_TILE[1] == 0 and turn_of(blocks) > 0 and linear.bias is not None


def scaled_product(linear: Fp8Linear, values: Tensor, scale: Tensor) -> Tensor:
    """:func:`swiftwan.ops.fp8.scaled_product` of a layer that :func:`fits`, in tall tiles where they fill one round.

    How many rows come, no plan knows when it is built; cuBLASLt too chooses a kernel here, and a recorded graph holds
    what was chosen.
    """
    if fills_one_round(values.shape[0], linear.out_features, _processors(values.device)):
        return product(linear, values, scale)
    return by_cublas(linear, values, scale)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def product(linear: Fp8Linear, values: Tensor, scale: Tensor) -> Tensor:
    """:func:`swiftwan.ops.fp8.scaled_product` of any number of rows, of a layer that :func:`fits`."""
    rows, columns = values.shape[0], linear.out_features
    height, width = TALL_TILE
    blocks = linear.in_features // INNER
    turn = turn_of(blocks)
    out = torch.empty(rows, columns, dtype=linear.dtype, device=values.device)
    with torch.cuda.device_of(out):
        _product_kernel[(triton.cdiv(rows, height), columns // width)](
            _rows(values), _weights(linear.weight), scale, linear.scale, linear.bias, out,
            rows, columns, blocks // turn,
            BOXES=height // BOX, COLUMNS=width, STAGES=STAGES, TURN=turn, num_warps=4,
        )  # fmt: skip
    return out


def _rows(values: Tensor) -> TensorDescriptor:
    block = [BOX, INNER]
    return TensorDescriptor.from_tensor(values, block, gl.NVMMASharedLayout.get_default_for(block, gl.float8e4nv))


def _weights(weight: Tensor) -> TensorDescriptor:
    """Columns a, t, b, e of 32 a + 8 t + 2 b + e in the order a, b, t, e: a thread of the tensor cores gets two
    neighbours of every eight, and so 8 neighbours of every 32."""
    columns, inner = weight.shape
    shape, strides = [columns // 32, 4, 4, 2, inner], [32 * inner, 2 * inner, 8 * inner, inner, 1]
    block = [TALL_TILE[1] // 32, 4, 4, 2, INNER]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.float8e4nv)
    return TensorDescriptor(weight, shape, strides, block, layout)
