"""`pocket-judge`: what share of the embedded model's clips show their prompts, by the judge of `swiftwan.pocket`.

    python benchmarks/pocket_judge.py [--prompts 256] [--steps 20] [--with few-step] >> benchmarks/pocket_judge.jsonl

Half of the prompts hold a combination of colour, shape and motion that training never saw.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch

import swiftwan as sw
from swiftwan.device import versions
from swiftwan.pocket.judge import judge
from swiftwan.pocket.scenes import Scene, sample_scenes

SPLITS = {"held-out": 901, "train": 902}
Cases = list[tuple[int, str, Scene]]


def cases(prompts: int) -> Cases:
    """Seed, split and scene of each clip."""
    scenes = [(split, s) for split, seed in SPLITS.items() for s in sample_scenes(prompts // 2, seed, split)]
    return [(seed, split, scene) for seed, (split, scene) in enumerate(scenes)]


def marks(split: str, scene: Scene, frames: torch.Tensor) -> Iterator[tuple[tuple[str, str], bool]]:
    """What was asked of one clip, and whether it is right."""
    verdict = judge(frames, scene)
    yield (split, "background"), verdict.background
    yield (split, "whole clip"), verdict.right
    kind = "one thing" if len(scene.things) == 1 else "two things"
    if kind == "two things":
        yield (split, "two things: both colours"), verdict.colours_present
    for thing in verdict.things:
        for what in ("colour", "shape", "motion", "size"):
            for of in (kind, "every thing"):
                yield (split, f"{of}: {what}"), bool(getattr(thing, what))


def judged(
    part: Cases, plan: list[str], steps: int | None, guidance: float | None, device: str | None
) -> tuple[Counter, Counter, dict]:
    """Asked and right, by split and word; and how the clips were made."""
    torch.set_num_threads(max(1, torch.get_num_threads() // 4))
    engine = sw.Engine.load("pocket", plan=plan or "auto", device=device)
    asked: Counter[tuple[str, str]] = Counter()
    right: Counter[tuple[str, str]] = Counter()
    for seed, split, scene in part:
        request = sw.TextToVideo(scene.prompt, seed=seed, num_inference_steps=steps, guidance_scale=guidance)
        result = engine.run(request)
        for key, is_right in marks(split, scene, result.frames):
            asked[key] += 1
            right[key] += is_right
    how = {
        "plan": list(result.plan),
        "steps": result.request.num_inference_steps,
        "guidance_scale": result.request.guidance_scale,
        "scheduler": result.request.scheduler,
        "dtype": result.dtype,
        "device": result.device,
    }
    return asked, right, how


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--with", dest="plan", action="append", default=[], help="a technique; unset: auto")
    parser.add_argument("--device")
    parser.add_argument("--processes", type=int, default=1, help="each loads the model and takes its share of prompts")
    options = parser.parse_args()
    every = cases(options.prompts)
    shares = [every[i :: options.processes] for i in range(options.processes)]
    work = partial(judged, plan=options.plan, steps=options.steps, guidance=options.guidance, device=options.device)
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(work, shares))
    asked, right = (sum((result[i] for result in results), Counter()) for i in (0, 1))
    percent = {
        split: {what: round(100 * right[of, what] / n, 1) for (of, what), n in sorted(asked.items()) if of == split}
        for split in SPLITS
    }
    both = {what: (right[of, what], n) for (of, what), n in asked.items() if of == "train"}
    percent["both"] = {
        what: round(100 * (good + right["held-out", what]) / (n + asked["held-out", what]), 1)
        for what, (good, n) in sorted(both.items())
    }
    row = {
        "case": "pocket-judge",
        "rung": "few-step" if any(spec.startswith("few-step") for spec in options.plan) else "exact",
        "prompts": len(every),
        "percent_right": percent,
        **results[0][2],
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
