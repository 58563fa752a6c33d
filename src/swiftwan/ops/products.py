"""How cuBLASLt, torch's library for matrix products, chooses its kernels."""

from __future__ import annotations

import os

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
