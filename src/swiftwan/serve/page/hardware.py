"""What the workers' hardware does now, for the page's left side."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil

KEPT = 300


@dataclass(frozen=True)
class Reading:
    """None is what the hardware does not tell. On a CPU the memory is that of the worker process."""

    at: float
    used_gb: float | None = None
    free_gb: float | None = None
    busy_percent: float | None = None
    celsius: float | None = None
    watts: float | None = None


class Hardware:
    """Reads once a second, in a thread that dies with the process; keeps the last five minutes."""

    def __init__(self, device: str, processes: Sequence[int]) -> None:
        self.device = device
        self.processes = processes
        self.readings: deque[Reading] = deque(maxlen=KEPT)
        threading.Thread(target=self._watch, name="hardware", daemon=True).start()

    def _watch(self) -> None:
        began = time.monotonic()
        while True:
            at = time.monotonic() - began
            self.readings.append(self._gpu(at) if self.device.startswith("cuda") else self._cpu(at))
            time.sleep(1)

    def _cpu(self, at: float) -> Reading:
        used = 0
        for process in list(self.processes):
            with suppress(psutil.Error):
                used += psutil.Process(process).memory_info().rss
        free = psutil.virtual_memory().available
        return Reading(at, used / 1e9, free / 1e9, psutil.cpu_percent())

    def _gpu(self, at: float) -> Reading:
        """Through torch, which finds NVML's index for CUDA's; what a chip does not tell stays None."""
        import torch

        index = int(self.device.partition(":")[2] or 0)
        try:
            used = torch.cuda.device_memory_used(index)
            return Reading(
                at,
                used / 1e9,
                None,
                torch.cuda.utilization(index),
                torch.cuda.temperature(index),
                torch.cuda.power_draw(index) / 1000,
            )
        except (RuntimeError, ModuleNotFoundError):  # no NVML here, or the GPU was lost
            return Reading(at)
