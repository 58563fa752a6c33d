# mypy: disable-error-code="no-untyped-def"
"""What the Gluon kernels for Hopper share. Imported only there."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

TURN = 12
"""Blocks of one turn of a product's loop, at most: nothing may be on its way over its edge."""


def turn_of(blocks: int) -> int:
    """Blocks of a turn, the most of 4 to 12 that divide them; 0 where none does. Shorter turns would wait for their
    products more than they multiply."""
    return next((count for count in range(TURN, 3, -1) if blocks % count == 0), 0)


@gluon.jit
def ring_barriers(SLOTS: gl.constexpr, READERS: gl.constexpr):
    """Of each slot of a ring in shared memory what says that its block is there, and that all its readers let it go."""
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(free.index(slot), count=READERS)
    return ready, free


@gluon.constexpr_function
def neighbours(rows, columns):
    """What a thread has of its group's rows once columns are in order: 8 in a row of every 32, of two rows of 64."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 32], [0, 64], [8, 0], *([64, 0] for _ in range(rows // 128))],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[rows, columns],
    )


@gluon.jit
def in_order(x):
    """Columns 32 a + 8 b + 2 t + e to 32 a + 8 t + 2 b + e, and back.

    Of a product a thread has two neighbours of every eight columns, one t of four and all b; of a product whose columns
    were moved before, 8 neighbours of every 32 once they are back.
    """
    ROWS: gl.constexpr = x.shape[0]
    COLUMNS: gl.constexpr = x.shape[1]
    moved = gl.permute(gl.reshape(x, [ROWS, COLUMNS // 32, 4, 4, 2]), [0, 1, 3, 2, 4])
    return gl.reshape(moved, [ROWS, COLUMNS])


@gluon.jit
def to_e4m3(x):
    """float32 to E4M3, the largest for what is beyond it; four at once, where Triton's own conversion takes a byte each
    and packs them again. Each thread has a multiple of four in a row."""
    return gl.inline_asm_elementwise(
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; "
        "cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }",
        "=r,r,r,r,r",
        [x],
        dtype=gl.float8e4nv,
        is_pure=True,
        pack=4,
    )
