# mypy: disable-error-code="no-untyped-def"
"""What the Gluon kernels for Hopper share. Imported only there."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

TURN = 12
"""Blocks of one turn of a product's loop, at most: nothing may be on its way over its edge."""


def turn_of(blocks: int) -> int:
    """Blocks of a turn, the most of 4 to 12 that divide them; 0 where none does. Shorter turns would wait for their
    products more than they multiply."""
    return next((count for count in range(TURN, 3, -1) if blocks % count == 0), 0)


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
