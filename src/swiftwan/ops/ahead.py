# mypy: disable-error-code="no-untyped-def"
"""What a process's first kernels wait for, in a thread: it can be done before there are weights."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
import triton


@triton.jit
def _nothing():
    pass


def begin(device: torch.device) -> None:
    """Make Triton and cuBLAS ready. What goes wrong there, the first true kernel will tell.

    Triton hashes itself, a library of 500 MB, before it looks into its cache: 0.4 s; its driver and cuBLAS's handle
    come to that.
    """
    thread = ThreadPoolExecutor(1)
    thread.submit(_first_kernels, device)
    thread.shutdown(wait=False)


def _first_kernels(device: torch.device) -> float:
    with torch.cuda.device(device):
        _nothing[(1,)]()
        square = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
        return torch.mm(square, square).sum().item()
