"""`pocket-techniques`: what each technique does to the embedded model's clips, beside the plain run of the same seeds.

    python benchmarks/pocket_techniques.py --part exact --part near --out rows.jsonl [--processes 12]

A part is a group of plans below. Half of the prompts hold a combination of colour, shape and motion that training
never saw. One row a plan, as it is done; plans that the file has are left out, so a second call goes on where the
first ended. `--plan "SPEC SPEC"` adds a plan. Several processes share one GPU, so the rows say nothing of speed.

`judge_percent` is the mean over clips of the share of a prompt's words that the clip keeps; `clips_worse` and
`clips_better` count clips that keep fewer and more than the plain run's. `psnr_db` and `ssim` compare with the plain
run's frames; `error` with its latents.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from pocket_judge import cases, versions

import swiftwan as sw
from swiftwan.bench.summary import rung_of
from swiftwan.errors import SwiftwanError
from swiftwan.measure.quality import Material, relative_distance, score
from swiftwan.plan import parse

Plan = tuple[str, ...]

EXACT = [
    "dtype:fp32",
    "dtype:fp16",
    "attention:sdpa",
    "attention-slicing:size=100",
    "vae:fp32",
    "channels-last",
    "batched-cfg",
    "prompt-cache:memory",
    "text-encoder:unload",
    "text-encoder:blocks",
    "text-encoder:cpu",
    "offload:model",
    "offload:blocks",
    "fused",
    "vae:fast",
    "attention:cudnn",
    "attention:flash4",
    "cuda-graphs",
    "fused vae:fast attention:flash4 batched-cfg cuda-graphs",
    "compile",
]
NEAR = [
    "quantize:fp8",
    "quantize:fp8:keep=1",
    "quantize:fp8:activations=none",
    "quantize:fp8:scale=tensor",
    "quantize:int8",
    "quantize:int8:activations=dynamic",
    "quantize:int4",
    "quantize:int4:keep=1",
    "quantize:nf4:keep=1",
    "quantize:int8:on=text",
    "quantize:int4:on=text",
]
APPROXIMATE = [
    "step-cache",
    "deepcache",
    "cfg-skip",
    "cfg-interval",
    "sparse-attention",
    "vae:tiling:sample=96,stride=64",
    "progressive-resolution",
    "step-cache cfg-skip",
]
SWEEP = [
    *(f"step-cache:threshold={t}" for t in (0.03, 0.05, 0.2)),
    *(f"cfg-skip:every={every},first={first}" for every, first in ((2, 10), (3, 4), (3, 10), (5, 10))),
    *(f"cfg-interval:from={low},to={high}" for low, high in ((0, 0.9), (0.3, 1), (0.5, 1), (0.1, 1), (0.1, 0.95))),
    *(f"sparse-attention:keep={k}" for k in (0.25, 0.75)),
    "sparse-attention:keep=0.5,dense-steps=5",
    "sparse-attention:keep=0.25,dense-steps=10,dense-layers=1",
    "sparse-attention:keep=0.25,dense-steps=20",
    "deepcache:interval=2,block-num=3",
    "deepcache:interval=3,block-num=2",
    *(f"progressive-resolution:until={u}" for u in (0.95, 0.9, 0.85, 0.75)),
    *(f"progressive-resolution:scale=0.75,until={u}" for u in (0.9, 0.8, 0.6)),
]
PARTS = {"exact": EXACT, "near": NEAR, "approximate": APPROXIMATE, "sweep": SWEEP}
BESIDE: dict[Plan, Plan] = {("dtype:fp32", "tf32"): ("dtype:fp32",)}
"""Plans whose plain run is another than the empty one."""


class Share:
    """One process's prompts: it runs plan after plan on them, and keeps the plain run's results."""

    def __init__(self, number: int, of: int, prompts: int, steps: int, device: str | None) -> None:
        # The judge and the CPU's own work: processes must not fight for cores.
        torch.set_num_threads(1 if of > 2 else torch.get_num_threads())
        self.cases = cases(prompts)[number::of]
        self.steps, self.device = steps, device
        self.plain: dict[Plan, list[sw.Result]] = {}

    def results(self, plan: Plan) -> list[sw.Result]:
        engine = sw.Engine.load("pocket", plan=plan, device=self.device)
        requests = (sw.TextToVideo(c.prompt, seed=seed, num_inference_steps=self.steps) for seed, _, c in self.cases)
        return list(engine.run_many(requests))

    def judged(self, plan: Plan, beside: Plan) -> list[dict[str, Any]]:
        """A line for each clip."""
        if beside not in self.plain:
            self.plain[beside] = self.results(beside)
        plain = self.plain[beside]
        ours = plain if plan == beside else self.results(plan)
        return [line(one, other) for one, other in zip(ours, plain, strict=True)]


def line(result: sw.Result, plain: sw.Result) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frames, reference = result.frames.to(device), plain.frames.to(device)
    prompt = result.request.prompt
    names = ("psnr", "ssim", "judge")
    scores = score(Material(frames, prompt, reference, device), names)
    return {
        "seed": result.request.seed,
        **scores,
        "plain_judge_percent": score(Material(reference, prompt, reference, device), ["judge"])["judge_percent"],
        "error": relative_distance(result.latents, plain.latents),
        "peak_bytes": result.peak_bytes,
        "dtype": result.dtype,
        "device": result.device,
        "guidance_scale": result.request.guidance_scale,
    }


share: Share


def begin(*arguments: Any) -> None:
    global share
    share = Share(*arguments)


def run_share(plan: Plan, beside: Plan) -> list[dict[str, Any]]:
    try:
        return share.judged(plan, beside)
    except SwiftwanError as problem:
        return [{"refused": str(problem)}]
    except Exception as problem:
        return [{"failed": f"{type(problem).__name__}: {problem}"[:400]}]


class Processes:
    """One pool of a single process a share, so that each keeps its plain results; started anew after a failure."""

    def __init__(self, arguments: Sequence[tuple[Any, ...]]) -> None:
        self.arguments = arguments
        self.start()

    def start(self) -> None:
        spawn = get_context("spawn")
        self.pools = [ProcessPoolExecutor(1, spawn, begin, each) for each in self.arguments]

    def stop(self) -> None:
        for pool in self.pools:
            pool.shutdown(wait=False, cancel_futures=True)

    def run(self, plan: Plan, beside: Plan) -> list[dict[str, Any]]:
        waiting = [pool.submit(run_share, plan, beside) for pool in self.pools]
        try:
            lines = [line for future in waiting for line in future.result()]
        except BrokenProcessPool:
            lines = [{"failed": "a process ended"}]
        if any("failed" in line for line in lines):  # a device in error stays so for its process
            self.stop()
            self.start()
        return lines


@contextmanager
def processes(arguments: Sequence[tuple[Any, ...]]) -> Iterator[Callable[[Plan, Plan], list[dict[str, Any]]]]:
    workers = Processes(arguments)
    try:
        yield workers.run
    finally:
        workers.stop()


def row(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    for status in ("failed", "refused"):
        for each in lines:
            if status in each:
                return {"status": status, "reason": each[status]}

    def mean(field: str) -> float:
        return round(statistics.mean(each[field] for each in lines), 4)

    judged = [(each["judge_percent"], each["plain_judge_percent"]) for each in lines]
    return {
        "status": "ok",
        "judge_percent": mean("judge_percent"),
        "plain_judge_percent": mean("plain_judge_percent"),
        "clips_worse": sum(ours < plain for ours, plain in judged),
        "clips_better": sum(ours > plain for ours, plain in judged),
        "psnr_db": mean("psnr_db"),
        "psnr_db_smallest": round(min(each["psnr_db"] for each in lines), 2),
        "ssim": mean("ssim"),
        "error": float(f"{statistics.mean(each['error'] for each in lines):.3g}"),
        "peak_bytes": max(each["peak_bytes"] for each in lines),
        **{field: lines[0][field] for field in ("dtype", "device", "guidance_scale")},
    }


def commit() -> str:
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", action="append", default=[], choices=list(PARTS))
    parser.add_argument("--plan", action="append", default=[], help="specs of one plan, with spaces between")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device")
    parser.add_argument("--commit", help="of the source, where this is a copy without a repository")
    parser.add_argument("--processes", type=int, default=1, help="each loads the model and takes its share of prompts")
    options = parser.parse_args()

    asked = [*options.plan, *(plan for part in options.part for plan in PARTS[part])]
    done = set()
    if options.out.exists():
        rows = map(json.loads, options.out.read_text().splitlines())
        done = {tuple(row["plan"]) for row in rows if row["status"] == "ok"}
    arguments = [
        (n, options.processes, options.prompts, options.steps, options.device) for n in range(options.processes)
    ]
    with processes(arguments) as run:
        for plan in (tuple(each.split()) for each in asked):
            if plan in done:
                continue
            beside = BESIDE.get(plan, ())
            found = {
                "case": "pocket-techniques",
                "rung": rung_of(plan, [parse(spec).kind for spec in plan]),
                "plan": list(plan),
                "beside": list(beside),
                **row(run(plan, beside)),
                "prompts": options.prompts,
                "steps": options.steps,
                "versions": versions(),
                "commit": options.commit or commit(),
                "date": datetime.date.today().isoformat(),
            }
            with options.out.open("a") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
