# mypy: disable-error-code="no-untyped-def"
"""8-bit self-attention for Hopper, dense and block-sparse, in Gluon, the lower level of Triton. Imported only there.

One program computes 128 queries of a head. Three groups of warps work at once (as in FlashAttention-3, arXiv
2407.08608): one asks TMA for blocks of keys and values, and two, of 64 queries each, multiply and take the softmax. The
scores of a group's next block are multiplied while it takes the softmax of this one, and the two groups drift apart,
so that the tensor cores have work while exponentials are computed.

The blocks are read from the last to the first: the one with the end of the sequence, which must be masked, comes
first, outside of the loop.
"""

from __future__ import annotations

import torch
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

from swiftwan.ops.attention_fp8 import BLOCK, WIDTH, RoundedAttention
from swiftwan.ops.fp8 import Rounded
from swiftwan.ops.hopper import ring_barriers, to_e4m3
from swiftwan.ops.round_attention import round_and_pool, round_attention
from swiftwan.ops.sparse import choose_blocks

HALF = 64
"""Queries of one group of warps."""

STAGES = 4
"""Blocks of keys, and of values, on their way at once: 144 of 227 KB of shared memory."""

TURN = 2
"""Blocks of one turn of the loop."""

# What a thread has of 64 queries once channels are in order: 16 in a row of two groups of 64, of two queries.
_ROWS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 8], [0, 64], [8, 0]],
        lane_bases=[[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[HALF, WIDTH],
    )
)


@gluon.jit
def _left_side(weights, MMA: gl.constexpr):
    """Softmax's numerators as the left side of the second product, without a move between threads: see kernel_order."""
    groups: gl.constexpr = weights.shape[1] // 16
    weights = gl.permute(gl.reshape(weights, [weights.shape[0], groups, 2, 4, 2]), [0, 1, 3, 2, 4])
    weights = gl.reshape(weights, [weights.shape[0], groups * 16])
    return to_e4m3(gl.convert_layout(weights, gl.DotOperandLayout(0, MMA, 4), assert_trivial=True))


@gluon.jit
def _own_sum(weights):
    """What a thread has of a row, added up without a move between threads: (rows, 4)."""
    parts = gl.reshape(weights, [weights.shape[0], weights.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(parts, 3), 1)


@gluon.jit
def _exp2(scores, factor, offset, lowest, slope, base):
    """2 ** (scores * factor + offset) of integers, of every second one by a line.

    That is an integer product: max(scores, lowest) * slope + base are the bits of the float, whose exponent begins at
    the 23rd, so the slope is in steps of 2**-23 (:func:`swiftwan.ops.attention_fp8.slope_of`), some hundreds of them.
    For the others, 1.5 * 2**23 is added to the bits of an integer below 2**22, which makes it a float.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .f32 x; .reg .b32 s, t; add.s32 s, $2, 0x4B400000; mov.b32 x, s; fma.rn.f32 x, x, $4, $6; "
        "ex2.approx.ftz.f32 $0, x; max.s32 t, $3, $9; mad.lo.s32 t, t, $11, $13; mov.b32 $1, t; }",
        "=f,=f,r,r,f,f,f,f,r,r,r,r,r,r",
        [scores, factor[:, None], offset[:, None], lowest[:, None], slope[:, None], base[:, None]],
        dtype=gl.float32,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _soften(scores, factors, largest, total):
    """One block's integer scores to softmax's numerators.

    Returns:
        those, by what all before must shrink, the new largest score and each thread's part of the sum.
    """
    magic: gl.constexpr = 12582912.0
    top: gl.constexpr = 1131979231  # (127 + 8 - LINE_SHIFT) 2**23
    factor, slope, depth = factors
    larger = gl.maximum(largest, gl.max(scores, 1))
    shrink = gl.exp2((largest - larger).to(gl.float32) * factor)
    offset = 8.0 - (larger.to(gl.float32) + magic) * factor
    weights = _exp2(scores, factor, offset, larger - depth, slope, top - larger * slope)
    own = _own_sum(weights)
    less = gl.convert_layout(shrink, gl.SliceLayout(1, own.type.layout), assert_trivial=True)
    return weights, shrink, larger, total * less[:, None] + own


@gluon.jit
def _begin_scores(q, k_ring, k_ready, step, STAGES: gl.constexpr):
    """Set the first product of a block going, once its keys are there."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    HALF: gl.constexpr = q.shape[0]
    BLOCK: gl.constexpr = k_ring.shape[1]
    nothing = gl.zeros([HALF, BLOCK], gl.int32, MMA)
    mbarrier.wait(k_ready.index(step % STAGES), (step // STAGES) & 1)
    keys = k_ring.index(step % STAGES).permute((1, 0))
    return warpgroup_mma(q, keys, nothing, use_acc=False, is_async=True)


@gluon.jit
def _begin_result(weights, v_ring, v_ready, step, result, MMA: gl.constexpr, STAGES: gl.constexpr):
    """Set the second product of a block going, added to ``result``, once its values are there."""
    left = _left_side(weights, MMA)
    mbarrier.wait(v_ready.index(step % STAGES), (step // STAGES) & 1)
    return warpgroup_mma(left, v_ring.index(step % STAGES).permute((1, 0)), result, is_async=True)


@gluon.jit
def _write(result, v_scale, v_mean, written, first_row, out_row, length):
    """Half a tile's result, in 16 bits or, scaled by what no number of it exceeds, in 8."""
    out, out_scale, bound, is_first_head = written
    HALF: gl.constexpr = result.shape[0]
    WIDTH: gl.constexpr = result.shape[1]
    MMA: gl.constexpr = result.type.layout
    # See channel_order: what the second product leaves.
    place = gl.arange(0, WIDTH, gl.SliceLayout(0, MMA))
    channel = place // 64 * 64 + place // 2 % 4 * 16 + place // 8 % 8 * 2 + place % 2
    result = result * gl.load(v_scale + channel)[None, :] + gl.load(v_mean + channel)[None, :]
    result = gl.permute(gl.reshape(result, [HALF, 2, 8, 4, 2]), [0, 1, 3, 2, 4])
    result = gl.convert_layout(gl.reshape(result, [HALF, WIDTH]), _ROWS, assert_trivial=True)
    row = first_row + gl.arange(0, HALF, gl.SliceLayout(1, _ROWS))
    target = out + row.to(gl.int64)[:, None] * out_row + gl.arange(0, WIDTH, gl.SliceLayout(0, _ROWS))[None, :]
    if out.dtype.element_ty == gl.float8e4nv:
        step = gl.load(bound) / 448.0
        gl.store(target, to_e4m3(result * (1.0 / step)), (row < length)[:, None])
        if is_first_head:
            gl.store(out_scale + row, gl.full([HALF], 0.0, gl.float32, gl.SliceLayout(1, _ROWS)) + step, row < length)
    else:
        gl.store(target, result.to(out.dtype.element_ty), (row < length)[:, None])


@gluon.jit
def _multiply(
    PART: gl.constexpr, memory, ready, free, tensors, sizes,
    STAGES: gl.constexpr, TURN: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    """64 queries over all blocks: the scores' product, softmax, the values' product.

    While it takes the softmax of one block, the tensor cores have the scores of the next to compute and, within a
    turn, the values of the one before. Nothing may be on its way over a loop's edge: ptxas would wait for each product.
    """
    q, k_ring, v_ring = memory
    factor, v_scale, v_mean, written, lse = tensors
    last, first_row, out_row, length, count = sizes
    q_ready, k_ready, v_ready = ready
    k_free, v_free = free
    HALF: gl.constexpr = q.shape[1]
    BLOCK: gl.constexpr = k_ring.shape[1]
    WIDTH: gl.constexpr = v_ring.shape[1]
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    row = first_row + PART * HALF + gl.arange(0, HALF, gl.SliceLayout(1, MMA))
    factor = gl.load(factor + row, row < length, other=0.0)
    q = q.index(PART)
    slope = gl.maximum((factor * 8388608.0 + 0.5).to(gl.int32), 1)
    depth = (133.0 * 8388608.0 / slope.to(gl.float32)).to(gl.int32)  # below the largest, where lines reach 2**-125
    factors = (factor, slope, depth)

    mbarrier.wait(q_ready, 0)
    scores = warpgroup_mma_wait(0, deps=(_begin_scores(q, k_ring, k_ready, 0, STAGES),))
    mbarrier.arrive(k_free.index(0))
    token = last * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, MMA))
    # With 1.5 * 2**23 as a float the bits of minus infinity.
    scores = gl.where((token < length)[None, :], scores, -1270874112)
    largest = gl.full([HALF], -8388608, gl.int32, gl.SliceLayout(1, MMA))
    total = gl.zeros_like(_own_sum(gl.zeros([HALF, BLOCK], gl.float32, MMA)))
    result = gl.zeros([HALF, WIDTH], gl.float32, MMA)

    turns = (count - 1) // TURN
    for turn in range(turns):
        behind = warpgroup_mma_init(result)
        for part in gl.static_range(TURN):
            step = turn * TURN + part
            ahead = _begin_scores(q, k_ring, k_ready, step + 1, STAGES)
            weights, shrink, largest, total = _soften(scores, factors, largest, total)
            if part > 0:
                result = warpgroup_mma_wait(1, deps=(behind,))
                mbarrier.arrive(v_free.index((step - 1) % STAGES))
            behind = _begin_result(weights, v_ring, v_ready, step, result * shrink[:, None], MMA, STAGES)
            scores = warpgroup_mma_wait(1, deps=(ahead,))
            mbarrier.arrive(k_free.index((step + 1) % STAGES))
        result = warpgroup_mma_wait(0, deps=(behind,))
        mbarrier.arrive(v_free.index((turn * TURN + TURN - 1) % STAGES))

    for step in range(turns * TURN, count - 1):  # what is left of a turn
        ahead = _begin_scores(q, k_ring, k_ready, step + 1, STAGES)
        weights, shrink, largest, total = _soften(scores, factors, largest, total)
        behind = _begin_result(weights, v_ring, v_ready, step, result * shrink[:, None], MMA, STAGES)
        scores = warpgroup_mma_wait(1, deps=(ahead,))
        mbarrier.arrive(k_free.index((step + 1) % STAGES))
        result = warpgroup_mma_wait(0, deps=(behind,))
        mbarrier.arrive(v_free.index(step % STAGES))

    weights, shrink, largest, total = _soften(scores, factors, largest, total)
    behind = _begin_result(weights, v_ring, v_ready, count - 1, result * shrink[:, None], MMA, STAGES)
    result = warpgroup_mma_wait(0, deps=(behind,))
    total = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, MMA), assert_trivial=True)
    result = result * (1.0 / total)[:, None]
    _write(result, v_scale, v_mean, written, first_row + PART * HALF, out_row, length)
    if LSE:
        gl.store(lse + row, 0.6931471805599453 * (largest.to(gl.float32) * factor + gl.log2(total) - 8.0), row < length)


@gluon.jit
def _fetch(maps, memory, ready, free, blocks, sizes, STAGES: gl.constexpr, SPARSE: gl.constexpr):
    q_map, k_map, v_map = maps
    q, k_ring, v_ring = memory
    row, column, batch_row, v_row, count = sizes
    q_ready, k_ready, v_ready = ready
    k_free, v_free = free
    HALF: gl.constexpr = q.shape[1]
    BLOCK: gl.constexpr = k_ring.shape[1]
    mbarrier.expect(q_ready, 2 * q_map.block_type.nbytes)
    for part in gl.static_range(2):
        tma.async_copy_global_to_shared(q_map, [batch_row + row + part * HALF, column], q_ready, q.index(part))
    for step in range(count):
        block = count - 1 - step
        if SPARSE:
            block = gl.load(blocks + block)
        slot = step % STAGES
        phase = ((step // STAGES) & 1) ^ 1
        mbarrier.wait(k_free.index(slot), phase)
        mbarrier.expect(k_ready.index(slot), k_map.block_type.nbytes)
        tma.async_copy_global_to_shared(
            k_map, [batch_row + block * BLOCK, column], k_ready.index(slot), k_ring.index(slot)
        )
        mbarrier.wait(v_free.index(slot), phase)
        mbarrier.expect(v_ready.index(slot), v_map.block_type.nbytes)
        place = [v_row, block * BLOCK]
        tma.async_copy_global_to_shared(v_map, place, v_ready.index(slot), v_ring.index(slot))


@gluon.jit
def _attend_kernel(
    q_map, k_map, v_map, out, out_scale, bound, lse, factor, v_scale, v_mean, blocks, length, count, heads,
    STAGES: gl.constexpr, TURN: gl.constexpr, SPARSE: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    HALF: gl.constexpr = q_map.block_shape[0]
    BLOCK: gl.constexpr = k_map.block_shape[0]
    WIDTH: gl.constexpr = v_map.block_shape[0]
    row = gl.program_id(0) * (2 * HALF)
    head = gl.program_id(1)
    batch = gl.program_id(2)
    line = batch * heads + head
    out += batch.to(gl.int64) * length * (heads * WIDTH) + head * WIDTH
    out_scale += batch * length
    factor += line.to(gl.int64) * length
    if LSE:
        lse += line.to(gl.int64) * length
    v_scale += line * WIDTH
    v_mean += line * WIDTH
    last = count - 1
    if SPARSE:
        blocks += (line.to(gl.int64) * gl.num_programs(0) + gl.program_id(0)) * count
        last = gl.load(blocks + last)

    q = gl.allocate_shared_memory(gl.int8, [2, HALF, WIDTH], q_map.layout)
    k_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK, WIDTH], k_map.layout)
    v_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, WIDTH, BLOCK], v_map.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    k_ready, k_free = ring_barriers(STAGES, 2)
    v_ready, v_free = ring_barriers(STAGES, 2)
    fence_async_shared()
    ready = (q_ready, k_ready, v_ready)
    free = (k_free, v_free)
    memory = (q, k_ring, v_ring)
    tensors = (factor, v_scale, v_mean, (out, out_scale, bound + batch, head == 0), lse)
    sizes = (last, row, heads * WIDTH, length, count)
    maps = (q_map, k_map, v_map)
    places = (row, head * WIDTH, batch * length, line * WIDTH, count)
    # 240 registers a thread for those that multiply, 24 for the one that fetches: 65,536 in all.
    gl.warp_specialize(
        [
            (_multiply, (gl.constexpr(0), memory, ready, free, tensors, sizes, STAGES, TURN, LSE)),
            (_multiply, (gl.constexpr(1), memory, ready, free, tensors, sizes, STAGES, TURN, LSE)),
            (_fetch, (maps, memory, ready, free, blocks, places, STAGES, SPARSE)),
        ],
        [4, 1],
        [240, 24],
    )


def attend_rounded(
    x: RoundedAttention, dtype: torch.dtype, blocks: Tensor | None = None, lse: Tensor | None = None
) -> Tensor:
    """Attention of what is rounded, (B, L, H, E).

    Args:
        blocks: the blocks of keys that each block of queries sees, int32 (B, H, N, M), ascending; None for all.
        lse: float32 (B, H, L), to be filled with the log-sum-exp of scores with the keys less their mean.
    """
    out = torch.empty(x.q.shape, dtype=dtype, device=x.q.device)
    _attend_into(out, x.factor, x, blocks, lse)
    return out


def attend_to_bytes(x: RoundedAttention, blocks: Tensor | None = None) -> Rounded:
    """The same for an 8-bit layer behind it: values (B, L, H, E), scale (B, L, 1, 1)."""
    batch, length, _, _ = x.q.shape
    values = torch.empty(x.q.shape, dtype=torch.float8_e4m3fn, device=x.q.device)
    scale = torch.empty(batch, length, 1, 1, dtype=torch.float32, device=x.q.device)
    _attend_into(values, scale, x, blocks, None)
    return Rounded(values, scale)


def _attend_into(
    out: Tensor, out_scale: Tensor, x: RoundedAttention, blocks: Tensor | None, lse: Tensor | None
) -> None:
    """``out_scale`` is written where ``out`` is of 8 bits."""
    batch, length, heads, width = x.q.shape
    q = _tiles(x.q.view(batch * length, heads * width), HALF)
    k = _tiles(x.k.view(batch * length, heads * width), BLOCK)
    v = _tiles(x.v.view(batch * heads * width, -1), WIDTH)
    count = -(-length // BLOCK)
    read = count if blocks is None else blocks.shape[-1]
    with torch.cuda.device_of(out):
        _attend_kernel[(count, heads, batch)](
            q, k, v, out, out_scale, x.bound, x.factor if lse is None else lse, x.factor, x.v_scale, x.v_mean,
            x.factor if blocks is None else blocks, length, read, heads,
            STAGES=STAGES, TURN=TURN, SPARSE=blocks is not None, LSE=lse is not None, num_warps=4,
        )  # fmt: skip


def _tiles(x: Tensor, rows: int) -> TensorDescriptor:
    shape = [rows, 128]
    dtype = gl.int8 if x.dtype is torch.int8 else gl.float8e4nv
    return TensorDescriptor.from_tensor(x, shape, gl.NVMMASharedLayout.get_default_for(shape, dtype))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """:data:`swiftwan.ops.attention.Attend` in 8 bits, for heads of 128."""
    return attend_rounded(round_attention(q, k, v), q.dtype)


def attend_sparse(q: Tensor, k: Tensor, v: Tensor, keep: float) -> Tensor:
    """The same over a share ``keep`` of the blocks (:mod:`swiftwan.ops.sparse`), pooled where they are rounded."""
    rounded, q_means, k_means = round_and_pool(q, k, v)
    return attend_rounded(rounded, q.dtype, choose_blocks(q_means, k_means, keep))


def attend_for_bytes(q: Tensor, k: Tensor, v: Tensor) -> Rounded:
    """:func:`attend` for an 8-bit layer behind it."""
    return attend_to_bytes(round_attention(q, k, v))


def attend_sparse_for_bytes(q: Tensor, k: Tensor, v: Tensor, keep: float) -> Rounded:
    """:func:`attend_sparse` for an 8-bit layer behind it."""
    rounded, q_means, k_means = round_and_pool(q, k, v)
    return attend_to_bytes(rounded, choose_blocks(q_means, k_means, keep))
