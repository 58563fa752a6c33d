# mypy: disable-error-code="no-untyped-def"
"""The second kernel of :mod:`swiftwan.ops.text_attention` for Hopper, in Gluon. Imported only there.

A program keeps the keys and values of one head. Groups of four warps take 64 tokens each at a time, and one warp asks
TMA for their queries, which go from memory to the tensor cores untouched: the norm's weight is multiplied into
the keys, and its factor of a token onto the token's scores.

Both kernels together on an H200, Triton's second one in brackets, us: two pictures of 1560 tokens to 131 keys 18.4
(20.7), rounded 17.8 (19.6); 32,760 tokens to 67 keys 86 (104) and 82 (96), to 131 105 (126) and 102 (120).
"""

from __future__ import annotations

import math

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
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from swiftwan.ops import text_attention
from swiftwan.ops.hopper import in_order, neighbours, ring_barriers, to_e4m3

WIDTH = 128
"""Of a head."""

TOKENS = 64
"""That a group of warps takes at once."""

STAGES = 3
"""Tiles of queries that a group has in shared memory: of two groups with 144 keys and values 172 of 227 KB, of three
with 80 189."""

_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))


@gluon.jit
def _keep(k_memory, v_memory, key, value, weight, start, count, row):
    """Keys, times the norm's weight, and values to shared memory, their channels in the order that makes a thread's
    results neighbours. At most 64 at once, which registers hold."""
    FEW: gl.constexpr = 64 if k_memory.shape[0] > 64 else k_memory.shape[0]
    WIDTH: gl.constexpr = k_memory.shape[1]
    channel = gl.arange(0, WIDTH, gl.SliceLayout(0, _ROWS))
    norm = gl.load(weight + channel).to(gl.float32)
    for turn in gl.static_range(k_memory.shape[0] // FEW):
        text = start + turn * FEW + gl.arange(0, FEW, gl.SliceLayout(1, _ROWS))
        place = text[:, None] * row + channel[None, :]
        there = (text < count)[:, None]
        keys = gl.load(key + place, there, other=0.0).to(gl.float32) * norm[None, :]
        k_memory.slice(turn * FEW, FEW).store(keys.to(k_memory.dtype))
        v_memory.slice(turn * FEW, FEW).store(in_order(gl.load(value + place, there, other=0.0)))


@gluon.jit
def _keep_shift(memory, bias, start, count, BIASED: gl.constexpr):
    """What is added to the scores of some keys, to shared memory: registers would hold it from tile to tile."""
    text = start + gl.arange(0, memory.shape[0], gl.BlockedLayout([1], [32], [4], [0]))
    shift = gl.where(text < count, 0.0, float("-inf"))
    if BIASED:
        shift += 1.4426950408889634 * gl.load(bias + text, text < count, other=0.0).to(gl.float32)
    memory.store(shift)


@gluon.jit
def _scores(products, factor, shift):
    """Exponents of 2, and their largest, from what the first product leaves."""
    LAYOUT: gl.constexpr = products.type.layout
    factors = gl.convert_layout(factor, gl.SliceLayout(1, LAYOUT))
    scores = products * factors[:, None] + shift.load(gl.SliceLayout(0, LAYOUT))[None, :]
    return scores, gl.convert_layout(gl.max(scores, 1), factor.type.layout)


@gluon.jit
def _soften(scores, most, dtype: gl.constexpr, MMA: gl.constexpr):
    """Softmax's numerators as the left side of the second product, and their sums."""
    weights = gl.exp2(scores - gl.convert_layout(most, gl.SliceLayout(1, scores.type.layout))[:, None])
    left = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)
    return left, gl.convert_layout(gl.sum(weights, 1), most.type.layout)


@gluon.jit
def _attend(
    GROUP: gl.constexpr, memory, tensors, sizes, GROUPS: gl.constexpr, STAGES: gl.constexpr, MORE: gl.constexpr
):  # fmt: skip
    """Every second or third tile of a program's."""
    q_ring, keys, values, shift, more_keys, more_values, more_shift, ready, free = memory
    inverse, out, scale, step = tensors
    first, last, length, row, softmax_scale, is_first_head = sizes
    TOKENS: gl.constexpr = q_ring.shape[1]
    WIDTH: gl.constexpr = q_ring.shape[2]
    KEYS: gl.constexpr = keys.shape[0]
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    KEYS_MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    MORE_MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MORE, 16])
    NEIGHBOURS: gl.constexpr = neighbours(TOKENS, WIDTH)
    for tile in range(first + GROUP, last, GROUPS):
        turn = (tile - first) // GROUPS
        token = tile * TOKENS + gl.arange(0, TOKENS, gl.SliceLayout(1, MMA))
        factor = gl.load(inverse + token, token < length, other=0.0) * softmax_scale
        slot = GROUP * STAGES + turn % STAGES
        mbarrier.wait(ready.index(slot), (turn // STAGES) & 1)
        q = q_ring.index(slot)
        nothing = gl.zeros([TOKENS, KEYS], gl.float32, KEYS_MMA)
        products = warpgroup_mma(q, keys.permute((1, 0)), nothing, use_acc=False, is_async=True)
        if MORE > 0:
            more_nothing = gl.zeros([TOKENS, MORE], gl.float32, MORE_MMA)
            more_products = warpgroup_mma(q, more_keys.permute((1, 0)), more_nothing, use_acc=False, is_async=True)
            products, more_products = warpgroup_mma_wait(0, deps=(products, more_products))
        else:
            products = warpgroup_mma_wait(0, deps=(products,))
        mbarrier.arrive(free.index(slot))

        scores, most = _scores(products, factor, shift)
        if MORE > 0:
            more_scores, more_most = _scores(more_products, factor, more_shift)
            most = gl.maximum(most, more_most)
        left, total = _soften(scores, most, values.dtype, MMA)
        result = gl.zeros([TOKENS, WIDTH], gl.float32, MMA)
        result = warpgroup_mma(left, values, result, use_acc=False, is_async=True)
        if MORE > 0:
            more_left, more_total = _soften(more_scores, most, values.dtype, MMA)
            total += more_total
            result = warpgroup_mma(more_left, more_values, result, is_async=True)
        result = warpgroup_mma_wait(0, deps=(result,)) * (1.0 / (total * step))[:, None]

        result = gl.convert_layout(in_order(result), NEIGHBOURS, assert_trivial=True)
        token = tile * TOKENS + gl.arange(0, TOKENS, gl.SliceLayout(1, NEIGHBOURS))
        channel = gl.arange(0, WIDTH, gl.SliceLayout(0, NEIGHBOURS))
        place = out + token.to(gl.int64)[:, None] * row + channel[None, :]
        if out.dtype.element_ty == gl.float8e4nv:
            gl.store(place, to_e4m3(result), (token < length)[:, None])
            if is_first_head:
                steps = gl.full([TOKENS], 0.0, gl.float32, gl.SliceLayout(1, NEIGHBOURS)) + step
                gl.store(scale + token, steps, token < length)
        else:
            gl.store(place, result.to(out.dtype.element_ty), (token < length)[:, None])


@gluon.jit
def _fetch(q_map, q_ring, ready, free, places, GROUPS: gl.constexpr, STAGES: gl.constexpr):
    first, last, q_row, column = places
    for tile in range(first, last):
        turn = (tile - first) // GROUPS
        slot = (tile - first) % GROUPS * STAGES + turn % STAGES
        mbarrier.wait(free.index(slot), ((turn // STAGES) & 1) ^ 1)
        mbarrier.expect(ready.index(slot), q_map.block_type.nbytes)
        place = [q_row + tile * q_map.block_shape[0], column]
        tma.async_copy_global_to_shared(q_map, place, ready.index(slot), q_ring.index(slot))


@gluon.jit
def _text_attend_kernel(
    q_map, inverse, weight, key, value, bias, largest, out, scale, length, count, q_rows, softmax_scale,
    KEYS: gl.constexpr, MORE: gl.constexpr, PARTS: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
    BIASED: gl.constexpr,
):  # fmt: skip
    part, head, batch = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    TOKENS: gl.constexpr = q_map.block_shape[0]
    WIDTH: gl.constexpr = q_map.block_shape[1]
    row = gl.num_programs(1) * WIDTH
    column = head * WIDTH
    inverse += batch * q_rows
    out += batch.to(gl.int64) * length * row + column
    scale += batch * length
    key += batch * count * row + column
    value += batch * count * row + column
    weight += column

    q_ring = gl.allocate_shared_memory(q_map.dtype, [GROUPS * STAGES, TOKENS, WIDTH], q_map.layout)
    KEPT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, WIDTH], q_map.dtype)
    keys = gl.allocate_shared_memory(q_map.dtype, [KEYS, WIDTH], KEPT)
    values = gl.allocate_shared_memory(q_map.dtype, [KEYS, WIDTH], KEPT)
    SHIFT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    shift = gl.allocate_shared_memory(gl.float32, [KEYS], SHIFT)
    more_keys, more_values, more_shift = keys, values, shift
    if MORE > 0:
        MORE_KEPT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([MORE, WIDTH], q_map.dtype)
        more_keys = gl.allocate_shared_memory(q_map.dtype, [MORE, WIDTH], MORE_KEPT)
        more_values = gl.allocate_shared_memory(q_map.dtype, [MORE, WIDTH], MORE_KEPT)
        more_shift = gl.allocate_shared_memory(gl.float32, [MORE], SHIFT)
        _keep(more_keys, more_values, key, value, weight, KEYS, count, row)
        _keep_shift(more_shift, bias, KEYS, count, BIASED)
    _keep(keys, values, key, value, weight, 0, count, row)
    _keep_shift(shift, bias, 0, count, BIASED)
    ready, free = ring_barriers(GROUPS * STAGES, 1)
    fence_async_shared()
    step = 1.0
    if out.dtype.element_ty == gl.float8e4nv:
        each: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        step = gl.maximum(gl.max(gl.load(largest + gl.arange(0, PARTS, each)), 0), 1e-12) / 448.0

    tiles = gl.cdiv(length, TOKENS)
    first = part * tiles // gl.num_programs(0)
    last = (part + 1) * tiles // gl.num_programs(0)
    memory = (q_ring, keys, values, shift, more_keys, more_values, more_shift, ready, free)
    tensors = (inverse, out, scale, step)
    sizes = (first, last, length, row, softmax_scale, head == 0)
    places = (first, last, batch * q_rows, column)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_attend, (gl.constexpr(0), memory, tensors, sizes, GROUPS, STAGES, MORE)),
                (_attend, (gl.constexpr(1), memory, tensors, sizes, GROUPS, STAGES, MORE)),
                (_fetch, (q_map, q_ring, ready, free, places, GROUPS, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_attend, (gl.constexpr(0), memory, tensors, sizes, GROUPS, STAGES, MORE)),
                (_attend, (gl.constexpr(1), memory, tensors, sizes, GROUPS, STAGES, MORE)),
                (_attend, (gl.constexpr(2), memory, tensors, sizes, GROUPS, STAGES, MORE)),
                (_fetch, (q_map, q_ring, ready, free, places, GROUPS, STAGES)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


def attend_heads(
    out: Tensor,
    scale: Tensor | None,
    q: Tensor,
    inverse: Tensor,
    weight: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    largest: Tensor,
) -> None:
    """:data:`swiftwan.ops.text_attention.Heads`, of heads of 128; by :mod:`swiftwan.ops.text_attention` of others."""
    batch, count, heads, width = key.shape
    if width != WIDTH:
        text_attention.attend_heads(out, scale, q, inverse, weight, key, value, bias, largest)
        return
    length = q.shape[1]
    keys, more = text_attention.key_parts(count)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    groups = groups_of(keys + more)
    programs = min(programs_of(heads * batch, processors), triton.cdiv(length, groups * TOKENS))
    with torch.cuda.device_of(out):
        _text_attend_kernel[(programs, heads, batch)](
            _tiles(q.view(-1, heads * width)), inverse, weight, key, value, largest if bias is None else bias, largest,
            out, largest if scale is None else scale, length, count, length if len(q) == batch else 0,
            width**-0.5 * math.log2(math.e),
            KEYS=keys, MORE=more, PARTS=len(largest), GROUPS=groups, STAGES=STAGES, BIASED=bias is not None,
            num_warps=4,
        )  # fmt: skip


def groups_of(keys: int) -> int:
    """Three groups have 160 registers a thread, which up to 80 keys fit into; two have 240."""
    return 3 if keys <= 80 else 2


def programs_of(heads: int, processors: int) -> int:
    """How many programs share a head's tokens, so that all are done in as few rounds as leave a sixth of the last idle
    at most: 5 for 24 heads and 132 processors, 3 for 80, which take two rounds."""
    rounds = 1
    while processors * rounds // heads * heads < 5 / 6 * processors * rounds:
        rounds += 1
    return processors * rounds // heads


def _tiles(q: Tensor) -> TensorDescriptor:
    block = [TOKENS, WIDTH]
    dtype = gl.bfloat16 if q.dtype is torch.bfloat16 else gl.float16
    return TensorDescriptor.from_tensor(q, block, gl.NVMMASharedLayout.get_default_for(block, dtype))
