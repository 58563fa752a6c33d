"""One cell, once, in a process of its own: ``python -m swiftwan.bench.cell JOB RESULT``.

Whatever happens to it, its result says so: ``status`` is ok, refused (this plan cannot run here, and why), oom or
failed. A process that dies without a result is told by the one that started it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftwan.bench.matrix import BenchPlan, Cell
from swiftwan.bench.rows import ITSELF
from swiftwan.errors import MemoryLimitError, OutputError, PlanError, RequestError, WeightsError
from swiftwan.whole_file import write_text

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from swiftwan.device import Device
    from swiftwan.measure.hardware import Trace
    from swiftwan.measure.missing import Missing
    from swiftwan.measure.timeline import Timeline
    from swiftwan.pipelines.request import Request
    from swiftwan.plan import Facts, Plan


@dataclass(frozen=True)
class Job:
    """What a cell's process is told.

    Args:
        round: from 0; the first one also writes the video and compares it with the baseline's.
        folder: of the benchmark.
        stem: of the files this cell writes there.
        reference: of the baseline's frames; where the baseline failed there is no such file.
    """

    cell: Cell
    round: int
    folder: Path
    stem: str
    reference: Path

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"folder": str(self.folder), "reference": str(self.reference)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Job:
        return cls(
            Cell.from_json(values["cell"]),
            values["round"],
            Path(values["folder"]),
            values["stem"],
            Path(values["reference"]),
        )


def attempt(job: Job) -> dict[str, Any]:
    """Measure a cell, or say why not; the values are those of a row."""
    import torch

    try:
        return {"status": "ok", "reason": None} | measure(job)
    except OutputError as problem:
        return {"status": "no space", "reason": str(problem)}
    except (MemoryLimitError, torch.OutOfMemoryError) as problem:
        return {"status": "oom", "reason": _line(problem)}
    except (RequestError, WeightsError) as problem:
        return {"status": "refused", "reason": _line(problem)}
    except Exception as problem:
        return {"status": "failed", "reason": f"{type(problem).__name__}: {_line(problem)}"}


def measure(job: Job) -> dict[str, Any]:
    """Load, warm up, run, then look at what came out; the order keeps the timed runs clear of all else."""
    import torch

    from swiftwan.ceilings import product_tflop_per_second
    from swiftwan.device import pick_device
    from swiftwan.measure.hardware import HardwareSampler, readers
    from swiftwan.measure.missing import Missing
    from swiftwan.measure.timeline import timeline
    from swiftwan.plan import complete, estimate

    cell = job.cell
    device = pick_device(cell.device)
    facts, plan = _planned(cell, device)
    request = complete(_request(cell), facts)
    _check_room(job, request)

    load_model = _loader(cell, device)
    started = time.perf_counter()
    contestant = load_model()
    load_seconds = time.perf_counter() - started

    warm_up = replace(request, prompt=_other_prompt(request.prompt), num_inference_steps=cell.warm_up_steps)
    started = time.perf_counter()
    contestant.run(warm_up)
    warm_up_seconds = time.perf_counter() - started

    dtype = contestant.dtype
    load = estimate(request, facts, plan, device.total_bytes)
    watched = readers(device.torch_device)
    runs: list[Timeline] = []
    peak_bytes = 0
    trace: Trace | Missing = watched if isinstance(watched, Missing) else Missing("no run")
    for _ in range(cell.runs):
        sampler = HardwareSampler([] if isinstance(watched, Missing) else watched)
        with sampler:
            result = contestant.run(request, on_step=sampler.on_step)
        runs.append(timeline(result, load))
        peak_bytes = max(peak_bytes, result.peak_bytes)
        if not isinstance(watched, Missing):
            trace = sampler.trace()
    del contestant.model
    row = {
        "plan": list(contestant.specs),
        "kinds": list(contestant.kinds),
        "request": request.to_json(),
        "dtype": str(dtype).removeprefix("torch."),
        "load_seconds": load_seconds,
        "warm_up_seconds": warm_up_seconds,
        "runs": [run.to_json() for run in runs],
        "peak_bytes": peak_bytes,
        "tflop": load.forwards * load.tflop_per_forward,
        "ceiling_tflop_per_second": product_tflop_per_second(torch.device(device.torch_device), dtype),
        "hardware": trace.to_json(),
    }
    return row | (_look(job, result.frames, result.latents, request) if job.round == 0 else {})


@dataclass
class Contestant:
    """A loaded model, ours or a peer's; ``specs`` and ``kinds`` are of its techniques."""

    model: Any
    dtype: torch.dtype
    specs: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()

    def run(self, request: Request, on_step: Any = None) -> Any:
        return self.model.run(request, on_step=on_step)


def _planned(cell: Cell, device: Device) -> tuple[Facts, Plan]:
    """What is known of the model as this cell runs it, and its plan: the plain one for a peer."""
    from swiftwan.plan import describe, make_plan

    facts = describe(cell.model)
    specs = [] if cell.plan.peer else expanded(cell.plan)
    plan = make_plan(specs, device, cell.plan.dtype, facts)
    return plan.adapt(facts), plan


def _loader(cell: Cell, device: Device) -> Callable[[], Contestant]:
    """What loads the cell's model; what that imports is imported here, since it is no part of the load time."""
    from swiftwan.device import parse_dtype

    plan = cell.plan
    if plan.peer:
        from swiftwan.bench.peers import DiffusersPeer

        name = plan.dtype or str(device.dtype)
        return lambda: Contestant(DiffusersPeer(cell.model, device, name, compile=plan.compile), parse_dtype(name))
    from swiftwan.engine import Engine

    def load() -> Contestant:
        engine = Engine.load(cell.model, plan=expanded(plan), device=cell.device, dtype=plan.dtype)
        if not any(spec.startswith("prompt-cache") for spec in engine.plan.specs):
            # The peers encode their text in every run; a prompt kept from the round before would win for nothing.
            engine.parts.text.cache = None
        kinds = tuple(technique.kind for technique in engine.plan.techniques)
        return Contestant(engine, engine.plan.settings.dtype, engine.plan.specs, kinds)

    return load


def expanded(plan: BenchPlan) -> str | list[str]:
    """A plan's techniques with the environment's variables in them.

    Raises:
        PlanError: a variable is not set.
    """
    if isinstance(plan.with_, str):
        return [] if plan.with_ == "none" else plan.with_
    specs = [os.path.expandvars(spec) for spec in plan.with_]
    for spec in specs:
        if "$" in spec:
            raise PlanError(f"'{spec}' names an environment variable that is not set; set it to a file.")
    return specs


def _request(cell: Cell) -> Request:
    from swiftwan.pipelines.request import request_from_json

    return request_from_json(cell.request)


def _other_prompt(prompt: str) -> str:
    """The words the other way round: in no cache, and as long, since compiled code is made for one length of text."""
    return " ".join(reversed(prompt.split()))


def _check_room(job: Job, request: Request) -> None:
    """Refuse before minutes of work what the disk cannot hold."""
    from swiftwan import media

    assert request.num_frames
    assert request.height
    assert request.width
    size = {"num_frames": request.num_frames, "height": request.height, "width": request.width}
    for folder in ("videos", "reference"):
        (job.folder / folder).mkdir(parents=True, exist_ok=True)
    media.check_writable(_video(job, request.num_frames), **size)


def _video(job: Job, num_frames: int) -> Path:
    return job.folder / "videos" / f"{job.stem}{'.png' if num_frames == 1 else '.mp4'}"


def _look(job: Job, frames: Tensor, latents: Tensor, request: Request) -> dict[str, Any]:
    """Write the video, compare it with the baseline's, and score it."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    from swiftwan import media
    from swiftwan.device import pick_device
    from swiftwan.measure.missing import Missing, to_json
    from swiftwan.measure.quality import Material, relative_distance, score

    cell = job.cell
    assert request.fps is not None
    started = time.perf_counter()
    path = media.write(
        _video(job, len(frames)),
        frames,
        fps=request.fps,
        record={"model": cell.model, "request": request.to_json(), "plan": cell.plan.told},
    )
    encode_seconds = time.perf_counter() - started
    if cell.model.startswith("random:"):
        path.unlink()  # its time is known, and random weights paint noise: megabytes of it
    reference: Tensor | Missing
    error: float | Missing
    if cell.is_baseline:
        save_file({"frames": frames.contiguous(), "latents": latents.contiguous()}, job.reference)
        reference = error = Missing(ITSELF)
    else:
        try:
            kept = load_file(job.reference)
        except (OSError, SafetensorError):
            reference = error = Missing("the baseline has no video to compare with")
        else:
            reference = kept["frames"]
            error = Missing("other size than the baseline's")
            if kept["latents"].shape == latents.shape:
                error = relative_distance(latents, kept["latents"])
    on = torch.device(pick_device(cell.device).torch_device)
    if on.type == "cuda":
        torch.cuda.empty_cache()
    there = reference if isinstance(reference, Missing) else reference.to(on)
    quality = score(Material(frames.to(on), request.prompt, there, on), cell.metrics)
    return {
        "encode_seconds": encode_seconds,
        "video": path.relative_to(job.folder).as_posix() if path.exists() else None,
        "error": to_json(error),
        "quality": {name: to_json(value) for name, value in quality.items()},
    }


def _line(problem: BaseException) -> str:
    return " ".join(str(problem).split())[:500] or type(problem).__name__


def main(arguments: list[str]) -> None:
    """Run the job in a file and write its result to another."""
    threading.Thread(target=_end_with_the_benchmark, daemon=True).start()
    job = Job.from_json(json.loads(Path(arguments[0]).read_text(encoding="utf-8")))
    write_text(Path(arguments[1]), json.dumps(attempt(job)))


def _end_with_the_benchmark() -> None:
    """Standard input closes when the process that started this one is gone, even by kill -9: leave nothing running."""
    while os.read(0, 1):  # not sys.stdin: a reader that waits holds its lock, and Python cannot end
        pass
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
