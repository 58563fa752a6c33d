"""FlashAttention-4's tiles on Hopper at the shapes of Wan's self-attention, turn about.

    python benchmarks/h200_attention_tiles.py [TOKENSxHEADS ...]        # default: 32760x12 27280x24 75600x40 1560x12

A tile is (queries, keys), and whether P stays in registers between the two products. Prints milliseconds (median) and
TFLOP/s, fastest first. A chip at its power limit gives more to whoever comes after a slow one: tiles that spill are
left out, since they lift the next (``benchmarks/h200_attention_tiles.txt`` says which).
"""

from __future__ import annotations

import statistics
import sys

import torch
from torch import Tensor

TILES = (
    ((128, 128), True),
    ((128, 144), True),
    ((128, 176), True),
    ((192, 80), True),
    ((192, 96), False),
    ((192, 112), False),
    ((192, 128), False),
)
WIDTH = 128
ROUNDS = 7


def milliseconds(tile: tuple[int, int], in_registers: bool, q: Tensor, k: Tensor, v: Tensor, times: int) -> float:
    from flash_attn.cute.interface import _flash_attn_fwd

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        _flash_attn_fwd(q, k, v, tile_mn=tile, mma_pv_is_rs=in_registers)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / times


@torch.no_grad()
def main() -> None:
    for shape in sys.argv[1:] or ("32760x12", "27280x24", "75600x40", "1560x12"):
        tokens, heads = map(int, shape.split("x"))
        q, k, v = (torch.randn(1, tokens, heads, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        flop = 4 * heads * tokens**2 * WIDTH
        times = max(1, min(20, int(3e13 / flop)))
        taken: dict[tuple[tuple[int, int], bool], list[float]] = {which: [] for which in TILES}
        for round_ in range(ROUNDS + 1):  # the first compiles
            for which in TILES:
                ms = milliseconds(*which, q, k, v, times)
                if round_:
                    taken[which].append(ms)
        for which in sorted(TILES, key=lambda which: statistics.median(taken[which])):
            ms = statistics.median(taken[which])
            (queries, keys), in_registers = which
            where = "registers" if in_registers else "shared memory"
            print(
                f"{shape:10} {queries}x{keys}, P in {where:13} {ms:9.4f} ms {flop / ms / 1e9:7.1f} TFLOP/s", flush=True
            )


if __name__ == "__main__":
    main()
