"""`pocket-schedulers`: which solver to take at which number of steps, on the embedded model.

    python benchmarks/pocket_schedulers.py [--prompts 32] [--part 1/8] >> benchmarks/pocket_schedulers.jsonl

Each solver at each budget is compared with 200 steps of flow Euler from the same noise: PSNR of the frames,
relative distance of the latents, and the judge's verdict. A row a solver and budget. With ``--part i/n`` a
process takes every n-th prompt, so that several fill a GPU; ``--join`` puts such rows together.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
from statistics import mean

import swiftwan as sw
from swiftwan.device import versions
from swiftwan.pocket.judge import judge
from swiftwan.pocket.scenes import sample_scenes
from swiftwan.sampling import SCHEDULERS

STEPS = (4, 8, 12, 20, 50)
REFERENCE = ("euler", 200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--device")
    parser.add_argument("--join", action="store_true", help="read partial rows on stdin")
    options = parser.parse_args()
    if options.join:
        join([json.loads(line) for line in sys.stdin])
        return
    part, parts = map(int, options.part.split("/"))
    engine = sw.Engine.load("pocket", device=options.device, dtype="fp32")
    scenes = sample_scenes(options.prompts, 903, "train")
    seen: dict[tuple[str, int], list[dict[str, float]]] = {}
    for seed in range(part - 1, len(scenes), parts):
        scene = scenes[seed]

        def run(scheduler: str, steps: int) -> sw.Result:
            return engine.run(
                sw.TextToVideo(scene.prompt, seed=seed, scheduler=scheduler, num_inference_steps=steps)  # noqa: B023
            )

        reference = run(*REFERENCE)
        for scheduler in SCHEDULERS:
            for steps in STEPS:
                result = run(scheduler, steps)
                error = (result.frames.float() - reference.frames.float()).square().mean().item() / 255**2
                verdict = judge(result.frames, scene)
                right = [verdict.background, *(bool(t.colour and t.shape and t.motion) for t in verdict.things)]
                seen.setdefault((scheduler, steps), []).append(
                    {
                        "psnr": 10 * math.log10(1 / max(error, 1e-10)),
                        "latents": ((result.latents - reference.latents).norm() / reference.latents.norm()).item(),
                        "right": mean(right),
                    }
                )
    for (scheduler, steps), rows in seen.items():
        emit(scheduler, steps, rows, result.device)


def emit(scheduler: str, steps: int, rows: list[dict[str, float]], device: str) -> None:
    row = {
        "case": "pocket-schedulers",
        "scheduler": scheduler,
        "steps": steps,
        "model_calls": 2 * (2 * steps - 1 if scheduler == "heun" else steps),
        "prompts": len(rows),
        "psnr_to_reference": round(mean(r["psnr"] for r in rows), 2),
        "latents_error": round(mean(r["latents"] for r in rows), 4),
        "judge_percent": round(100 * mean(r["right"] for r in rows), 1),
        "reference": f"{REFERENCE[0]}, {REFERENCE[1]} steps, same noise",
        "device": device,
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }
    print(json.dumps(row), flush=True)


def join(partial: list[dict[str, object]]) -> None:
    """Put the rows of all parts together; the single measurements go."""
    groups: dict[tuple[str, int], list[dict[str, float]]] = {}
    for row in partial:
        groups.setdefault((str(row["scheduler"]), int(str(row["steps"]))), []).extend(row["rows"])  # type: ignore[arg-type]
    for (scheduler, steps), rows in groups.items():
        emit(scheduler, steps, rows, str(partial[0]["device"]))


if __name__ == "__main__":
    main()
