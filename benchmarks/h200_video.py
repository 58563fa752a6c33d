"""Whole runs on one H200 beside diffusers' pipeline: a video from prompt to mp4, and a cold start.

    python benchmarks/h200_video.py video [--steps 50] [--repeats 1] [--plans auto 'auto batched-cfg'] [--out rows]
    python benchmarks/h200_video.py video --case seed-001 --width 1280 --height 720 --frames 97 --steps 65
        --measured 8 --peers 'diffusers eager, fp32' [--out rows]
    python benchmarks/h200_video.py cold [--repeats 2] [--out rows.jsonl]

``video``: ours and the peers take turns in one process with the same random weights; each has made a two-step video
before, but in float32, where a step takes a minute. Timed: text, denoising, decoding, and the mp4, which
ours encodes while it decodes and swiftwan's writer makes of the peers' frames. With ``--measured`` so many steps run, a
float32 peer's one, and the row's ``seconds`` counts the others at their median; it says so.
No prompt cache, unless the plan names it. A plan's rung is the least exact kind of its techniques. ``error`` is the
distance of the last latents to those of diffusers eager; with random weights and many steps it says how far rounding
carries, not how good the video is.

``cold``: the random weights are written as a folder in diffusers' layout first. Then processes take turns, each timed
from its start to its first denoising step done; ``seconds`` leaves the first of each out, which fills caches and page
cache. Ours begins as a user's program does, by ``swiftwan.Engine``, which imports torch; a peer's imports torch itself.
The row ``bound`` is a process that imports torch, makes a CUDA context and does nothing else.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import swiftwan as sw
from swiftwan import media
from swiftwan.device import pick_device, versions
from swiftwan.plan import complete, describe, estimate, make_plan

PROMPT = "A ginger cat walks along a stone wall in the evening sun, the camera follows it slowly"
CEILINGS = {"product": 782, "attention": 708}  # TFLOP/s measured on this chip
PEERS = {
    "diffusers eager, bf16": (False, "bf16"),
    "diffusers compiled, bf16, cuDNN attention": (True, "bf16"),
    "diffusers eager, fp32": (False, "fp32"),
}
"""Whether by torch.compile, and in which numbers."""
IMPORTS = "import of torch and a CUDA context, alone"
ALONE = """
import gc, json, sys, time
gc.disable()
import torch
marks = {"imports": time.time() - float(sys.argv[1])}
torch.zeros(1, device="cuda")
torch.cuda.synchronize()
print(json.dumps(marks | {"first step": time.time() - float(sys.argv[1])}))
"""
START = "import sys; sys.path.insert(0, {folder!r}); {first}import h200_video; h200_video.main()"
KINDS = ("retrained", "approximate", "near", "exact")


def plan_of(text: str, device: Any) -> list[str]:
    """``auto`` among the words stands for its techniques."""
    specs = text.split()
    return [s for spec in specs for s in (make_plan("auto", device).specs if spec == "auto" else (spec,))]


def rung_of(plan: list[str], device: Any) -> str:
    kinds = {technique.kind for technique in make_plan(plan, device).techniques} | {"exact"}
    return next(kind for kind in KINDS if kind in kinds)


def peer(model: str, device: Any, name: str) -> Any:
    """diffusers' pipeline; compiled as its documentation advises: block by block, with its best attention backend."""
    from swiftwan.bench.peers import DiffusersPeer  # a cold start of ours is not to wait for it

    compiled, dtype = PEERS[name]
    found = DiffusersPeer(model, device, dtype if device.capability else "fp32", compile=False)
    if compiled:
        if device.capability:
            found.pipe.transformer.set_attention_backend("_native_cudnn")
        found.pipe.transformer.compile_repeated_blocks(fullgraph=True)
    return found


def floor_seconds(model: str, request: Any, device: Any) -> float:
    """Every matrix product and all self-attention of the denoising at their measured rates; nothing else."""
    facts = describe(model)
    load = estimate(request, facts, make_plan([], device, facts=facts), device.total_bytes)
    config = facts.known.transformer
    attention = config.num_layers * 4 * load.tokens**2 * config.dim / 1e12
    product = load.tflop_per_forward - attention
    return load.forwards * (attention / CEILINGS["attention"] + product / CEILINGS["product"])


def common(arguments: argparse.Namespace, device: Any) -> dict[str, Any]:
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "model": arguments.model,
        "device": device.name,
        "versions": versions(device),
        "commit": arguments.commit or asked.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


def write(rows: list[dict[str, Any]], out: str) -> None:
    """All rows as they stand now: a run cut short leaves what it has."""
    if out == "-":
        print(json.dumps(rows[-1]), flush=True)
    else:
        Path(out).write_text("".join(json.dumps(row) + "\n" for row in rows))


# From prompt to mp4


def video(arguments: argparse.Namespace) -> None:
    device = pick_device(arguments.device)
    size = {"width": arguments.width, "height": arguments.height, "num_frames": arguments.frames}
    request = sw.TextToVideo(PROMPT, seed=7, num_inference_steps=arguments.steps, **size)
    request = complete(request, describe(arguments.model))
    makers: dict[str, Callable[[], Any]] = {plan: functools.partial(ours, arguments, plan) for plan in arguments.plans}
    makers |= {
        name: functools.partial(peer, arguments.model, device, name) for name in PEERS if name in arguments.peers
    }
    warm_up = complete(sw.TextToVideo("warm-up", seed=1, num_inference_steps=2, **size), describe(arguments.model))
    runners: dict[str, Any] = {}
    failures: dict[str, str] = {}
    taken: dict[str, list[float]] = {}
    seen: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.mp4"
        for _ in range(arguments.repeats):
            for name, make in makers.items():
                if name not in runners and name not in failures:
                    try:
                        runners[name] = ready(make, name, warm_up)
                    except Exception as problem:
                        failures[name] = f"{type(problem).__name__}: {str(problem)[:300]}"
                if name in failures:
                    write_rows(arguments, request, taken, seen, failures)
                    continue
                runner = runners[name]
                gc.collect()
                steps = arguments.steps if arguments.measured is None else arguments.measured
                steps = 1 if name.endswith("fp32") and arguments.measured else steps
                asked = replace(request, num_inference_steps=steps)
                started = time.perf_counter()
                if name in PEERS:
                    result = runner.run(asked)
                    media.write(path, result.frames, fps=request.fps or 16, record={"plan": name})
                else:
                    blocks = count_blocks(runner)
                    result = runner.run(asked, out=path)
                measured = time.perf_counter() - started
                taken.setdefault(name, []).append(
                    measured + (arguments.steps - steps) * statistics.median(result.step_seconds)
                )
                seconds = result.seconds | {"mp4": measured - result.seconds["total"]}
                seen[name] = {
                    "latents": result.latents,
                    "seconds": seconds,
                    "peak": result.peak_bytes,
                    "mp4_bytes": path.stat().st_size,
                    "measured_steps": steps,
                    "forwards": None if name in PEERS else len(blocks) / len(runner.parts.transformer.blocks),
                }
                print(f"{name}: {taken[name][-1]:.2f} s { ({k: round(v, 3) for k, v in seconds.items()}) }", flush=True)
                write_rows(arguments, request, taken, seen, failures)


def count_blocks(engine: sw.Engine) -> list[None]:
    """Grows by each block that runs from now on; what a cache answers does not. Recorded forwards are not seen."""
    seen: list[None] = []
    for block in engine.parts.transformer.blocks:
        block.register_forward_hook(lambda *_: seen.append(None))
    return seen


def ready(make: Callable[[], Any], name: str, warm_up: Any) -> Any:
    started = time.perf_counter()
    runner = make()
    if not name.endswith("fp32"):
        runner.run(warm_up)
    print(f"{name}: ready after {time.perf_counter() - started:.1f} s", flush=True)
    return runner


def ours(arguments: argparse.Namespace, plan: str, request: Any = None) -> sw.Engine:
    specs = plan_of(plan, pick_device(arguments.device))
    engine = sw.Engine.load(arguments.model, plan=specs, device=arguments.device, request=request)
    if not any(spec.startswith("prompt-cache") for spec in engine.plan.specs):
        engine.parts.text.cache = None
    return engine


def write_rows(arguments: argparse.Namespace, request: Any, taken: Any, seen: Any, failures: Any) -> None:
    device = pick_device(arguments.device)
    rows = []
    eager = next((seen[name]["latents"] for name in seen if name.startswith("diffusers eager")), None)
    best = min((name for name in seen if name in PEERS), key=lambda name: statistics.median(taken[name]), default=None)
    for name in (*taken, *failures):
        plan = [] if name in PEERS else plan_of(name, device)
        row: dict[str, Any] = {
            "case": f"video-{arguments.case}-{arguments.width}x{arguments.height}x{arguments.frames}",
            "rung": rung_of(plan, device),
            "plan": plan,
            "steps": request.num_inference_steps,
        }
        if name in PEERS:
            row["runner"] = name
        about = common(arguments, device) | {"dtype": "float32" if name.endswith("fp32") else "bfloat16"}
        if name in failures:
            rows.append(row | {"status": "failed", "reason": failures[name]} | about)
            continue
        median = statistics.median(taken[name])
        row |= {
            "status": "ok",
            "seconds": round(median, 3),
            "spread": [round(min(taken[name]), 3), round(max(taken[name]), 3)],
            "repeats": len(taken[name]),
            "stage_seconds": {stage: round(value, 4) for stage, value in seen[name]["seconds"].items()},
            "ceiling_fraction": round(floor_seconds(arguments.model, request, device) / median, 3),
            "peak_bytes": seen[name]["peak"],
            "mp4_bytes": seen[name]["mp4_bytes"],
        }
        if row["rung"] == "approximate":
            row["forwards"] = round(seen[name]["forwards"], 1)  # whole ones' worth of blocks
        if arguments.measured:
            row |= {"measured_steps": seen[name]["measured_steps"], "variant": "extrapolated from measured steps"}
        if best is not None:
            row |= {"peer": best, "peer_seconds": round(statistics.median(taken[best]), 3)}
            row |= {"ratio": round(row["peer_seconds"] / median, 3)}
        if eager is not None and not arguments.measured:
            row["error"] = ((seen[name]["latents"] - eager).norm() / eager.norm()).item()
            row["error_against"] = "diffusers eager, bf16"
        rows.append(row | about)
    write(rows, arguments.out)


# From the start of a process to its first step


class FirstStepDone(Exception):
    """Ends a run that has shown what it was started for."""


def first_step(arguments: argparse.Namespace) -> None:
    """What a cold process does; prints the seconds since it was started."""
    device = pick_device(arguments.device)
    marks = {"imports": time.time() - arguments.since}

    def on_step(event: Any) -> None:
        marks["prompt encoded"] = marks.get("prompt encoded", time.time() - arguments.since)
        if event.phase == "denoise":
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            marks["first step"] = time.time() - arguments.since
            raise FirstStepDone

    size = {"width": arguments.width, "height": arguments.height, "num_frames": arguments.frames}
    request = complete(
        sw.TextToVideo(PROMPT, seed=7, num_inference_steps=arguments.steps, **size), describe(arguments.model)
    )
    runner = (
        peer(arguments.model, device, arguments.runner)
        if arguments.runner in PEERS
        else ours(arguments, arguments.runner, request)
    )
    marks["loaded"] = time.time() - arguments.since
    try:
        runner.run(request, on_step=on_step)
    except FirstStepDone:
        print(json.dumps(marks), flush=True)


def cold(arguments: argparse.Namespace) -> None:
    from swiftwan.bench.peers import DiffusersPeer

    device = pick_device(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        path = folder if arguments.model.startswith("random:") else arguments.model
        if path == folder:
            made = DiffusersPeer(arguments.model, device, "bf16" if device.capability else "fp32", compile=False)
            made.pipe.save_pretrained(folder)
            del made
            gc.collect()
            torch.cuda.empty_cache()
        told: dict[str, list[dict[str, Any]]] = {}
        alone = (IMPORTS,) if device.capability else ()
        for _ in range(arguments.repeats + 1):
            for runner in (*arguments.plans, *alone, *(name for name in PEERS if name in arguments.peers)):
                told.setdefault(runner, []).append(once(arguments, path, runner))
                write(cold_rows(arguments, device, told), arguments.out)


def cold_rows(
    arguments: argparse.Namespace, device: Any, told: dict[str, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Of each runner the median of all processes but the first."""
    later = {runner: [m["first step"] for m in marks[1:] if "first step" in m] for runner, marks in told.items()}
    medians = {runner: statistics.median(seconds) for runner, seconds in later.items() if seconds}
    best = min((name for name in medians if name in PEERS), key=medians.__getitem__, default=None)
    rows = []
    for runner, marks in told.items():
        row: dict[str, Any] = {"case": f"cold-{arguments.case}", "rung": "bound" if runner == IMPORTS else "exact"}
        row |= {"plan": [] if runner in (*PEERS, IMPORTS) else plan_of(runner, device), "runner": runner}
        if runner in medians:
            row |= {
                "status": "ok",
                "seconds": round(medians[runner], 2),
                "spread": [round(min(later[runner]), 2), round(max(later[runner]), 2)],
                "repeats": len(later[runner]),
                "first_process_seconds": round(marks[0].get("first step", 0.0), 2),
                "marks": {key: round(value, 2) for key, value in marks[-1].items() if key != "problem"},
                "size": f"{arguments.width}x{arguments.height}x{arguments.frames}",
            }
            if best is not None and runner != IMPORTS:
                row |= {"peer": best, "peer_seconds": round(medians[best], 2)}
                row |= {"ratio": round(medians[best] / medians[runner], 3)}
        else:
            row |= {"status": "failed", "reason": marks[-1].get("problem", "one process alone has run")}
        rows.append(row | common(arguments, device) | {"dtype": "bfloat16"})
    return rows


def once(arguments: argparse.Namespace, model: str, runner: str) -> dict[str, Any]:
    first = "" if runner in PEERS else "import swiftwan; swiftwan.Engine; "
    command = [sys.executable, "-c", START.format(folder=str(Path(__file__).parent), first=first), "first-step"]
    command += ["--model", model, "--runner", runner, "--since", repr(time.time())]
    command += ["--width", str(arguments.width), "--height", str(arguments.height), "--frames", str(arguments.frames)]
    command += ["--steps", str(arguments.steps)] + (["--device", arguments.device] if arguments.device else [])
    if runner == IMPORTS:
        command = [sys.executable, "-c", ALONE, repr(time.time())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.limit)
    except subprocess.TimeoutExpired:
        return {"problem": f"no first step within {arguments.limit:.0f} s"}
    if done.returncode:
        print(done.stderr[-2000:], flush=True)
        return {"problem": done.stderr.strip().rpartition("\n")[2][:300]}
    marks: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
    print(runner, marks, flush=True)
    return marks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("video", "cold", "first-step"))
    parser.add_argument("--model", default="random:wan2.1-t2v-1.3b")
    parser.add_argument("--case", default="1.3b", help="the model's name in the rows")
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--measured", type=int, help="steps to run of a video too long to run whole")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--plans", nargs="+", default=["auto"])
    parser.add_argument("--peers", nargs="*", default=list(PEERS)[:2])
    parser.add_argument("--device")
    parser.add_argument("--out", default="-")
    parser.add_argument("--limit", type=float, default=180, help="seconds a cold process may take")
    parser.add_argument("--commit", default="")
    parser.add_argument("--runner", help=argparse.SUPPRESS)
    parser.add_argument("--since", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    {"video": video, "cold": cold, "first-step": first_step}[arguments.what](arguments)


if __name__ == "__main__":
    main()
