# mypy: disable-error-code="no-untyped-def"
"""The choice of blocks of :mod:`swiftwan.ops.sparse` in one pass over the scores. Imported only where Triton is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _keep_best_kernel(scores, blocks, count, kept, COLUMNS: tl.constexpr):
    line = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    value = tl.load(scores + line * count + column, column < count, other=float("-inf"))
    value = tl.where(column == line % count, float("inf"), value)  # the block itself
    # Bits whose order as unsigned integers is that of the numbers.
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)
    # The largest threshold that `kept` scores reach, from its highest bit to its lowest.
    threshold = tl.zeros((), tl.uint32)
    for place in tl.static_range(31, -1, -1):
        higher = threshold | tl.full((), 1 << place, tl.uint32)
        reached = tl.sum((bits >= higher).to(tl.int32), 0)
        threshold = tl.where(reached >= kept, higher, threshold)
    above = bits > threshold
    equal = bits == threshold
    missing = kept - tl.sum(above.to(tl.int32), 0)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= missing))
    rank = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(blocks + line * kept + rank, column, chosen)


def keep_best(scores: Tensor, kept: int) -> Tensor:
    """The ``kept`` largest of each row and the diagonal, of scores (B, H, N, N): int32 (B, H, N, kept), ascending.

    Of equal scores the first ones are taken.
    """
    count = scores.shape[-1]
    blocks = torch.empty(*scores.shape[:-1], kept, dtype=torch.int32, device=scores.device)
    columns = triton.next_power_of_2(count)
    _keep_best_kernel[(scores.numel() // count,)](
        scores.contiguous(), blocks, count, kept, COLUMNS=columns, num_warps=1 if columns <= 512 else 4
    )
    return blocks
