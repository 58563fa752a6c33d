"""Fine-tune a LoRA: the file to read first. Data, cache, adapter, then a loop that can stop anywhere.

    swiftwan train lora DATA --model wan2.1-t2v-1.3b --out runs/style

A run lives in a folder: ``run.json`` (what it is), ``data.txt`` (what could be used, and what not), ``log.jsonl``,
``loss.svg``, ``checkpoints/``, ``samples/``, ``lora.safetensors``. All chance of a step follows from (seed, step), so a
checkpoint is the whole state: a run that was killed goes on to the bit as if it had not been.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from swiftwan.engine import Engine
from swiftwan.errors import OutputError, RequestError, UnavailableError, did_you_mean
from swiftwan.train import adapter, buckets, validate
from swiftwan.train.cache import Cache, Encoders
from swiftwan.train.data import Problem, find
from swiftwan.train.processes import Processes, Weights, local_device, rank_and_count
from swiftwan.train.run import Data, Run
from swiftwan.train.settings import Settings
from swiftwan.train.trainee import trainees
from swiftwan.weights.check import read_json
from swiftwan.weights.write import write_json

OnStep = Callable[[str, int, int], None]
"""(phase, done, of how many)."""

LOG_EVERY = 10
"""Steps between rows of the log: reading the loss waits for the device."""


# Before the loop


def open_engine(
    model: str, *, device: str | None, dtype: str | None, weights: Weights = "whole", deterministic: bool = False
) -> Engine:
    """Load a model to train beside.

    Args:
        weights: where the frozen ones shall rest; ``offloaded`` ones are never whole on the device.
        deterministic: the same sums in the same order every time, on a GPU too; for the whole process.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    plan = ["offload:model"] if weights == "offloaded" else []
    return Engine.load(model, plan=plan, device=device or local_device(), dtype=dtype)


def trackers(names: Sequence[str], out: Path) -> list[Any]:
    """Where rows of the log go beside the run's folder, by accelerate's names.

    Raises:
        RequestError: the name is unknown.
        UnavailableError: its package is not installed.
    """
    if not names or rank_and_count()[0]:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    made = []
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise RequestError(f"log is '{name}'." + did_you_mean(name, LOGGER_TYPE_TO_CLASS))
        if name not in map(str, get_available_trackers()):
            raise UnavailableError(f"logging to {name} needs its package: pip install {name}.")
        kind = LOGGER_TYPE_TO_CLASS[name]
        tracker = kind(out.name, logging_dir=out) if kind.requires_logging_directory else kind(out.name)
        tracker.start()
        made.append(tracker)
    return made


@dataclass(frozen=True)
class Checked:
    """Data that is found and cut into items; nothing of it is encoded yet."""

    sha256: str
    shapes: buckets.Shapes
    train: list[buckets.Item]
    held_out: list[buckets.Item]


def check(engine: Engine, source: str, settings: Settings, out: Path) -> Checked:
    """Find and cut the data, and write ``out/data.txt``: what can be used, and what not.

    Raises:
        RequestError: nothing can be used, or a setting cannot be met.
        UnavailableError: the device has no 8-bit products, and they are asked for.
        OutputError: the folder cannot be written.
    """
    known, defaults = engine.facts.known, engine.facts.known.defaults
    if known.image_end == "always":
        raise RequestError(f"'{known.name}' goes from a first frame to a last one, which training does not know yet.")
    # Now, and not when hours of encoding are over.
    for trainee in trainees(engine, settings):
        if settings.base != "bf16":
            adapter.check_fp8(trainee.transformer, engine.device)
        if settings.base == "fp8-attention":
            adapter.check_fp8_attention(trainee.transformer, engine.device)
        adapter.check_rank(trainee.transformer, settings.rank, adapter.chosen_targets(settings.targets))
    shapes = buckets.Shapes.of(
        known,
        settings.width or defaults.width,
        settings.height or defaults.height,
        settings.frames or defaults.num_frames,
    )
    found = find(source, engine.parts.text.check, downloads=out / "downloads")
    items: list[buckets.Item] = []
    unused = 0
    for clip in found.clips:
        try:
            of_clip = shapes.items(clip)
        except RequestError as problem:
            found.problems.append(Problem(str(clip.path), str(problem)))
            continue
        unused += shapes.duration(clip) - sum(item.bucket.frames for item in of_clip)
        items += of_clip
    train, held_out = buckets.hold_out(items, settings.held_out)
    report = [*found.lines(), *_shape_lines(train, held_out, shapes, unused)]
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "data.txt").write_text("\n".join(report) + "\n", encoding="utf-8")
    except OSError as problem:
        raise OutputError(f"'{out}' cannot hold a run: {problem.strerror}; give another --out.") from None
    if not train:
        raise RequestError(f"nothing to train on; {'; '.join(map(str, found.problems[:3]))}.")
    return Checked(found.sha256, shapes, train, held_out)


def prepare(engine: Engine, checked: Checked, settings: Settings, cache: Path, on_step: OnStep) -> Data:
    """Encode what is not in the cache, and let the encoders go.

    Raises:
        RequestError: the cache is another model's.
    """
    encoders = Encoders(engine.facts.known, engine.parts, engine.torch_device)
    kept = Cache(cache, encoders.identity)
    if settings.sample_every:
        for prompt in (*settings.prompts, engine.facts.known.defaults.negative_prompt):
            engine.parts.text.encode(prompt)  # stays in the prompt cache when the encoder has gone
    engine.parts.enter("vae")
    items = [*checked.train, *checked.held_out]
    encoders.fill(kept, items, lambda done, of: on_step("encode", done, of))
    if not settings.sample_every:
        encoders.leave()
    return Data(checked.sha256, checked.shapes, checked.train, checked.held_out, kept, encoders)


def _shape_lines(
    train: Sequence[buckets.Item], held_out: Sequence[buckets.Item], shapes: buckets.Shapes, unused: int
) -> list[str]:
    counts: dict[buckets.Bucket, int] = {}
    for item in train:
        counts[item.bucket] = counts.get(item.bucket, 0) + 1
    told = [f"{bucket}: {count} items of {shapes.tokens(bucket)} tokens" for bucket, count in sorted(counts.items())]
    return [
        *told,
        f"{len(held_out)} items held out",
        f"{unused} frames behind the last whole item of their clip unused",
    ]


# The loop


def train(
    engine: Engine,
    source: str,
    out: Path,
    settings: Settings,
    *,
    cache: Path | None = None,
    on_step: OnStep = lambda phase, done, of: None,
    log_to: Sequence[Any] = (),
) -> list[Path]:
    """Train a LoRA, or go on where a run in ``out`` was; returns the files of the adapter.

    Args:
        engine: with a plan that leaves the weights as they are; its transformer gets the adapter.
        log_to: accelerate's trackers, that get every row of the log too.

    Raises:
        RequestError: data or settings cannot be used, or are not those of the run in ``out``.
        SwiftwanError: the loss is not finite any more.
        OutputError: the disk is full; the last good checkpoint stays.
    """
    processes = Processes(engine.torch_device, settings.weights)
    with processes.first_then_others():
        checked = check(engine, source, settings, out)
        identity = {
            "model": engine.model_name,
            "data": checked.sha256,
            "dtype": engine.dtype_name,
            "processes": processes.count,
        }
        identity |= settings.identity()
        _same_run(out, identity)
        data = prepare(engine, checked, settings, cache or out / "cache", on_step)
    on_step("train", 0, settings.steps)  # adapters, compilation and the first held-out loss are part of it
    run = Run(engine, settings, data, out, processes)
    resumed = run.resume()
    if processes.is_first:
        write_json(out / "run.json", identity)
        validate.forget_after(run.log_path, run.step if resumed else -1)
    if not resumed:
        run.validate()
    while run.step < settings.steps:
        run.update()
        on_step("train", run.step, settings.steps)
        last = run.step == settings.steps
        if run.step % LOG_EVERY == 0 or last:
            run.log(log_to)
        if run.step % settings.validate_every == 0 or last:
            run.validate(log_to)
        if settings.sample_every and (run.step % settings.sample_every == 0 or last):
            run.sample()
        if run.step % settings.checkpoint_every == 0 or last:
            run.save()
    return run.deliver()


def _same_run(out: Path, identity: Mapping[str, Any]) -> None:
    """Raise RequestError if the folder holds another run."""
    before = read_json(out / "run.json")
    if before is None:
        return
    if before.get("data") != identity["data"]:
        raise RequestError(
            f"the data changed since the run in '{out}' began, so it cannot go on as it would have; bring the clips "
            "and captions back, or give another --out (its checkpoints stay)."
        )
    now = {key: list(value) if isinstance(value, tuple) else value for key, value in identity.items()}
    other = [f"{key} {before.get(key)} (now {value})" for key, value in now.items() if before.get(key) != value]
    if other:
        raise RequestError(f"'{out}' holds a run with {', '.join(other)}; say the same, or give another --out.")
