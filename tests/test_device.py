"""device.py: the right device and number format, and clear words where there is none."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from swiftwan import device
from swiftwan.errors import RequestError, UnavailableError


@pytest.fixture
def no_cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Two GPUs as torch would show them; the test may change the properties."""
    properties = SimpleNamespace(name="NVIDIA Test", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"NVIDIA Test {i}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (60 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda i: 1.0)
    return properties


def test_the_cpu() -> None:
    cpu = device.pick_device("cpu")
    assert cpu.torch_device == "cpu"
    assert cpu.dtype == torch.float32
    assert cpu.capability is None
    assert 0 < cpu.free_bytes <= cpu.total_bytes <= psutil.virtual_memory().total
    assert 1 <= cpu.cores <= (os.cpu_count() or 1)
    assert cpu.name


def test_without_cuda_the_cpu_is_picked(no_cuda_build: None) -> None:
    assert device.pick_device().torch_device == "cpu"


def test_a_gpu_is_picked_first(two_gpus: SimpleNamespace) -> None:
    gpu = device.pick_device()
    assert (gpu.torch_device, gpu.name, gpu.capability, gpu.cores) == ("cuda:0", "NVIDIA Test", (9, 0), 132)
    assert (gpu.total_bytes, gpu.free_bytes) == (80 * 2**30, 60 * 2**30)
    assert device.pick_device("cuda:1").torch_device == "cuda:1"
    assert device.pick_device(" CUDA ").torch_device == "cuda:0"


def test_what_a_process_may_not_take_is_not_there_for_it(
    two_gpus: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda i: 0.1)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda i: 2**30)
    gpu = device.pick_device()
    assert (gpu.total_bytes, gpu.free_bytes) == (8 * 2**30, 7 * 2**30)


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((9, 0), torch.bfloat16, "sm90 has bf16"),
        ((8, 0), torch.bfloat16, "sm80 has bf16"),
        ((7, 5), torch.float16, "sm75 has no bf16"),
    ],
)
def test_dtype_follows_the_chip(
    two_gpus: SimpleNamespace, capability: tuple[int, int], dtype: torch.dtype, reason: str
) -> None:
    two_gpus.major, two_gpus.minor = capability
    gpu = device.pick_device("cuda")
    assert gpu.dtype == dtype
    assert reason in gpu.dtype_reason


def test_a_gpu_that_is_not_there(two_gpus: SimpleNamespace) -> None:
    with pytest.raises(UnavailableError) as refused:
        device.pick_device("cuda:7")
    told = "device is 'cuda:7'; here are cuda:0 (NVIDIA Test 0), cuda:1 (NVIDIA Test 1)."
    assert str(refused.value) == told


def test_cuda_from_a_cpu_build(no_cuda_build: None) -> None:
    with pytest.raises(UnavailableError, match="built without CUDA: install a CUDA build.*--device cpu"):
        device.pick_device("cuda")


@pytest.mark.parametrize(
    ("visible", "words"), [(None, "see whether nvidia-smi"), ("", "CUDA_VISIBLE_DEVICES='': unset it")]
)
def test_cuda_without_a_gpu(monkeypatch: pytest.MonkeyPatch, visible: str | None, words: str) -> None:
    def init() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system. Please check that\nyou have one")

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UnavailableError) as refused:
        device.pick_device("cuda:0")
    assert "'Found no NVIDIA driver on your system'" in str(refused.value)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("cdua", "Did you mean 'cuda'"),
        ("tpu-v5", "cpu, cuda, mps"),
        ("cuda:x", "cuda"),
        ("cuda:-1", "cuda"),
        ("", "cpu"),
    ],
)
def test_words_that_name_no_device(wanted: str, words: str) -> None:
    with pytest.raises(RequestError) as refused:
        device.pick_device(wanted)
    assert f"device is '{wanted}'." in str(refused.value)
    assert words in str(refused.value)


def test_a_second_cpu() -> None:
    with pytest.raises(UnavailableError, match="there is one cpu here"):
        device.pick_device("cpu:1")


@pytest.mark.parametrize(
    ("word", "dtype"),
    [
        ("bf16", torch.bfloat16),
        ("BFloat16", torch.bfloat16),
        ("fp16", torch.float16),
        ("half", torch.float16),
        ("torch.float32", torch.float32),
        ("fp32", torch.float32),
    ],
)
def test_dtype_words(word: str, dtype: torch.dtype) -> None:
    assert device.parse_dtype(word) == dtype


def test_a_word_that_is_no_dtype() -> None:
    with pytest.raises(RequestError, match="dtype is 'bf61'. Did you mean 'bf16'"):
        device.parse_dtype("bf61")


def test_a_containers_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"memory.max": "1000\n", "memory.current": "400\n"}
    monkeypatch.setattr(Path, "read_text", lambda self: values[self.name])
    assert device.host_memory() == (1000, 600)
    values["memory.max"] = "max\n"
    assert device.host_memory()[0] == psutil.virtual_memory().total


def test_versions() -> None:
    versions = device.versions()
    assert set(versions) == {"swiftwan", "python", "torch", "diffusers", "transformers"}
    assert versions["torch"] == torch.__version__


def test_peak_bytes_grow_with_use() -> None:
    cpu = device.pick_device("cpu")
    before = device.peak_bytes(cpu)
    held = bytearray(before + 2**26)  # above the peak so far, whatever the tests before took
    held[::4096] = b"x" * len(held[::4096])
    assert device.peak_bytes(cpu) >= before + 2**26
    assert device.peak_bytes(cpu) < 100 * 2**30  # the unit is bytes


def test_import_probes_nothing() -> None:
    program = "import sys, swiftwan.device as d; d.versions(); d.host_memory(); print('torch' in sys.modules)"
    env = os.environ | {"PYTHONPATH": str(Path(device.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, check=True)
    assert done.stdout == "False\n"


@pytest.mark.gpu
def test_a_real_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    gpu = device.pick_device("cuda")
    assert gpu.total_bytes >= gpu.free_bytes > 0
    torch.cuda.reset_peak_memory_stats()
    held = torch.empty(2**20, device=gpu.torch_device)
    assert device.peak_bytes(gpu) >= held.nbytes
    assert device.versions(gpu)["cuda"] == torch.version.cuda
    with pytest.raises(UnavailableError, match="here are cuda:0"):
        device.pick_device(f"cuda:{torch.cuda.device_count()}")
