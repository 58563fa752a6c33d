"""How the time of an exact run of Wan2.1-T2V-1.3B grows with frames, resolution, batch and steps, on one H200.

    python benchmarks/h200_growth.py [frames] [resolution] [batch] [steps] --out benchmarks/h200_growth.jsonl
    python benchmarks/h200_growth.py figures benchmarks/h200_growth.jsonl --out docs

A row a point: ``seconds`` of ours and ``peer_seconds`` of diffusers eager, median of runs that took turns, and
``floor_seconds``, the FLOP line: the same matrix products and attention at the highest rates measured (DESIGN.md).
``frames`` and ``resolution`` time one guided denoising step, ``batch`` one forward of several pictures, ``steps``
a whole run from prompt to frames.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from h200_forward import Bench, Case, timed
from torch import Tensor

from swiftwan.bench.charts import Series, figure
from swiftwan.device import pick_device, versions
from swiftwan.plan import make_plan

MODEL = "wan2.1-t2v-1.3b"
FRAMES = (1, 9, 17, 33, 49, 65, 81, 121, 161)
SIZES = ((416, 240), (624, 352), (832, 480), (1024, 576), (1280, 720))
FRAMES_OF_SIZES = 33
BATCHES = (1, 2, 3, 4, 6, 8)
STEPS = (1, 2, 5, 10, 20, 50)
AXES = {
    "frames": ("frames", "one guided step, 832x480"),
    "resolution": ("megapixels a frame", f"one guided step, {FRAMES_OF_SIZES} frames"),
    "batch": ("pictures in a batch", "one forward, 832x480"),
    "steps": ("steps", f"whole run, 832x480, {FRAMES_OF_SIZES} frames"),
}
Point = tuple[float, float, dict[str, Callable[[], Any]], dict[str, Any]]
"""Place on the axis, floor in seconds, what to time by name, and more of the row."""


def forwards(case: Case) -> tuple[float, dict[str, Callable[[], Any]]]:
    bench = Bench(case, "cuda:0")
    specs = list(make_plan("auto", bench.where).specs)
    return case.floor_seconds(), {"ours": bench.ours(specs), "peer": bench.peer("eager")}


def frames() -> Iterator[Point]:
    for count in FRAMES:
        yield count, *forwards(Case(MODEL, 832, 480, count, guided=True)), {"shape": f"832x480x{count}"}


def resolution() -> Iterator[Point]:
    for width, height in SIZES:
        case = Case(MODEL, width, height, FRAMES_OF_SIZES, guided=True)
        yield width * height / 1e6, *forwards(case), {"shape": f"{width}x{height}x{FRAMES_OF_SIZES}"}


def batch() -> Iterator[Point]:
    """Pictures side by side in one forward; the peer makes them one after the other, as a pipeline call each does."""
    case = Case(MODEL, 832, 480, 1)
    bench = Bench(case, "cuda:0")
    for count in BATCHES:
        latents, timestep = bench.latents.expand(count, -1, -1, -1, -1).contiguous(), bench.timestep.expand(count)
        text = bench.text.prompt.expand(count, -1, -1)
        model = bench.model(list(make_plan("auto", bench.where).specs))
        condition = model.condition(text, case.latent_shape)
        one = bench.peer("eager")

        def ours(args: tuple[Any, ...] = (latents, timestep, condition), run: Any = model) -> Tensor:
            flow: Tensor = run(*args)
            return flow

        def peer(run: Callable[[], Tensor] = one, times: int = count) -> None:
            for _ in range(times):
                run()

        yield count, count * case.floor_seconds(), {"ours": ours, "peer": peer}, {"shape": "832x480x1"}


def steps() -> Iterator[Point]:
    import swiftwan as sw
    from swiftwan.bench.peers import DiffusersPeer
    from swiftwan.plan import complete, describe

    name = f"random:{MODEL}"
    engine = sw.Engine.load(name)
    engine.parts.text.cache = None
    peer = DiffusersPeer(name, engine.device, "bf16", compile=False)
    case = Case(MODEL, 832, 480, FRAMES_OF_SIZES, guided=True)
    for count in STEPS:
        asked = sw.TextToVideo(
            "a cat", width=832, height=480, num_frames=FRAMES_OF_SIZES, num_inference_steps=count, seed=1
        )
        request = complete(asked, describe(name))
        runs: dict[str, Callable[[], Any]] = {
            "ours": lambda r=request: engine.run(r),
            "peer": lambda r=request: peer.run(r),
        }
        yield count, count * case.floor_seconds(), runs, {"shape": f"832x480x{FRAMES_OF_SIZES}"}


def measure(axis: str, repeats: int, out: Path, commit: str) -> None:
    device = pick_device("cuda:0")
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    about = {
        "device": device.name,
        "versions": versions(device),
        "commit": commit or asked.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }
    for number, (at, floor, runs, more) in enumerate(globals()[axis]()):
        for run in runs.values() if number == 0 or axis != "steps" else ():  # more steps meet no new kernel
            run()
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repeats):
            for name, run in runs.items():
                seconds[name].append(timed(run, max(1, min(10, int(0.05 / floor)))))
        ours, peer = (statistics.median(seconds[name]) for name in ("ours", "peer"))
        row = {"case": f"growth-{axis}", "rung": "exact", "plan": list(make_plan("auto", device).specs), "at": at}
        row |= more | {"status": "ok", "seconds": ours, "spread": [min(seconds["ours"]), max(seconds["ours"])]}
        row |= {"repeats": repeats, "peer": "diffusers eager, bf16", "peer_seconds": peer, "ratio": peer / ours}
        row |= {"floor_seconds": floor, "ceiling_fraction": floor / ours} | about
        print(f"{axis} {at:g}: ours {ours:.4f} s, diffusers {peer:.4f}, floor {floor:.4f}", flush=True)
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        torch.cuda.empty_cache()


def figures(rows: Path, folder: Path) -> None:
    """One SVG an axis that has rows."""
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    for axis, (x, what) in AXES.items():
        points = [row for row in found if row["case"] == f"growth-{axis}"]
        if not points:
            continue
        series = [
            Series(name, number, [(row["at"], row[field]) for row in points])
            for number, (name, field) in enumerate(
                (("swiftwan, exact", "seconds"), ("diffusers", "peer_seconds"), ("FLOP line", "floor_seconds"))
            )
        ]
        (folder / f"growth-{axis}.svg").write_text(figure(series, x=x, y=f"seconds: {what}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=list(AXES), help="axes to measure; or: figures ROWS")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default="")
    arguments = parser.parse_args()
    if arguments.what[0] == "figures":
        figures(Path(arguments.what[1]), arguments.out)
        return
    with torch.no_grad():
        for axis in arguments.what:
            measure(axis, arguments.repeats, arguments.out, arguments.commit)


if __name__ == "__main__":
    main()
