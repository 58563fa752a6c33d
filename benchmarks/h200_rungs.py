"""Forwards beyond the exact rung on an H200: 8-bit layers and attention, and block-sparse attention, beside diffusers.

    python benchmarks/h200_rungs.py [near ...] [--peers eager compiled compiled-fp8] [--repeats 5] [--steady 2]
        [--products] [--out rows.jsonl] [--profile top.txt]

Weights are random, so errors say what rounding does to numbers of the usual size, and less than nothing of what
skipping blocks does to a picture: random queries and keys give all tokens about the same weight, which is the worst
case for a method that keeps the heaviest. ``error_by_depth`` is that of the tokens behind some blocks against
the exact plan in bf16. diffusers' own 8 bits are torchao's (``-fp8``); where no such peer is asked for, it is bf16.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import json
import math
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import h200_forward as exact
import torch
from torch import Tensor

from swiftwan.device import versions
from swiftwan.ops.attention import kernel
from swiftwan.ops.fp8 import Fp8Linear, quantize_rows
from swiftwan.ops.modulate import Tokens, whole
from swiftwan.ops.sparse import choose_blocks
from swiftwan.plan import make_plan
from swiftwan.techniques.fused import MergedProjection

VIDEO, LARGE, IMAGE = "forward-1.3b-832x480x81", "forward-1.3b-1280x720x97", "image-1.3b-832x480x1"
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
    "sparse25-graphs": (VIDEO, "sparse25", f"{FP8} sparse-attention:keep=0.25,bits=8 cuda-graphs"),
    "sparse12-graphs": (VIDEO, "sparse12", f"{FP8} sparse-attention:keep=0.125,bits=8 cuda-graphs"),
    "sparse25-16": (VIDEO, "sparse25", f"{FP8} attention:flash4 sparse-attention:keep=0.25"),
    "sparse12-16": (VIDEO, "sparse12", f"{FP8} attention:flash4 sparse-attention:keep=0.125"),
    "large-exact": (LARGE, "exact", EXACT),
    "large-near": (LARGE, "near", f"{FP8} attention:fp8"),
    "large-sparse25": (LARGE, "sparse25", f"{FP8} attention:flash4 sparse-attention:keep=0.25,bits=8"),
    "large-sparse12": (LARGE, "sparse12", f"{FP8} attention:flash4 sparse-attention:keep=0.125,bits=8"),
    "image-exact": (IMAGE, "exact", "fused batched-cfg cuda-graphs"),
    "image-exact-flash4": (IMAGE, "exact", "fused attention:flash4 batched-cfg cuda-graphs"),
    "image-near": (IMAGE, "near", f"{FP8} batched-cfg cuda-graphs"),
    "image-near-flash4": (IMAGE, "near", f"{FP8} attention:flash4 batched-cfg cuda-graphs"),
    "image-near-8": (IMAGE, "near", f"{FP8} attention:fp8 batched-cfg cuda-graphs"),
}
# TFLOP/s measured on this chip: products, and attention (cuDNN's fp8; FlashAttention-4 block-sparse).
CEILINGS = {"exact": (782, 708), "near": (1379, 871), "sparse25": (1379, 626), "sparse12": (1379, 580)}
PEERS = {
    "eager": "diffusers eager, bf16",
    "compiled": "diffusers compiled, bf16, cuDNN attention",
    "compiled-fp8": "diffusers compiled, fp8 (torchao), cuDNN attention",
    "compiled-fp8-tuned": "diffusers compiled, tuned, fp8 (torchao), cuDNN attention",
}
"""Of :meth:`h200_forward.Bench.peer`. A row's ratio is to the last that ran beside it; an exact row's to bf16."""
KEPT = {"sparse25": 0.25, "sparse12": 0.125}
DEPTHS = (1, 5, 10, 15, 20, 25, 30)
SHIFT = 5.0


class Bench(exact.Bench):
    def by_depth(self, specs: list[str]) -> list[Tensor]:
        """The tokens behind some blocks, in the order of the grid."""
        model = self.model(specs)
        condition = model.condition(self.text.prompt, self.case.latent_shape)
        seen: list[Tensor] = []

        def keep(block: torch.nn.Module, inputs: Any, out: Tokens) -> Tensor:
            x = whole(out)
            seen.append(x if condition.order is None else torch.empty_like(x).index_copy_(1, condition.order, x))
            return x

        for depth in DEPTHS:
            model.blocks[depth - 1].register_forward_hook(keep)
        model(self.latents, self.timestep, condition)
        return seen

    def by_step(self, specs: list[str], steps: int) -> list[Tensor]:
        """Latents behind each step of a guided run: Euler, shift 5."""
        even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        sigmas = (SHIFT * even / (1 + (SHIFT - 1) * even)).tolist()
        model, plan = self.model(specs), make_plan(specs, self.where)
        timesteps = [1000 * sigma for sigma in sigmas[:-1]]
        guide = plan.guide.guidance(model, self.text, self.case.latent_shape, exact.GUIDANCE, timesteps)
        latents, seen = self.latents, []
        for timestep, sigma, following in zip(timesteps, sigmas, sigmas[1:], strict=False):
            flow = guide(latents, torch.tensor([timestep], device=self.device))
            latents = latents + (following - sigma) * flow
            seen.append(latents)
        return seen

    def products_alone(self, rung: str) -> Callable[[], Tensor]:
        """What no order of the rest can spare a rung: the blocks' products and its self-attention, back to back on
        inputs that stand ready, rounded already but for the exact one. Pictures attend in 16 bits: rounding costs them
        more than it saves."""
        config, tokens = self.case.known.transformer, self.case.tokens
        draw = functools.partial(torch.randn, device=self.device, dtype=torch.bfloat16)
        heads = (config.num_attention_heads, config.dim // config.num_attention_heads)

        from swiftwan.ops import tall_product
        from swiftwan.ops.attention_fp8_gluon import attend_rounded
        from swiftwan.ops.round_attention import round_and_pool

        flash4 = kernel("flash4").load()
        ready: Callable[[Tensor], Any] = (lambda x: x) if rung == "exact" else quantize_rows

        def inputs(batch: int) -> tuple[Any, Any, Callable[[], Tensor]]:
            wide = torch.nn.functional.gelu(draw(batch, tokens, config.ffn_dim), approximate="tanh")
            q, k, v = (draw(batch, tokens, *heads) for _ in range(3))
            if self.case.guided or rung == "exact":
                return ready(draw(batch, tokens, config.dim)), ready(wide), lambda: flash4(q, k, v)
            rounded, q_means, k_means = round_and_pool(q, k, v)
            blocks = choose_blocks(q_means, k_means, KEPT[rung]) if rung in KEPT else None
            attend = functools.partial(attend_rounded, rounded, torch.bfloat16, blocks)
            return quantize_rows(draw(batch, tokens, config.dim)), quantize_rows(wide), attend

        x, wide, attend = inputs(2 if self.case.guided else 1)
        # A guided step's two predictions part with the first text that they see.
        first_x, _, first_attend = inputs(1)
        layers: list[tuple[Callable[..., Tensor], ...]] = []
        for block in cast(list[Any], list(self.weights.blocks)):
            one, other, ffn = block.attn1, block.attn2, block.ffn.net
            rest = (one.to_out[0], other.to_q, other.to_out[0], ffn[0].proj, ffn[2])
            if rung == "exact":
                merged = MergedProjection(one)
                qkv = functools.partial(torch.nn.functional.linear, weight=merged.weight, bias=merged.bias)
                layers.append((qkv, *rest))
                continue
            in_8_bits = [Fp8Linear.merged([Fp8Linear.of(layer) for layer in (one.to_q, one.to_k, one.to_v)])]
            in_8_bits += map(Fp8Linear.of, rest)
            for layer in filter(tall_product.fits, in_8_bits):
                layer.product = tall_product.scaled_product
            layers.append(tuple(in_8_bits))

        def run() -> Tensor:
            for number, (qkv, out, text_q, text_out, up, down) in enumerate(layers):
                qkv(x if number else first_x)
                (attend if number else first_attend)()
                out(x if number else first_x)
                text_q(x if number else first_x)
                text_out(x)
                up(x)
                flow: Tensor = down(wide)
            return flow

        return recorded(run)


def recorded(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """As a CUDA graph: a picture's products are over before the next ones are launched."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    # With ``run`` what it reads would be gone, and the graph multiply whatever comes to lie there.
    return lambda: (graph.replay(), out, run)[1]


def floor_seconds(case: exact.Case, rung: str) -> float:
    """Products and self-attention at the measured rates of this rung's arithmetic; nothing else."""
    config, tokens = case.known.transformer, case.tokens
    products, attention = CEILINGS[rung]
    work = (12 * tokens * config.dim**2 + 4 * tokens * config.dim * config.ffn_dim) / products
    work += KEPT.get(rung, 1) * 4 * tokens**2 * config.dim / attention
    return config.num_layers * work / 1e12 * (2 if case.guided else 1)


def measure(case_name: str, names: list[str], arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """All rows, as soon as there is something to tell of them, and again when there is more."""
    case = exact.CASES[case_name]
    bench = Bench(case, "cuda:0")
    used = versions(bench.where)
    if any("fp8" in kind for kind in arguments.peers):
        used["torchao"] = importlib.metadata.version("torchao")
    weight_bytes = sum(p.nbytes for p in bench.weights.parameters())
    exact_flow = bench.ours((EXACT if case_name != IMAGE else CELLS["image-exact"][2]).split())()
    # 33 s in float32 at the large size.
    reference, against = (exact_flow, "the exact plan") if case_name == LARGE else (bench.float32(), "plain float32")
    makers: dict[str, Callable[[], Callable[[], Tensor]]] = {
        f"diffusers {kind}": functools.partial(bench.peer, kind) for kind in arguments.peers
    }
    makers |= {name: functools.partial(bench.ours, CELLS[name][2].split()) for name in names}
    rungs = sorted({CELLS[name][1] for name in names}) if arguments.products else []
    makers |= {f"{exact.PRODUCTS}, {rung}": functools.partial(bench.products_alone, rung) for rung in rungs}
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
            rows[label] = {"status": "ok" if flow.isfinite().all() else "failed"}
            if label.startswith(exact.PRODUCTS):
                runs[label] = run
                continue
            rows[label] |= {
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
    facts = {
        "error_against": against,
        "exact_plan_error": exact.relative_error(exact_flow, reference),
        "tokens": case.tokens,
        "device": bench.where.name,
        "versions": used,
        "commit": arguments.commit,
        "date": datetime.date.today().isoformat(),
    }
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(arguments.repeats):
        for label, run in runs.items():
            seconds[label].append(exact.timed(run, 10 if case.guided else 1))
    for label, row in rows.items():
        rung, told = who(label)
        rows[label] = {"case": case_name, **told, **row, **facts}
        if label in runs:
            rows[label] |= times(label, rung, seconds, floor_seconds(case, rung))
            if arguments.steady:
                median = statistics.median(seconds[label])
                rows[label]["steady"] = exact.steady(runs[label], arguments.steady, median)
            print(f"{label:32} {rows[label]['seconds'] * 1e3:9.2f} ms  {rows[label]['ceiling_fraction']}", flush=True)
    yield list(rows.values())
    if arguments.profile:
        for label in runs.keys() & names:
            exact.profile(runs[label], Path(arguments.profile), label)
    if case_name == VIDEO and arguments.depth:
        states = bench.by_depth(EXACT.split())
        for name in [name for name in names if name in runs and "cuda-graphs" not in CELLS[name][2]]:
            ours = bench.by_depth(CELLS[name][2].split())
            errors = [round(exact.relative_error(a, b), 5) for a, b in zip(ours, states, strict=True)]
            rows[name]["error_by_depth"] = dict(zip(map(str, DEPTHS), errors, strict=True))
            print(name, rows[name]["error_by_depth"], flush=True)
            yield list(rows.values())
        del states
    if case_name == VIDEO and arguments.steps:
        walk = bench.by_step(EXACT.split(), arguments.steps)
        for name in [
            name for name in names if name in runs and "cuda-graphs" not in CELLS[name][2] and name != "exact"
        ]:
            ours = bench.by_step(CELLS[name][2].split(), arguments.steps)
            rows[name]["error_by_step"] = [
                round(exact.relative_error(a, b), 5) for a, b in zip(ours, walk, strict=True)
            ]
            rows[name]["latents_psnr_db"] = round(psnr_db(ours[-1], walk[-1]), 2)
            print(name, rows[name]["latents_psnr_db"], rows[name]["error_by_step"], flush=True)
            yield list(rows.values())


def who(label: str) -> tuple[str, dict[str, Any]]:
    """The rung whose ceilings hold for a run, and what its row says of it."""
    if label in CELLS:
        _, rung, plan = CELLS[label]
        return rung, {"rung": rung, "plan": plan.split()}
    if label.startswith(exact.PRODUCTS):
        rung = label.rpartition(" ")[2]
        return rung, {"rung": "bound", "plan": [], "runner": exact.PRODUCTS, "variant": rung}
    return "exact", {"rung": "exact", "plan": [], "runner": label}


def psnr_db(got: Tensor, expected: Tensor) -> float:
    """Of latents, whose peak is the range that the exact ones span."""
    peak = (expected.max() - expected.min()).item()
    return 10 * math.log10(peak**2 / (got - expected).square().mean().item())


def times(label: str, rung: str, seconds: dict[str, list[float]], floor: float) -> dict[str, Any]:
    """What a row says of its own time and of the peers', which took turns with it."""
    ours = seconds[label]
    row: dict[str, Any] = {
        "seconds": round(statistics.median(ours), 5),
        "spread": [round(min(ours), 5), round(max(ours), 5)],
        "repeats": len(ours),
        "floor_seconds": round(floor, 5),
        "ceiling_fraction": round(floor / statistics.median(ours), 3),
    }
    for kind, told in PEERS.items():
        if (peers := seconds.get(f"diffusers {kind}")) and not (rung == "exact" and "fp8" in kind):
            ratio = round(statistics.median(b / a for a, b in zip(ours, peers, strict=True)), 3)
            row |= {f"ratio_to_{kind}": ratio, "ratio": ratio, "peer": told}
            row["peer_seconds"] = round(statistics.median(peers), 5)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", default=list(CELLS))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["eager", "compiled"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="rungs.jsonl")
    parser.add_argument("--profile")
    parser.add_argument("--depth", action="store_true", help="also errors by depth")
    parser.add_argument("--steps", type=int, default=0, help="also errors by step of a guided run of so many")
    parser.add_argument("--products", action="store_true", help="also the products and attention of each rung alone")
    parser.add_argument("--steady", type=float, default=0.0, help="then each without a pause for so many seconds")
    parser.add_argument("--commit", default="")
    arguments = parser.parse_args()
    if not arguments.commit:
        asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        arguments.commit = asked.stdout.strip()
    with torch.no_grad():
        done: list[dict[str, Any]] = []
        for case in (VIDEO, LARGE, IMAGE):
            names = [name for name in arguments.cells if CELLS[name][0] == case]
            rows: list[dict[str, Any]] = []
            for rows in measure(case, names, arguments) if names else ():
                Path(arguments.out).write_text("".join(json.dumps(row) + "\n" for row in done + rows))
            done += rows
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
