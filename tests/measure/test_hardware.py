import os
import sys
import threading
import time
from subprocess import DEVNULL, PIPE, Popen
from types import SimpleNamespace

import pytest

from swiftwan.measure.hardware import HardwareSampler, NvmlReader, ProcessReader, Reading, gpu_readers, readers
from swiftwan.measure.missing import Missing
from swiftwan.pipelines.result import StepEvent


class NvmlError(Exception):
    pass


class FakeNvml(SimpleNamespace):
    """The module pynvml, for one GPU whose values a test sets."""

    NVMLError = NvmlError
    NVML_TEMPERATURE_GPU = 0
    NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2
    nvmlClocksThrottleReasonSwPowerCap = 4
    nvmlClocksThrottleReasonHwSlowdown = 8
    nvmlClocksThrottleReasonSwThermalSlowdown = 32

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid == "GPU-1234"
        return "handle"

    def nvmlDeviceGetMemoryInfo(self, gpu):
        return SimpleNamespace(used=self.used, free=100 - self.used)

    def nvmlDeviceGetPowerUsage(self, gpu):
        return self.watts * 1000

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu):
        return self.reasons

    def nvmlDeviceGetUtilizationRates(self, gpu):
        return SimpleNamespace(gpu=self.percent, memory=99)

    def nvmlDeviceGetTemperature(self, gpu, which):
        if self.celsius is None:
            raise NvmlError("Not Supported")
        return self.celsius

    def nvmlDeviceGetClockInfo(self, gpu, which):
        return {1: 1980, 2: 3201}[which]

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu):
        if self.joules is None:
            raise NvmlError("Not Supported")
        return self.joules * 1000


def fake_nvml(**values):
    return FakeNvml(**{"used": 10, "watts": 100, "percent": 50, "celsius": 40, "joules": 7, "reasons": 0} | values)


def watch(nvml, moments):
    """Sample by hand at each of (seconds, values of the GPU)."""
    now = [0.0]
    sampler = HardwareSampler([NvmlReader(nvml, "1234")], interval_seconds=1000, clock=lambda: now[0])
    with sampler:
        for seconds, values in moments:
            now[0] = seconds
            vars(nvml).update(values)
            sampler.sample()
    return sampler


def test_a_gpu_tells_everything_in_the_units_of_the_names() -> None:
    reading = NvmlReader(fake_nvml(reasons=32), "1234").read()

    assert reading == Reading(
        memory_used_bytes=10,
        memory_free_bytes=90,
        utilisation_percent=50,
        temperature_celsius=40,
        power_watts=100,
        sm_clock_mhz=1980,
        memory_clock_mhz=3201,
        clocks_held_back=True,
    )


def test_peaks_means_and_energy_by_a_fake_clock() -> None:
    nvml = fake_nvml()
    moments = [(1.0, {"watts": 300, "used": 60, "percent": 100, "celsius": 70}), (4.0, {"joules": 907, "used": 20})]

    found = watch(nvml, moments).trace().devices[0].summary()

    assert found["memory_free_before_bytes"] == 90
    assert found["memory_used_peak_bytes"] == 60
    assert found["temperature_peak_celsius"] == 70
    assert found["utilisation_peak_percent"] == 100
    # 100 to 300 W over the first second, 300 W over the three after it
    assert found["power_mean_watts"] == pytest.approx((200 + 3 * 300) / 4)
    assert found["energy_joules"] == 900
    assert found["energy_from"] == "counter"


def test_without_a_counter_energy_is_power_over_time() -> None:
    nvml = fake_nvml(joules=None, watts=50)

    found = watch(nvml, [(2.0, {}), (10.0, {})]).trace().devices[0]

    assert found.energy_joules == pytest.approx(500)
    assert found.energy_from == "power over time"


def test_what_a_gpu_does_not_tell_is_none_and_the_rest_is_there() -> None:
    found = watch(fake_nvml(celsius=None), [(1.0, {})]).trace().devices[0].summary()

    assert found["temperature_peak_celsius"] is None
    assert found["power_mean_watts"] == 100


def test_phases_are_marked_when_their_last_unit_is_done() -> None:
    now = [10.0]
    sampler = HardwareSampler([], clock=lambda: now[0])
    with sampler:
        for seconds, event in ((11, ("text", 1, 1)), (12, ("denoise", 1, 2)), (14, ("denoise", 2, 2))):
            now[0] = seconds
            sampler.on_step(StepEvent(*event, seconds=0.0))

    assert sampler.trace().phases == ((1, "text"), (4, "denoise"))


def test_memory_over_time_keeps_each_stretchs_highest() -> None:
    trace = watch(fake_nvml(used=1), [(float(i), {"used": 90 if i == 37 else 5}) for i in range(1, 99)]).trace()

    points = trace.devices[0].memory_over_time(points=10)

    assert len(points) == 10
    assert (37.0, 90) in points


def test_the_thread_ends_with_its_run_even_when_the_run_fails() -> None:
    seen = []

    def fail() -> None:
        with HardwareSampler([ProcessReader()], interval_seconds=0.01):
            seen.extend(thread for thread in threading.enumerate() if thread.name == "swiftwan-hardware")
            raise ValueError("the run failed")

    with pytest.raises(ValueError, match="the run failed"):
        fail()

    assert [thread.daemon for thread in seen] == [True]
    assert not seen[0].is_alive()


def test_it_samples_by_itself_and_says_what_that_cost() -> None:
    with HardwareSampler([ProcessReader()], interval_seconds=0.01) as sampler:
        time.sleep(0.2)

    trace = sampler.trace()
    assert len(trace.devices[0].samples) > 4
    assert trace.cost_percent > 0
    assert trace.devices[0].summary()["memory_used_peak_bytes"] > 10**6


def test_a_cpu_is_read_as_this_process() -> None:
    (reader,) = readers("cpu")
    assert reader.read().memory_used_bytes > 0
    assert reader.energy_joules() is None


def test_a_gpu_without_its_driver_is_missing_with_the_reason() -> None:
    for found in (readers("cuda:0"), gpu_readers(["1234"])):
        assert isinstance(found, Missing)
        assert "NVML" in found.reason


def test_another_process_is_read_and_its_successor_after_it() -> None:
    python = [sys.executable, "-c", "print(flush=True); input()"]
    with Popen(python, stdin=PIPE, stdout=PIPE, stderr=DEVNULL) as other:
        other.stdout.readline()  # it is up, and holds the memory of a Python
        now = [other.pid]
        reader = ProcessReader(lambda: now[0])
        assert 2**20 < reader.read().memory_used_bytes < 2**30
    gone = reader.read()
    assert gone.memory_used_bytes is None
    assert gone.memory_free_bytes > 0
    now[0] = os.getpid()
    assert reader.read().memory_used_bytes > 2**25
    now[0] = None
    assert reader.read().memory_used_bytes is None


def test_only_the_last_samples_are_kept_where_that_is_asked() -> None:
    sampler = HardwareSampler([ProcessReader()], interval_seconds=60, kept=2)
    with sampler:
        for _ in range(3):
            sampler.sample()
    (seen,) = sampler.seen()
    assert len(seen) == 2
    assert seen[0].seconds < seen[1].seconds


def test_several_gpus_are_read_by_their_uuids_whatever_their_order(monkeypatch) -> None:
    """NVML's first GPU may be CUDA's second."""
    values = {"GPU-aaaa": 10, "GPU-bbbb": 77}
    nvml = fake_nvml()
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    nvml.nvmlDeviceGetMemoryInfo = lambda gpu: SimpleNamespace(used=values[gpu], free=100 - values[gpu])
    uuids = {"cuda:0": "bbbb", "cuda:1": "aaaa"}
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda name: SimpleNamespace(uuid=uuids[name]))

    found = readers(["cuda:0", "cuda:1"])
    assert isinstance(found, list)
    with HardwareSampler(found, interval_seconds=1000) as sampler:
        pass

    seen = {trace.device: trace.summary()["memory_used_peak_bytes"] for trace in sampler.trace().devices}
    assert seen == {"GPU-bbbb": 77, "GPU-aaaa": 10}
