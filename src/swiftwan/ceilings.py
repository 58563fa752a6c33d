"""How fast a machine can be: rates of matrix products, attention, memory and bus, all measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from swiftwan.device import Device

GPU_SIZE, CPU_SIZE = 8192, 1024
"""Rows and columns: large enough that launches do not count; on two CPU cores one product takes 60 ms."""
GPU_BYTES, CPU_BYTES = 2**29, 2**25
"""Copied to time memory and bus."""


@dataclass(frozen=True)
class Ceilings:
    """What one chip reaches in a Wan forward.

    Attributes:
        products: TFLOP/s by what linear layers multiply in: ``16`` (bf16, fp16), ``fp8``, ``int8``, ``tf32``, ``fp32``.
        attention: TFLOP/s of self-attention by kernel; ``fp32`` is torch's own choice for float32.
        memory, bus: bytes a second of device memory, and from pinned host memory to it.
        decode: TFLOP/s of a VAE's decoder in 16 bits, plain and with ``vae:fast``, by the channels of its last level.
        launch_seconds: host time of one block's launches: plain, and fused.
        gap_seconds: between one block's kernels where they follow each other at once: plain, and fused.
        around_blocks, around_forwards: seconds of a forward outside its blocks, and of a step outside its forwards
            (guidance, solver).
        source: where the numbers are from.
    """

    products: Mapping[str, float]
    attention: Mapping[str, float]
    memory: float
    bus: float
    decode: Mapping[int, tuple[float, float]]
    launch_seconds: tuple[float, float]
    gap_seconds: tuple[float, float]
    around_blocks: float
    around_forwards: float
    source: str


H200 = Ceilings(
    # int8 by torchao, whose rounding of each layer's input takes most of it: 3.97 s a step where bf16 takes 1.24.
    products={"16": 720, "fp8": 1150, "int8": 54, "tf32": 400, "fp32": 52},
    attention={
        **{"sdpa": 550, "cudnn": 575, "flash4": 685, "flash3": 600, "flash2": 352, "sage": 430},
        "fp8": 870,  # with its rounding: 218 and 7 ms of a forward of 1.3B at 832x480x81
        "fp32": 46,  # what a forward of 6.25 s has beside products and passes (h200_seed_001/rows.jsonl)
        "fp8-plain": 20,  # a check that forms the matrix in float32; not measured
    },
    memory=4.0e12,
    bus=55e9,
    decode={96: (222, 655), 256: (470, 1014)},
    launch_seconds=(1e-3, 3e-4),
    # Of pictures, whose kernels are short: 1 ms between the 500 fused ones of a replayed forward, 1.2 ms of kernels
    # that are no block's (LOG.md); plain, what else two forwards of 16.6 ms take (h200_forward.jsonl).
    gap_seconds=(6e-5, 3.3e-5),
    around_blocks=1.2e-3,
    around_forwards=2.9e-3,  # of a picture 19.1 ms (h200_techniques.jsonl) with forwards of 16.2 (h200_forward.jsonl)
    source="measured on an H200 with torch 2.11 (benchmarks/h200_*.jsonl)",
)

KNOWN = {"NVIDIA H200": H200}


def ceilings_of(device: Device) -> Ceilings:
    """The table's for a chip that is in it; else measured here, in less than a second, once a process."""
    return KNOWN.get(device.name) or _measured(device.torch_device, device.dtype)


@cache
def _measured(torch_device: str, dtype: torch.dtype) -> Ceilings:
    """A product, a copy within memory and one over the bus; the others are taken to stand to these as on the H200."""
    device = torch.device(torch_device)
    rate = product_tflop_per_second(device, dtype, repeats=1)
    memory, bus = _copy_rates(device)
    if device.type != "cuda":
        every = dict.fromkeys
        return Ceilings(
            products=every(H200.products, rate),
            attention=every(H200.attention, rate / 2),
            memory=memory,
            bus=bus,
            decode={96: (rate / 2, rate / 2)},
            launch_seconds=(0.0, 0.0),
            gap_seconds=(0.0, 0.0),
            around_blocks=0.0,
            around_forwards=0.0,
            source="from a matrix product and a copy measured here",
        )
    scale = rate / H200.products["fp32" if dtype is torch.float32 else "16"]
    return replace(
        H200,
        products={name: one * scale for name, one in H200.products.items()},
        attention={name: one * scale for name, one in H200.attention.items()},
        memory=memory,
        bus=bus,
        decode={width: (plain * scale, fast * scale) for width, (plain, fast) in H200.decode.items()},
        source="from a matrix product and copies measured here; what kernels reach of them as on an H200",
    )


def product_tflop_per_second(device: torch.device, dtype: torch.dtype, *, repeats: int = 8) -> float:
    """Rate of the fastest of some square matrix products, in TFLOP/s, two operations a multiply-add."""
    size = CPU_SIZE if device.type == "cpu" else GPU_SIZE
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)
    best = min(_seconds(lambda: torch.mm(a, b, out=out), device) for _ in range(repeats + 2))
    return 2 * size**3 / best / 1e12


def _copy_rates(device: torch.device) -> tuple[float, float]:
    """Bytes a second that the device reads and writes, and that come from pinned host memory."""
    size = CPU_BYTES if device.type == "cpu" else GPU_BYTES
    here, there = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    memory = 2 * size / min(_seconds(lambda: there.copy_(here), device) for _ in range(3))
    if device.type != "cuda":
        return memory, memory
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    return memory, size / min(_seconds(lambda: there.copy_(host, non_blocking=True), device) for _ in range(3))


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
