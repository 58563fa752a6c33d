"""What the hardware sampler costs a run: clips with and without it, taking turns in one process.

    python benchmarks/sampler_cost.py sampler_cost.jsonl --model random:wan2.1-t2v-1.3b --pairs 10

``share`` is the median of the pairs' relative differences; ``share_spread`` its quartiles; ``cpu_percent`` the CPU time
of the sampling thread over the run's. Ten times the usual rate is measured too, where a cost would show first.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import swiftwan as sw
from swiftwan.device import versions
from swiftwan.measure.hardware import INTERVAL_SECONDS, HardwareSampler, readers
from swiftwan.measure.missing import Missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="random:wan2.1-t2v-1.3b")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    engine = sw.Engine.load(options.model)
    request = sw.TextToVideo("a dog", seed=1, num_frames=options.frames, num_inference_steps=options.steps)
    watched = readers(engine.device.torch_device)
    if isinstance(watched, Missing):
        raise SystemExit(watched.reason)
    for _ in range(2):
        engine.run(request)
    for interval in (INTERVAL_SECONDS, INTERVAL_SECONDS / 10):
        shares, plain, seconds, costs = [], [], [], []
        for pair in range(options.pairs):
            took: dict[bool, float] = {}
            for sampled in ((False, True), (True, False))[pair % 2]:
                context: Any = HardwareSampler(watched, interval_seconds=interval) if sampled else nullcontext()
                with context:
                    began = time.perf_counter()
                    result = engine.run(request)
                    took[sampled] = time.perf_counter() - began
                if sampled:
                    costs.append(context.trace().cost_percent)
            plain.append(took[False])
            seconds.append(took[True])
            shares.append(took[True] / took[False] - 1)
        low, _, high = quantiles(shares, n=4)
        row = {
            "case": "hardware sampler",
            "status": "ok",
            "rung": "exact",
            "model": options.model,
            "plan": list(result.plan),
            "request": result.request.to_json(),
            "interval_seconds": interval,
            "repeats": options.pairs,
            "seconds": median(seconds),
            "spread": [min(seconds), max(seconds)],
            "peer": "the same run without the sampler, taking turns in one process",
            "peer_seconds": median(plain),
            "peer_spread": [min(plain), max(plain)],
            "ratio": median(plain) / median(seconds),
            "peak_bytes": result.peak_bytes,
            "share": median(shares),
            "share_spread": [low, high],
            "cpu_percent": median(costs),
            "device": result.device,
            "dtype": result.dtype,
            "versions": versions(engine.device),
            "date": datetime.now(UTC).date().isoformat(),
        }
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            json.dumps({key: row[key] for key in ("interval_seconds", "seconds", "share", "share_spread")}), flush=True
        )


if __name__ == "__main__":
    main()
