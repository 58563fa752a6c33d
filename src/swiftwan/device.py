"""What this machine has, and the number format that follows from it.

Nothing is probed at import, and torch is imported only by the functions that ask it something:
it takes two seconds, and ``swiftwan info`` needs none of it.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from swiftwan.errors import RequestError, UnavailableError, did_you_mean

if TYPE_CHECKING:
    import torch

_DTYPES = {
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float32": "float32",
}


@dataclass(frozen=True)
class Device:
    """One place where a model can run.

    Attributes:
        torch_device: as torch spells it: ``cuda:0``, ``cpu``, ``mps``.
        name: the vendor's name of the chip.
        total_bytes, free_bytes: its memory; on a CPU that of the process (a container's limit counts).
        capability: CUDA compute capability, ``(9, 0)`` on an H200; None elsewhere.
        cores: streaming multiprocessors of a GPU, usable threads of a CPU.
        dtype: what a model runs in here unless told otherwise.
        dtype_reason: why that one.
    """

    torch_device: str
    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int] | None
    cores: int
    dtype: torch.dtype
    dtype_reason: str


def pick_device(wanted: str | None = None) -> Device:
    """Return the device asked for, or the best one here: the first CUDA GPU, else the CPU.

    Args:
        wanted: ``cuda``, ``cuda:N``, ``cpu`` or ``mps``; None picks. ``mps`` is untested,
            so never picked unasked.

    Raises:
        UnavailableError: this machine has no such device; says why and what it has.
        RequestError: not the name of a device.
    """
    if wanted is None:
        return _cuda(0) if cuda_problem() is None else _cpu()
    kind, index = check_device(wanted)
    return _cuda(index) if kind == "cuda" else _cpu() if kind == "cpu" else _mps()


def check_device(wanted: str) -> tuple[str, int]:
    """Read a device's name into kind and number, and see that it is here; takes no memory on it.

    Raises:
        UnavailableError, RequestError: as :func:`pick_device`.
    """
    word = wanted.strip().lower()
    kind, _, digits = word.partition(":")
    index = int(digits) if digits.isdecimal() else 0
    if not re.fullmatch(r"(cuda|cpu|mps)(:\d+)?", word):
        raise RequestError(f"device is '{wanted}'." + did_you_mean(kind, ("cpu", "cuda", "mps")))
    if kind == "cuda":
        if problem := cuda_problem():
            raise UnavailableError(f"device is '{wanted}', but {problem}, or use '--device cpu'.")
        import torch

        if index >= (count := torch.cuda.device_count()):
            here = ", ".join(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(count))
            raise UnavailableError(f"device is 'cuda:{index}'; here are {here}.")
    elif index:
        raise UnavailableError(f"device is '{wanted}'; there is one {kind} here. Use '--device {kind}'.")
    return kind, index


def cuda_problem() -> str | None:
    """Return why CUDA cannot be used here, with what to do about it; None if it can."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"this torch ({torch.__version__}) was built without CUDA: install a CUDA build (pytorch.org/get-started)"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns here about what we are about to say as an error
        if torch.cuda.is_available():
            return None
        try:
            torch.cuda.init()
        except RuntimeError as error:
            told = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        else:
            told = "No CUDA GPUs are available"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"torch says '{told}' with CUDA_VISIBLE_DEVICES='{visible}': unset it to see every GPU"
    return f"torch says '{told}': see whether nvidia-smi lists a GPU (driver, container's GPU access)"


def parse_dtype(word: str) -> torch.dtype:
    """Return the torch dtype for ``bf16``, ``fp16``, ``fp32`` or torch's own names for them.

    Raises:
        RequestError: not one of these.
    """
    import torch

    name = _DTYPES.get(word.strip().lower().removeprefix("torch."))
    if name is None:
        raise RequestError(f"dtype is '{word}'." + did_you_mean(word, _DTYPES))
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def versions(device: Device | None = None) -> dict[str, str]:
    """Return the versions that shape a run's numbers; with a CUDA device also torch's CUDA.

    Read from the installed packages' metadata: nothing heavy is imported for it.
    """
    found = {"swiftwan": _version("swiftwan", otherwise="source tree"), "python": platform.python_version()}
    found |= {name: _version(name) for name in ("torch", "diffusers", "transformers")}
    if device is not None and device.capability is not None:
        import torch

        found["cuda"] = str(torch.version.cuda or torch.version.hip)
    return found


def peak_bytes(device: Device) -> int:
    """Return the peak memory so far: of torch's allocator on CUDA, of the whole process on a CPU."""
    if device.torch_device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device.torch_device))
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _cuda(index: int) -> Device:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    share = torch.cuda.get_per_process_memory_fraction(index)
    if share < 1:  # what this process may not take is not there for it
        total = int(share * total)
        free = min(free, total - torch.cuda.memory_reserved(index))
    capability = (properties.major, properties.minor)
    if torch.version.hip is not None:
        dtype, reason = torch.bfloat16, "the format Wan was trained in"
    elif capability >= (8, 0):
        dtype, reason = (
            torch.bfloat16,
            f"sm{_sm(capability)} has bf16 matrix units, and Wan was trained in it",
        )
    else:
        dtype, reason = torch.float16, f"sm{_sm(capability)} has no bf16 matrix units (from sm80 on)"
    return Device(
        torch_device=f"cuda:{index}",
        name=properties.name,
        total_bytes=total,
        free_bytes=free,
        capability=capability,
        cores=properties.multi_processor_count,
        dtype=dtype,
        dtype_reason=reason,
    )


def _sm(capability: tuple[int, int]) -> str:
    return f"{capability[0]}{capability[1]}"


def _cpu() -> Device:
    # Two cores of an AMD EPYC, torch 2.13: a product of 1024 x 1024 takes 61 ms in fp32, 2.3 s in bf16.
    return _of_host("cpu", "most CPUs have no 16-bit matrix units; there bf16 can be forty times slower than fp32")


def _mps() -> Device:
    import torch

    if not torch.backends.mps.is_available():
        why = "it needs macOS on Apple silicon and a torch built for it"
        raise UnavailableError(f"device is 'mps', which is not here: {why}. Use '--device cpu'.")
    return _of_host("mps", "mps is untested here, and fp32 is the format least likely to go wrong")


def _of_host(torch_device: str, why_fp32: str) -> Device:
    import torch

    total, free = host_memory()
    return Device(
        torch_device=torch_device,
        name=_cpu_name(),
        total_bytes=total,
        free_bytes=free,
        capability=None,
        cores=cpu_threads(),
        dtype=torch.float32,
        dtype_reason=why_fp32,
    )


def host_memory() -> tuple[int, int]:
    """Return total and free bytes of host memory: the machine's, or its container's if that is less."""
    import psutil

    memory = psutil.virtual_memory()
    total, free = int(memory.total), int(memory.available)
    # A container sees the host's /proc/meminfo; its own limit stands in the control group (v2).
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no control group here, or its limit is "max"
        return total, free
    return min(total, limit), min(free, max(limit - used, 0))


def cpu_threads() -> int:
    """Return how many CPU threads this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named[1] if named else platform.machine()


def _version(package: str, otherwise: str = "not installed") -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return otherwise
