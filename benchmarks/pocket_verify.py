"""How far from the exact run do plans of each kind end on the pocket model? `swiftwan verify` has its limits from here.

    python benchmarks/pocket_verify.py pocket_verify.jsonl [--prompts 24] [--device cuda]

A plan is one technique, or several in one argument. A row a plan and dtype, beside the plain run of the same dtype,
seeds and prompts; clip by clip the latent error, PSNR, SSIM, and the share of the prompt's words that the judge finds
in either. A plan that cannot run here is a row with its reason.
"""

from __future__ import annotations

import argparse
import gc
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import swiftwan as sw
from swiftwan.bench.summary import rung_of
from swiftwan.device import versions
from swiftwan.errors import SwiftwanError
from swiftwan.measure.missing import Missing
from swiftwan.measure.quality import Material, psnr_db, relative_distance, score, ssim
from swiftwan.pipelines.result import Result
from swiftwan.pocket.scenes import sample_scenes

PLANS = (
    "batched-cfg",
    "fused",
    "vae:fast",
    "attention:cudnn",
    "attention:flash4",
    "cuda-graphs",
    "quantize:fp8",
    "quantize:int8",
    "quantize:int4",
    "quantize:int4:keep=1",
    "tf32",
    "cfg-interval",
    "cfg-skip",
    "deepcache",
    "step-cache",
    "sparse-attention:keep=0.5",
    "sparse-attention:keep=0.25",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--plans", nargs="+", default=PLANS)
    parser.add_argument("--dtypes", nargs="+", default=("bf16", "fp32"))
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device")
    options = parser.parse_args()
    scenes = sample_scenes(options.prompts, 7, "all")
    requests = [sw.TextToVideo(s.prompt, seed=i, num_inference_steps=options.steps) for i, s in enumerate(scenes)]
    for dtype in options.dtypes:
        plain = sw.Engine.load("pocket", plan=[], device=options.device, dtype=dtype)
        exact = list(plain.run_many(requests))
        facts = {
            "case": "plans beside the exact run",
            "model": "pocket",
            "steps": options.steps,
            "prompts": options.prompts,
            "dtype": dtype,
            "device": plain.device.name,
            "versions": versions(plain.device),
            "date": datetime.now(UTC).date().isoformat(),
        }
        on = plain.torch_device
        for plan in options.plans:
            specs = plan.split()
            row: dict[str, Any] = {"plan": specs, **facts}
            try:
                engine = sw.Engine.load("pocket", plan=specs, device=options.device, dtype=dtype)
                runs = list(engine.run_many(requests))
            except (SwiftwanError, RuntimeError, ImportError) as problem:
                row |= {"status": "refused", "reason": str(problem).partition("\n")[0]}
            else:
                rung = rung_of(specs, [technique.kind for technique in engine.plan.techniques])
                row |= {"status": "ok", "rung": rung, **compared(runs, exact, on)}
                del engine
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            told = {key: row.get(key) for key in ("plan", "dtype", "rung", "reason")}
            print(json.dumps(told), flush=True)
            gc.collect()


def compared(runs: list[Result], exact: list[Result], on: torch.device) -> dict[str, Any]:
    """Each measure clip by clip, in the order of the prompts."""
    found: dict[str, list[float]] = {
        "latent_error": [],
        "psnr_db": [],
        "ssim": [],
        "judge_percent": [],
        "exact_judge": [],
    }
    for ours, theirs in zip(runs, exact, strict=True):
        a, b = ours.frames.to(on), theirs.frames.to(on)
        found["latent_error"].append(relative_distance(ours.latents, theirs.latents))
        found["psnr_db"].append(psnr_db(a, b))
        found["ssim"].append(ssim(a, b))
        found["judge_percent"].append(judged(ours))
        found["exact_judge"].append(judged(theirs))
    return {name: [float(f"{value:.5g}") for value in values] for name, values in found.items()}


def judged(result: Result) -> float:
    """Share of the prompt's words that the clip shows, in percent."""
    material = Material(result.frames, result.request.prompt, Missing("not compared"), torch.device("cpu"))
    value = score(material, ["judge"])["judge_percent"]
    assert not isinstance(value, Missing)
    return value


if __name__ == "__main__":
    main()
