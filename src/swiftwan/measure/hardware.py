"""What the hardware did while a run went on: a thread reads it a few times a second and dies with the run.

    with HardwareSampler(readers("cuda:0")) as sampler:
        engine.run(request, on_step=sampler.on_step)
    trace = sampler.trace()

A GPU is asked through NVML by its UUID, since NVML counts GPUs otherwise than CUDA does. A poll misses short
peaks of memory: the peak that counts is torch's (``Result.peak_bytes``).
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

from swiftwan.measure.missing import Missing

if TYPE_CHECKING:
    from swiftwan.pipelines.result import StepEvent

INTERVAL_SECONDS = 0.2
"""NVML's own values change about as often (its power is a mean of about a second)."""


@dataclass(frozen=True)
class Reading:
    """What one device showed at one moment; None is what it does not tell.

    Attributes:
        memory_used_bytes, memory_free_bytes: of the whole device, other processes counted in; of a CPU the
            process's resident memory and what the machine has left.
        utilisation_percent: share of time in which something ran, which is not how much of the chip did; of
            a CPU the share of all its threads.
        clocks_held_back: the chip runs below what it could, for heat or power.
    """

    memory_used_bytes: int | None = None
    memory_free_bytes: int | None = None
    utilisation_percent: float | None = None
    temperature_celsius: float | None = None
    power_watts: float | None = None
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    clocks_held_back: bool | None = None


@dataclass(frozen=True)
class Sample:
    """A reading, and when it was taken: seconds since the sampler started."""

    seconds: float
    reading: Reading


class Reader(Protocol):
    """One device. ``energy_joules`` is a counter that only rises; None where there is none."""

    name: str

    def read(self) -> Reading: ...
    def energy_joules(self) -> float | None: ...


class ProcessReader:
    """A process on the CPU, for machines without a GPU.

    Args:
        process_id: asked for at each reading, since a process may be replaced by another; None while there is none.
    """

    name = "process"

    def __init__(self, process_id: Callable[[], int | None] = os.getpid) -> None:
        import psutil

        self._process_id = process_id
        self._machine = psutil
        self._threads = psutil.cpu_count() or 1
        self._process: psutil.Process | None = None
        self.read()  # the first only sets the mark that the next one counts from

    def read(self) -> Reading:
        free = self._machine.virtual_memory().available
        process_id = self._process_id()
        try:
            if process_id is not None and (self._process is None or self._process.pid != process_id):
                self._process = self._machine.Process(process_id)
            if process_id is None or self._process is None:
                return Reading(memory_free_bytes=free)
            return Reading(
                memory_used_bytes=self._process.memory_info().rss,
                memory_free_bytes=free,
                utilisation_percent=self._process.cpu_percent() / self._threads,
            )
        except self._machine.Error:  # it has just ended
            return Reading(memory_free_bytes=free)

    def energy_joules(self) -> float | None:
        return None


class NvmlReader:
    """One NVIDIA GPU.

    Args:
        nvml: the module ``pynvml`` of nvidia-ml-py, initialised.
        uuid: as torch has it, without ``GPU-``.
    """

    def __init__(self, nvml: Any, uuid: str) -> None:
        self._nvml = nvml
        self._gpu = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        self.name = f"GPU-{uuid}"

    def read(self) -> Reading:
        nvml, gpu = self._nvml, self._gpu
        memory = self._told(lambda: nvml.nvmlDeviceGetMemoryInfo(gpu))
        power = self._told(lambda: nvml.nvmlDeviceGetPowerUsage(gpu))
        held = self._told(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu))
        slow = (
            nvml.nvmlClocksThrottleReasonSwPowerCap
            | nvml.nvmlClocksThrottleReasonHwSlowdown
            | nvml.nvmlClocksThrottleReasonSwThermalSlowdown
        )
        return Reading(
            memory_used_bytes=memory.used if memory else None,
            memory_free_bytes=memory.free if memory else None,
            utilisation_percent=self._told(lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu),
            temperature_celsius=self._told(lambda: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU)),
            power_watts=None if power is None else power / 1000,
            sm_clock_mhz=self._told(lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM)),
            memory_clock_mhz=self._told(lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM)),
            clocks_held_back=None if held is None else bool(held & slow),
        )

    def energy_joules(self) -> float | None:
        counter = self._told(lambda: self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu))
        return None if counter is None else counter / 1000

    def _told(self, ask: Callable[[], Any]) -> Any:
        """A chip, driver or container may not tell everything, and a GPU may fall off the bus: None then."""
        with suppress(self._nvml.NVMLError):
            return ask()
        return None


def readers(torch_devices: str | Sequence[str]) -> list[Reader] | Missing:
    """Readers of these devices, as torch spells them: GPUs through NVML, else this process.

    Returns Missing where a GPU cannot be asked: the library or its driver is not there.
    """
    import torch

    names = [torch_devices] if isinstance(torch_devices, str) else list(torch_devices)
    if not any(name.startswith("cuda") for name in names):
        return [ProcessReader()]
    nvml = _nvml()
    if isinstance(nvml, Missing):
        return nvml
    return _opened(nvml, [str(torch.cuda.get_device_properties(name).uuid) for name in names])


def gpu_readers(uuids: Sequence[str]) -> list[Reader] | Missing:
    """Readers of GPUs by their UUIDs; this needs no CUDA, of which each process pays hundreds of MB."""
    nvml = _nvml()
    return nvml if isinstance(nvml, Missing) else _opened(nvml, uuids)


def _opened(nvml: Any, uuids: Sequence[str]) -> list[Reader] | Missing:
    try:
        return [NvmlReader(nvml, uuid) for uuid in uuids]
    except nvml.NVMLError as error:
        return Missing(f"NVML cannot be asked: {error}")


def _nvml() -> Any | Missing:
    try:
        import pynvml
    except ModuleNotFoundError:
        return Missing("nvidia-ml-py is not installed; pip install nvidia-ml-py")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Missing(f"NVML cannot be asked: {error}")
    return pynvml


@dataclass(frozen=True)
class DeviceTrace:
    """What one device showed over a run.

    ``energy_joules`` comes from the device's counter, or else from the power's integral: ``energy_from``
    says which.
    """

    device: str
    samples: tuple[Sample, ...]
    energy_joules: float | None
    energy_from: str | None

    def summary(self) -> dict[str, Any]:
        """Peaks and means over the samples; None where the device told nothing."""
        return {
            "device": self.device,
            "memory_free_before_bytes": next(iter(self._all("memory_free_bytes")), None),
            "memory_used_peak_bytes": max(self._all("memory_used_bytes"), default=None),
            "utilisation_mean_percent": _mean(self._all("utilisation_percent")),
            "utilisation_peak_percent": max(self._all("utilisation_percent"), default=None),
            "temperature_peak_celsius": max(self._all("temperature_celsius"), default=None),
            "power_mean_watts": _mean_over_time(self.samples, "power_watts"),
            "sm_clock_mean_mhz": _mean(self._all("sm_clock_mhz")),
            "memory_clock_mean_mhz": _mean(self._all("memory_clock_mhz")),
            "clocks_held_back_percent": _mean([100.0 * held for held in self._all("clocks_held_back")]),
            "energy_joules": self.energy_joules,
            "energy_from": self.energy_from,
        }

    def memory_over_time(self, points: int = 200) -> list[tuple[float, int]]:
        """(seconds, bytes used), at most so many points; of each stretch its highest."""
        known = [(s.seconds, s.reading.memory_used_bytes) for s in self.samples]
        values = [(seconds, used) for seconds, used in known if used is not None]
        stretch = -(-len(values) // points) or 1
        return [max(values[i : i + stretch], key=lambda value: value[1]) for i in range(0, len(values), stretch)]

    def _all(self, name: str) -> list[Any]:
        values = (getattr(sample.reading, name) for sample in self.samples)
        return [value for value in values if value is not None]


@dataclass(frozen=True)
class Trace:
    """What the hardware did over a run.

    Attributes:
        devices: one trace a device.
        phases: (seconds, phase) when a phase ended, by the host's clock: a GPU that still has work in its queue
            is behind it.
        cost_percent: CPU time of the sampling thread, as a share of the run.
    """

    devices: tuple[DeviceTrace, ...]
    phases: tuple[tuple[float, str], ...]
    cost_percent: float

    def to_json(self) -> dict[str, Any]:
        return {
            "devices": [device.summary() for device in self.devices],
            "memory_over_time": [device.memory_over_time() for device in self.devices],
            "phases": list(self.phases),
            "cost_percent": self.cost_percent,
        }


class HardwareSampler:
    """Reads devices from a thread of its own, from entering the context to leaving it.

    Args:
        readers: one a device.
        interval_seconds: between readings.
        kept: how many readings of each device are kept, the last ones; None is all.
        clock: seconds; replaced in tests.
    """

    def __init__(
        self,
        readers: Sequence[Reader],
        *,
        interval_seconds: float = INTERVAL_SECONDS,
        kept: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._readers = readers
        self._interval_seconds = interval_seconds
        self._clock = clock
        self._samples: list[deque[Sample]] = [deque(maxlen=kept) for _ in readers]
        self._phases: list[tuple[float, str]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="swiftwan-hardware", daemon=True)
        self._cpu_seconds = 0.0

    def __enter__(self) -> Self:
        self._started = self._clock()
        self._energy_before = [reader.energy_joules() for reader in self._readers]
        self.sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.sample()
        self._energy_after = [reader.energy_joules() for reader in self._readers]
        self._seconds = self._clock() - self._started

    def on_step(self, event: StepEvent) -> None:
        """Note where a phase ends; to be given to ``Engine.run``."""
        if event.step == event.steps:
            self.mark(event.phase)

    def mark(self, phase: str) -> None:
        """Note that a phase has just ended."""
        self._phases.append((self._clock() - self._started, phase))

    def sample(self) -> None:
        """Read every device once."""
        now = self._clock() - self._started
        for reader, samples in zip(self._readers, self._samples, strict=True):
            samples.append(Sample(now, reader.read()))

    def seen(self) -> list[tuple[Sample, ...]]:
        """The readings so far, a tuple a device."""
        return [tuple(samples) for samples in self._samples]

    def trace(self) -> Trace:
        """What was seen; call it after the context ended."""
        assert self._ended.is_set(), "the trace is whole when the context has ended"
        before, after = self._energy_before, self._energy_after
        traces = [
            _device_trace(reader.name, tuple(samples), then, now)
            for reader, samples, then, now in zip(self._readers, self._samples, before, after, strict=True)
        ]
        return Trace(tuple(traces), tuple(self._phases), 100 * self._cpu_seconds / max(self._seconds, 1e-9))

    def _watch(self) -> None:
        while not self._ended.wait(self._interval_seconds):
            self.sample()
            self._cpu_seconds = time.thread_time()


def _device_trace(name: str, samples: tuple[Sample, ...], before: float | None, after: float | None) -> DeviceTrace:
    if before is not None and after is not None:
        return DeviceTrace(name, samples, after - before, "counter")
    watts = _mean_over_time(samples, "power_watts")
    if watts is None:
        return DeviceTrace(name, samples, None, None)
    return DeviceTrace(name, samples, watts * (samples[-1].seconds - samples[0].seconds), "power over time")


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _mean_over_time(samples: Sequence[Sample], name: str) -> float | None:
    """The integral over time, by trapezoids, through its length: samples need not be equally far apart."""
    known = [(s.seconds, getattr(s.reading, name)) for s in samples if getattr(s.reading, name) is not None]
    if not known:
        return None
    if len(known) == 1 or known[-1][0] == known[0][0]:
        return float(known[0][1])
    pairs = zip(known, known[1:], strict=False)
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairs)
    return float(area / (known[-1][0] - known[0][0]))
