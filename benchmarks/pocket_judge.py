"""`pocket-judge`: what share of the embedded model's clips show their prompts, by the judge of `swiftwan.pocket`.

    python benchmarks/pocket_judge.py [--prompts 256] [--steps 20] [--guidance 4] >> benchmarks/pocket_judge.jsonl

Half of the prompts hold a combination of colour, shape and motion that training never saw.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections import Counter
from importlib.metadata import version

import swiftwan as sw
from swiftwan.pocket.judge import judge
from swiftwan.pocket.world import sample_scenes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--device")
    options = parser.parse_args()
    engine = sw.Engine.load("pocket", device=options.device)
    half = options.prompts // 2
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for seed, scene in enumerate(sample_scenes(half, 901, "held-out") + sample_scenes(half, 902, "train")):
        request = sw.TextToVideo(
            scene.prompt, seed=seed, num_inference_steps=options.steps, guidance_scale=options.guidance
        )
        result = engine.run(request)
        verdict = judge(result.frames, scene)
        marks = [("background", verdict.background)]
        if len(scene.things) == 2:
            marks.append(("two things: both colours", verdict.colours_present))
        kind = "one thing" if len(scene.things) == 1 else "two things"
        for thing in verdict.things:
            marks += [(f"{kind}: {what}", bool(getattr(thing, what))) for what in ("colour", "shape", "motion", "size")]
        for what, is_right in marks:
            asked[what] += 1
            right[what] += is_right
    row = {
        "case": "pocket-judge",
        "rung": "exact",
        "plan": list(result.plan),
        "prompts": 2 * half,
        "percent_right": {what: round(100 * right[what] / asked[what], 1) for what in sorted(asked)},
        "steps": result.request.num_inference_steps,
        "guidance_scale": result.request.guidance_scale,
        "scheduler": result.request.scheduler,
        "dtype": result.dtype,
        "device": result.device,
        "versions": {name: version(name) for name in ("swiftwan", "torch", "diffusers", "transformers")},
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
