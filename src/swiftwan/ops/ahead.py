# mypy: disable-error-code="no-untyped-def"
"""What a process's first kernels wait for, in a thread: it can be done before there are weights."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
import triton


@triton.jit
def _nothing(x):
    pass


def begin(device: torch.device) -> None:
    """Make Triton and cuBLAS ready. What goes wrong there, the first true kernel will tell.

    Before it looks into its cache, Triton hashes its own library of hundreds of MB: 0.33 of the 1.01 s that launching
    a first forward took beside an H200. Its driver, some imports and cuBLAS's handle come to that.
    """
    thread = ThreadPoolExecutor(1)
    thread.submit(_first_kernels, device)
    thread.shutdown(wait=False)


def _first_kernels(device: torch.device) -> float:
    with torch.cuda.device(device):
        square = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
        _nothing[(1,)](square)
        return torch.mm(square, square).sum().item()
