"""Forwards beyond the exact rung on an H200: 8-bit layers and attention, and block-sparse attention, beside diffusers.

    python benchmarks/h200_rungs.py [near sparse25 ...] [--peers eager compiled] [--repeats 5] [--out rows.jsonl]
        [--profile top.txt]

Weights are random, so errors say what rounding does to numbers of the usual size, and less than nothing of what
skipping blocks does to a picture: random queries and keys give all tokens about the same weight, which is the worst
case for a method that keeps the heaviest. ``error_by_depth`` is that of the tokens behind some blocks against
the exact plan in bf16. torchao's fp8, diffusers' own, is not installed on that machine: the peer is bf16.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h200_forward as exact
import torch
from torch import Tensor

from swiftwan.device import versions

VIDEO, IMAGE = "forward-1.3b-832x480x81", "image-1.3b-832x480x1"
EXACT = "fused attention:flash4"
FP8 = "fused quantize:fp8"
CELLS: dict[str, tuple[str, str, str]] = {  # name: case, rung, plan
    "exact": (VIDEO, "exact", EXACT),
    "near-layers": (VIDEO, "near", f"{FP8} attention:flash4"),
    "near": (VIDEO, "near", f"{FP8} attention:fp8"),
    "near-graphs": (VIDEO, "near", f"{FP8} attention:fp8 cuda-graphs"),
    "near-ends": (VIDEO, "near", f"{FP8} attention:fp8:keep-layers=2"),
    "sparse25": (VIDEO, "sparse25", f"{FP8} attention:flash4 sparse-attention:keep=0.25,bits=8"),
    "sparse12": (VIDEO, "sparse12", f"{FP8} attention:flash4 sparse-attention:keep=0.125,bits=8"),
    "sparse25-16": (VIDEO, "sparse25", f"{FP8} attention:flash4 sparse-attention:keep=0.25"),
    "sparse12-16": (VIDEO, "sparse12", f"{FP8} attention:flash4 sparse-attention:keep=0.125"),
    "image-exact": (IMAGE, "exact", "fused batched-cfg cuda-graphs"),
    "image-near": (IMAGE, "near", f"{FP8} batched-cfg cuda-graphs"),
}
# TFLOP/s measured on this chip (DESIGN.md): products, and attention (cuDNN's fp8; FlashAttention-4 block-sparse).
CEILINGS = {"exact": (782, 708), "near": (1379, 871), "sparse25": (1379, 626), "sparse12": (1379, 580)}
KEPT = {"sparse25": 0.25, "sparse12": 0.125}
DEPTHS = (1, 5, 10, 15, 20, 25, 30)


class Bench(exact.Bench):
    def by_depth(self, specs: list[str]) -> list[Tensor]:
        """The tokens behind some blocks, in the order of the grid."""
        model = self.model(specs)
        condition = model.condition(self.text.prompt, self.case.latent_shape)
        seen: list[Tensor] = []

        def keep(block: torch.nn.Module, inputs: Any, x: Tensor) -> None:
            seen.append(x if condition.order is None else torch.empty_like(x).index_copy_(1, condition.order, x))

        for depth in DEPTHS:
            model.blocks[depth - 1].register_forward_hook(keep)
        model(self.latents, self.timestep, condition)
        return seen


def floor_seconds(case: exact.Case, rung: str) -> float:
    """Products and self-attention at the measured rates of this rung's arithmetic; nothing else."""
    config, tokens = case.known.transformer, case.tokens
    products, attention = CEILINGS[rung]
    work = (12 * tokens * config.dim**2 + 4 * tokens * config.dim * config.ffn_dim) / products
    work += KEPT.get(rung, 1) * 4 * tokens**2 * config.dim / attention
    return config.num_layers * work / 1e12 * (2 if case.guided else 1)


def measure(case_name: str, names: list[str], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    case = exact.CASES[case_name]
    bench = Bench(case, "cuda:0")
    weight_bytes = sum(p.nbytes for p in bench.weights.parameters())
    reference = bench.float32()
    exact_plan = EXACT if case_name == VIDEO else CELLS["image-exact"][2]
    exact_flow = bench.ours(exact_plan.split())()
    makers: dict[str, Callable[[], Callable[[], Tensor]]] = {
        f"diffusers {kind}": functools.partial(bench.peer, kind) for kind in arguments.peers
    }
    makers |= {name: functools.partial(bench.ours, CELLS[name][2].split()) for name in names}
    runs: dict[str, Callable[[], Tensor]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for label, make in makers.items():
        start = time.perf_counter()
        try:
            run = make()
            run()
            first = time.perf_counter() - start
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            flow = run()
            torch.cuda.synchronize()
            rows[label] = {
                "status": "ok" if flow.isfinite().all() else "failed",
                "error": exact.relative_error(flow, reference),
                "error_to_exact_plan": exact.relative_error(flow, exact_flow),
                "peak_bytes": torch.cuda.max_memory_allocated() - before + weight_bytes,
                "first_run_seconds": round(first, 1),
            }
            runs[label] = run
        except Exception as problem:
            traceback.print_exc()
            rows[label] = {"status": "failed", "reason": exact.failed(problem)}
        print(label, rows[label], flush=True)
    if case_name == VIDEO and not arguments.quick:
        states = bench.by_depth(EXACT.split())
        for name in runs.keys() & names:
            ours = bench.by_depth(CELLS[name][2].split())
            errors = [round(exact.relative_error(a, b), 5) for a, b in zip(ours, states, strict=True)]
            rows[name]["error_by_depth"] = dict(zip(map(str, DEPTHS), errors, strict=True))
            del ours
        del states
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(arguments.repeats):
        for label, run in runs.items():
            seconds[label].append(exact.timed(run, 10 if case.guided else 1))
    finished = []
    best = [kind for kind in ("compiled", "eager") if f"diffusers {kind}" in seconds]
    for label, row in rows.items():
        _, rung, plan = CELLS.get(label, (case_name, "exact", ""))
        row = {"case": case_name, "rung": rung, "plan": plan.split()} | row
        if label in seconds:
            ours = seconds[label]
            row |= {
                "seconds": round(statistics.median(ours), 5),
                "spread": [round(min(ours), 5), round(max(ours), 5)],
                "repeats": len(ours),
                "ceiling_fraction": round(floor_seconds(case, rung) / statistics.median(ours), 3),
            }
            for kind in best:
                peers = seconds[f"diffusers {kind}"]
                row[f"ratio_to_{kind}"] = round(statistics.median(b / a for a, b in zip(ours, peers, strict=True)), 3)
            if best:
                row |= {
                    "peer": f"diffusers {best[0]}, bf16" + (", cuDNN attention" if best[0] == "compiled" else ""),
                    "peer_seconds": round(statistics.median(seconds[f"diffusers {best[0]}"]), 5),
                    "ratio": row[f"ratio_to_{best[0]}"],
                }
        row |= {
            "error_against": "the plain float32 run",
            "exact_plan_error": exact.relative_error(exact_flow, reference),
            "tokens": case.tokens,
            "floor_seconds": round(floor_seconds(case, rung), 5),
            "device": bench.where.name,
            "versions": versions(bench.where),
            "commit": arguments.commit,
            "date": datetime.date.today().isoformat(),
        }
        if label.startswith("diffusers"):
            row["runner"] = label
        finished.append(row)
        print(f"{label:32} {row.get('seconds', 0) * 1e3:9.2f} ms  {row.get('ceiling_fraction')}", flush=True)
    if arguments.profile:
        for label in runs.keys() & names:
            exact.profile(runs[label], Path(arguments.profile), label)
    return finished


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", default=list(CELLS))
    parser.add_argument("--peers", nargs="*", default=["eager", "compiled"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="rungs.jsonl")
    parser.add_argument("--profile")
    parser.add_argument("--quick", action="store_true", help="leave the errors by depth out")
    parser.add_argument("--commit", default="")
    arguments = parser.parse_args()
    if not arguments.commit:
        asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        arguments.commit = asked.stdout.strip()
    with torch.no_grad():
        for case in (VIDEO, IMAGE):
            if names := [name for name in arguments.cells if CELLS[name][0] == case]:
                rows = measure(case, names, arguments)
                with Path(arguments.out).open("a") as out:
                    out.writelines(json.dumps(row) + "\n" for row in rows)
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
