"""How cuBLASLt, torch's library for matrix products, chooses its kernels, and which products it has no tiles for."""

from __future__ import annotations

import os
from math import ceil

SETTINGS = {"CUBLASLT_WORKSPACE_SIZE": "0", "TORCH_CUBLASLT_UNIFIED_WORKSPACE": "0"}
"""torch reads them once, before the first product of a process."""


def without_workspace() -> None:
    """Let it choose among the kernels that need no memory of their own.

    Those that hand out tiles by a counter clear it by a memset before each product, 150 of the 722 launches of a guided
    step of one picture in 8 bits; the others have the same tiles in a fixed order. On an H200 that step takes 12.4
    instead of 12.8 ms, in 16 bits 15.5 instead of 15.7, and forwards of a video as long as before. What the user set
    stands.
    """
    if not SETTINGS.keys() & os.environ.keys():
        os.environ.update(SETTINGS)


TALL_TILE = (320, 128)
"""Rows and columns of a tile of :mod:`swiftwan.ops.tall_product`."""


def fills_one_round(rows: int, columns: int, processors: int) -> bool:
    """Whether tall tiles are done in one round, of the time of two and a half of 128 x 128, where those take three.

    Of Wan 1.3B's products for two pictures of 832x480 these are the ones to 1536 columns. Those to 4608 and 8960 take
    7 and 14 rounds of 128 x 128, 95 and 92 % full: nothing to win.
    """
    height, width = TALL_TILE
    square = 128
    tall = ceil(rows / height) * ceil(columns / width)
    return tall <= processors and ceil(rows / square) * ceil(columns / square) > 2 * processors
