"""The machine's ceiling: the fastest matrix product it does, measured, not read off a data sheet."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

GPU_SIZE, CPU_SIZE = 8192, 1024
"""Rows and columns: large enough that launches do not count; on two CPU cores one product takes 60 ms."""


def product_tflop_per_second(device: torch.device, dtype: torch.dtype, *, repeats: int = 8) -> float:
    """Rate of the fastest of some square matrix products, in TFLOP/s, two operations a multiply-add."""
    size = CPU_SIZE if device.type == "cpu" else GPU_SIZE
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)
    best = min(_seconds(lambda: torch.mm(a, b, out=out), device) for _ in range(repeats + 2))
    return 2 * size**3 / best / 1e12


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000
