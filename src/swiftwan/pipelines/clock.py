"""Times of a run without a sync in its loop: device events where there is a device, else the host's clock."""

from __future__ import annotations

import time

import torch


class Clock:
    """Marks moments as a run passes them; reads them when it is over."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._device = device
        self._marks: list[tuple[str, torch.cuda.Event | float]] = []
        self.mark("start")

    def mark(self, phase: str) -> None:
        """Note that a unit of ``phase`` has just ended."""
        if not self._on_gpu:
            self._marks.append((phase, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append((phase, event))

    def units(self, phase: str) -> tuple[float, ...]:
        """Seconds of each unit of a phase, in order."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return tuple(self._between(a, b) for (_, a), (name, b) in pairs if name == phase)

    def seconds(self) -> dict[str, float]:
        """Seconds by phase, and their total."""
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        phases = dict.fromkeys(name for name, _ in self._marks[1:])
        times = {phase: sum(self.units(phase)) for phase in phases}
        return times | {"total": sum(times.values())}

    def _between(self, a: torch.cuda.Event | float, b: torch.cuda.Event | float) -> float:
        if isinstance(a, float) or isinstance(b, float):
            assert isinstance(a, float)
            assert isinstance(b, float)
            return b - a
        return a.elapsed_time(b) / 1000
