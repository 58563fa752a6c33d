"""``swiftwan doctor``: whether generate can run on this machine, and what it would run on."""

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

GB = 10**9


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: ``fail`` is what keeps generate from running."""

    name: str
    state: Literal["ok", "warn", "fail"]
    told: str


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Check GPU, memory, disk, versions and models; exit 0 if generate can run here."""
    findings = [finding for check in CHECKS for finding in _findings(check)]
    ready = all(finding.state != "fail" for finding in findings)
    if as_json:
        typer.echo(json.dumps({"ready": ready, "findings": [asdict(finding) for finding in findings]}))
    else:
        colours = {"ok": "green", "warn": "yellow", "fail": "red"}
        for finding in findings:
            mark = typer.style(f"{finding.state:<4}", fg=colours[finding.state])
            typer.echo(f"{mark}  {finding.name:<10} {finding.told}")
    raise typer.Exit(0 if ready else 1)


def _findings(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A check that breaks is a finding too: the doctor runs where installations are broken."""
    try:
        yield from check()
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        yield Finding(check.__name__.strip("_"), "fail", told)


def _versions() -> Iterator[Finding]:
    from swiftwan.device import versions

    found = versions()
    missing = [name for name, version in found.items() if version == "not installed"]
    told = ", ".join(f"{name} {version}" for name, version in found.items())
    yield Finding("versions", "fail" if missing else "ok", told)


def _gpu() -> Iterator[Finding]:
    import torch

    from swiftwan.device import cuda_problem, pick_device

    if problem := cuda_problem():
        yield Finding("gpu", "warn", f"{problem}; generate runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        gpu = pick_device(f"cuda:{index}")
        assert gpu.capability is not None
        memory = f"{gpu.free_bytes / GB:.1f} of {gpu.total_bytes / GB:.1f} GB free"
        sm = f"sm{gpu.capability[0]}{gpu.capability[1]}, {gpu.cores} multiprocessors"
        yield Finding("gpu", "ok", f"{gpu.torch_device} {gpu.name}, {sm}, {memory}{_driver()}")


def _driver() -> str:
    try:
        first = Path("/proc/driver/nvidia/version").read_text().partition("\n")[0]
    except OSError:
        return ""
    numbers = [word for word in first.split() if word[0].isdigit() and "." in word]
    return f", driver {numbers[0]}" if numbers else ""


def _torch() -> Iterator[Finding]:
    """Run a product where generate would run; a torch that imports may still not compute there."""
    import torch

    from swiftwan.device import pick_device

    device = pick_device()
    ones = torch.ones(16, 16, device=device.torch_device, dtype=device.dtype)
    right = bool((ones @ ones == 16).all())
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    dtype = str(device.dtype).removeprefix("torch.")
    told = f"{torch.__version__} ({build}) computes on {device.torch_device} in {dtype}: {device.dtype_reason}"
    yield (Finding("torch", "ok", told) if right else Finding("torch", "fail", f"a product of ones is wrong; {told}"))


def _cpu() -> Iterator[Finding]:
    from swiftwan.device import host_memory, pick_device

    cpu = pick_device("cpu")
    total, free = host_memory()
    yield Finding("cpu", "ok", f"{cpu.name}, {cpu.cores} threads, {platform.system()} {platform.machine()}")
    told = f"{free / GB:.1f} of {total / GB:.1f} GB free"
    yield (Finding("memory", "ok", told) if free > 2 * GB else Finding("memory", "warn", f"{told}; 2 are advised"))


def _disk() -> Iterator[Finding]:
    from huggingface_hub import constants

    for name, folder in (("models", Path(constants.HF_HUB_CACHE)), ("here", Path.cwd())):
        exists = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(exists).free
        told = f"{name}: {free / GB:.1f} GB free in {folder}"
        if name == "here" and not os.access(folder, os.W_OK):
            yield Finding("disk", "warn", f"{told}, not writable; give --out a folder that is")
        elif free < GB:
            yield Finding("disk", "warn", f"{told}; free some")
        else:
            yield Finding("disk", "ok", told)


def _video() -> Iterator[Finding]:
    import av

    from swiftwan.media import h264_problem

    problem = h264_problem()
    yield (Finding("video", "fail", problem) if problem else Finding("video", "ok", f"H.264 by PyAV {av.__version__}"))


def _models() -> Iterator[Finding]:
    from swiftwan.cli.models import model_states

    pocket, *others = model_states()
    yield Finding("pocket", "ok" if pocket.here else "fail", pocket.state)
    here = [row.name for row in others if row.here]
    yield Finding("models", "ok", f"here: {', '.join(here) or 'none'}; 'swiftwan models' lists all {len(others)}")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (_versions, _torch, _gpu, _cpu, _disk, _video, _models)
