"""One forward of each published size on an H200, beside diffusers' on the same random weights.

    python benchmarks/h200_forward.py CASE... [--plans 'attention:flash4 fused' ...] [--repeats 5]
        [--peers eager compiled] [--steady 2] [--products] [--out rows.jsonl] [--profile top.txt]

Ours and the peers stand in one process and take turns, so that a warm chip slows all alike. With ``--steady`` each then
runs alone for so many seconds while NVML tells power and clocks: what the chip sustains. ``--products`` measures the
matrix products and the attention of a forward with nothing between them, too. ``seconds`` is the median,
``ratio`` the median of peer over ours within a turn. The floor is the work at the matrix and attention rates measured
on the same chip; ``ceiling_fraction`` is that floor over ``seconds``.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from swiftwan.device import pick_device, versions
from swiftwan.guidance import Embeddings
from swiftwan.measure.hardware import HardwareSampler, readers
from swiftwan.measure.missing import Missing
from swiftwan.models.config import KNOWN_MODELS, KnownModel
from swiftwan.models.dit import KEEP_FP32, WanTransformer
from swiftwan.ops.attention import kernel
from swiftwan.ops.products import without_workspace
from swiftwan.plan import make_plan
from swiftwan.weights.load import randomize

TEXT_TOKENS = 64
GUIDANCE = 5.0
PRODUCTS = "matrix products and self-attention alone"


@dataclass(frozen=True)
class Case:
    model: str
    width: int
    height: int
    frames: int
    gemm_tflops: float = 782
    attention_tflops: float = 708
    guided: bool = False
    """Time one denoising step with guidance (two predictions), not one forward."""

    @property
    def known(self) -> KnownModel:
        return KNOWN_MODELS[self.model]

    @property
    def latent_shape(self) -> tuple[int, ...]:
        vae = self.known.vae
        step = vae.scale_factor_spatial
        return (
            1,
            self.known.transformer.in_channels,
            (self.frames - 1) // vae.scale_factor_temporal + 1,
            self.height // step,
            self.width // step,
        )

    @property
    def tokens(self) -> int:
        return math.prod(self.latent_shape[2:]) // math.prod(self.known.transformer.patch_size)

    def floor_seconds(self) -> float:
        """Matrix products and self-attention at their measured rates; nothing else."""
        config, tokens = self.known.transformer, self.tokens
        gemm = 12 * tokens * config.dim**2 + 4 * tokens * config.dim * config.ffn_dim
        attention = 4 * tokens**2 * config.dim
        seconds = config.num_layers * (gemm / self.gemm_tflops + attention / self.attention_tflops) / 1e12
        return seconds * (2 if self.guided else 1)


CASES = {
    "forward-1.3b-832x480x81": Case("wan2.1-t2v-1.3b", 832, 480, 81),
    "forward-1.3b-1280x720x97": Case("wan2.1-t2v-1.3b", 1280, 720, 97),
    "forward-ti2v-5b-1280x704x121": Case("wan2.2-ti2v-5b", 1280, 704, 121),
    "forward-14b-1280x720x81": Case("wan2.1-t2v-14b", 1280, 720, 81, 705, 657),
    "image-1.3b-832x480x1": Case("wan2.1-t2v-1.3b", 832, 480, 1, guided=True),
}


class Bench:
    """One case: random weights, inputs, and the runs that are compared on them."""

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        without_workspace()
        self.where = pick_device(device)
        self.device = torch.device(self.where.torch_device)
        self.weights = self.empty()
        randomize(self.weights, device=self.device, dtype=torch.bfloat16, keep_fp32=KEEP_FP32)
        draw = functools.partial(torch.randn, generator=torch.Generator("cpu").manual_seed(1))
        text_dim = case.known.transformer.text_dim
        self.latents = draw(case.latent_shape).to(self.device)
        self.timestep = torch.tensor([700.0], device=self.device)
        self.text = Embeddings(
            draw(1, TEXT_TOKENS, text_dim).to(self.device), draw(1, 2 * TEXT_TOKENS, text_dim).to(self.device)
        )

    def empty(self) -> WanTransformer:
        with torch.device("meta"):
            return WanTransformer(self.case.known.transformer).eval().requires_grad_(False)

    def model(self, specs: list[str]) -> WanTransformer:
        """A transformer with a plan of its own over the shared weights."""
        model = self.empty()
        model.load_state_dict(self.weights.state_dict(), assign=True)
        parts: Any = SimpleNamespace(
            transformer=model,
            transformer_2=None,
            vae=SimpleNamespace(run_fast=lambda: None),
            weights_move=False,
            device=self.device,
        )
        for technique in make_plan(specs, self.where).techniques:
            technique.install(parts)
        return model

    def ours(self, specs: list[str]) -> Callable[[], Tensor]:
        model = self.model(specs)
        if self.case.guided:
            guide = make_plan(specs, self.where).guide.guidance(
                model, self.text, self.case.latent_shape, GUIDANCE, [self.timestep.item()]
            )
            return lambda: guide(self.latents, self.timestep)
        condition = model.condition(self.text.prompt, self.case.latent_shape)
        return lambda: model(self.latents, self.timestep, condition)

    def float32(self) -> Tensor:
        """The plain run in float32 on the same bf16 weights: what errors are measured against."""
        model = self.empty()
        state = {name: value.float() for name, value in self.weights.state_dict().items()}
        model.load_state_dict(state, assign=True)
        condition = model.condition(self.text.prompt, self.case.latent_shape)
        flow = model(self.latents, self.timestep, condition)
        if self.case.guided:
            negative = model(self.latents, self.timestep, model.condition(self.text.negative, self.case.latent_shape))
            flow = negative + GUIDANCE * (flow - negative)
        return flow

    def products(self) -> Callable[[], Tensor]:
        """The blocks' matrix products and self-attention back to back on inputs that stand ready, and nothing else.

        No order of the rest goes below what these take at the chip's power: values are spread as in a forward, since a
        multiplier's power depends on the bits that change.
        """
        config = self.case.known.transformer
        attend, linear = kernel("flash4").load(), torch.nn.functional.linear
        batch = 2 if self.case.guided else 1
        draw = functools.partial(torch.randn, device=self.device, dtype=torch.bfloat16)
        x = draw(batch, self.case.tokens, config.dim)
        wide = torch.nn.functional.gelu(draw(batch, self.case.tokens, config.ffn_dim), approximate="tanh")
        heads = (config.num_attention_heads, config.dim // config.num_attention_heads)
        q, k, v = (draw(batch, self.case.tokens, *heads) for _ in range(3))
        blocks: Any = self.weights.blocks
        merged = [torch.cat((b.attn1.to_q.weight, b.attn1.to_k.weight, b.attn1.to_v.weight)) for b in blocks]

        def run() -> Tensor:
            for block, weight in zip(blocks, merged, strict=True):
                linear(x, weight)
                attend(q, k, v)
                for layer in (block.attn1.to_out[0], block.attn2.to_q, block.attn2.to_out[0], block.ffn.net[0].proj):
                    layer(x)
                out: Tensor = block.ffn.net[2](wide)
            return out

        return run

    def peer(self, kind: str) -> Callable[[], Tensor]:
        """diffusers' transformer: ``eager``, ``compiled`` block by block with cuDNN's attention, or the same with its
        blocks' layers in torchao's 8 bits: ``compiled-fp8``, or ``compiled-fp8-tuned`` where inductor tries each
        kernel in many forms, which torchao sets for the whole process unless told not to."""
        import inspect

        from diffusers import WanTransformer3DModel

        accepted = inspect.signature(WanTransformer3DModel.__init__).parameters
        config = asdict(self.case.known.transformer)
        with torch.device("meta"):
            model = WanTransformer3DModel(**{k: v for k, v in config.items() if k in accepted})
        model.load_state_dict(self.weights.state_dict(), assign=True)
        rope = model.rope
        model.rope = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len).to(self.device)
        model = model.eval().requires_grad_(False)
        if "fp8" in kind:
            from torchao import quantization as ao

            # Without a least value it divides rows of zeros by zero: here a text's padding, whose embedding has biases
            # of zero.
            by_row = ao.Float8DynamicActivationFloat8WeightConfig(
                granularity=ao.PerRow(), activation_value_lb=1e-12, set_inductor_config=kind.endswith("tuned")
            )
            ao.quantize_(model.blocks, by_row)
        if kind != "eager":
            model.set_attention_backend("_native_cudnn")
            model.compile_repeated_blocks(fullgraph=True)
        latents = self.latents.bfloat16()

        def pad(text: Tensor) -> Tensor:
            return torch.nn.functional.pad(text, (0, 0, 0, 512 - text.shape[1])).bfloat16()

        prompt, negative = pad(self.text.prompt), pad(self.text.negative)

        def run() -> Tensor:
            flow = model(latents, self.timestep, prompt, return_dict=False)[0]
            if self.case.guided:
                other = model(latents, self.timestep, negative, return_dict=False)[0]
                flow = other + GUIDANCE * (flow - other)
            return flow

        return run


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


def timed(run: Callable[[], Tensor], inner: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(inner):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / inner


def steady(run: Callable[[], Tensor], seconds: float, each: float) -> dict[str, Any]:
    """Run without a pause; what the chip drew meanwhile, its clock, and joules a run."""
    watched = readers("cuda:0")
    count = max(2, round(seconds / each))
    sampler = HardwareSampler([] if isinstance(watched, Missing) else watched, interval_seconds=0.1)
    with sampler:
        taken = timed(run, count)
    told: dict[str, Any] = {"seconds": round(taken, 5)}
    for device in sampler.trace().devices:
        found = device.summary()
        names = ("power_mean_watts", "sm_clock_mean_mhz", "clocks_held_back_percent", "temperature_peak_celsius")
        told |= {name: None if found[name] is None else round(found[name], 1) for name in names}
        told["joules_a_run"] = None if found["energy_joules"] is None else round(found["energy_joules"] / count, 2)
    return told


def failed(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0][:300]}"


def measure(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    case = CASES[name]
    bench = Bench(case, "cuda:0")
    weight_bytes = sum(p.nbytes for p in bench.weights.parameters())
    plain = bench.ours([])
    exact = plain()
    reference, against = exact, "the plain bf16 run"
    if "1.3b-832" in name:
        reference, against = bench.float32(), "the plain float32 run"
    runs: dict[str, Callable[[], Tensor]] = {}
    rows: dict[str, dict[str, Any]] = {}
    labels = {f"diffusers {kind}": functools.partial(bench.peer, kind) for kind in arguments.peers}
    labels |= {plan or "plain": functools.partial(bench.ours, plan.split()) for plan in arguments.plans}
    for label, make in labels.items():
        start = time.perf_counter()
        try:
            run = make()
            flow = run()
            first = time.perf_counter() - start
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            flow = run()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before + weight_bytes
            rows[label] = {"status": "ok", "error": relative_error(flow, reference), "peak_bytes": peak}
            rows[label] |= {"first_run_seconds": round(first, 1)}
            if not flow.isfinite().all():
                rows[label] |= {"status": "failed", "reason": "not finite"}
            runs[label] = run
        except Exception as problem:
            traceback.print_exc()
            rows[label] = {"status": "failed", "reason": failed(problem)}
        print(name, label, rows[label], f"{time.perf_counter() - start:.1f} s", flush=True)
    if arguments.products:
        rows[PRODUCTS], runs[PRODUCTS] = {"status": "ok"}, bench.products()
        timed(runs[PRODUCTS], 2)
    inner = 10 if case.guided else 1
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(arguments.repeats):  # two runs of each went before, as warm-up
        for label, run in runs.items():
            seconds[label].append(timed(run, inner))
    finished = []
    for label, row in rows.items():
        row = {"case": name, "rung": "exact", "plan": [] if label == "plain" else label.split()} | row
        if label in seconds:
            ours = seconds[label]
            row |= {
                "seconds": round(statistics.median(ours), 5),
                "spread": [round(min(ours), 5), round(max(ours), 5)],
                "repeats": len(ours),
                "ceiling_fraction": round(case.floor_seconds() / statistics.median(ours), 3),
            }
            for kind in arguments.peers:
                if peers := seconds.get(f"diffusers {kind}"):
                    row[f"ratio_to_{kind}"] = round(
                        statistics.median(b / a for a, b in zip(ours, peers, strict=True)), 3
                    )
            if arguments.steady:
                row["steady"] = steady(runs[label], arguments.steady, statistics.median(ours))
            best = [kind for kind in ("compiled", "eager") if f"diffusers {kind}" in seconds]
            if best:
                row |= {
                    "peer": f"diffusers {best[0]}, bf16" + (", cuDNN attention" if best[0] == "compiled" else ""),
                    "peer_seconds": round(statistics.median(seconds[f"diffusers {best[0]}"]), 5),
                    "ratio": row[f"ratio_to_{best[0]}"],
                }
        row |= {
            "error_against": against,
            "plain_bf16_error": relative_error(exact, reference),
            "dtype": "bfloat16",
            "tokens": case.tokens,
            "text_tokens": TEXT_TOKENS,
            "floor_seconds": round(case.floor_seconds(), 5),
            "device": bench.where.name,
            "versions": versions(bench.where),
            "commit": arguments.commit,
            "date": datetime.date.today().isoformat(),
        }
        if label.startswith("diffusers"):
            row |= {"plan": [], "runner": label}
        if label == PRODUCTS:
            row |= {"plan": [], "runner": label, "rung": "bound"}
        finished.append(row)
        print(f"{name:32} {label:45} {row.get('seconds', 0) * 1e3:9.2f} ms  {row.get('ceiling_fraction')}", flush=True)
    if arguments.profile:
        for label, run in runs.items():
            if not label.startswith("diffusers") and label != PRODUCTS:
                profile(run, Path(arguments.profile), f"{name}: {label}")
    return finished


def profile(run: Callable[[], Tensor], path: Path, title: str) -> None:
    """Append the kernels of one run, longest total first."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    table = trace.key_averages()
    kernels = sorted(table, key=lambda item: -item.device_time_total)
    total = sum(item.device_time_total for item in kernels)
    with path.open("a") as out:
        out.write(f"\n{title}: {total / 1e3:.2f} ms of kernels\n")
        for item in kernels[:30]:
            out.write(f"{item.device_time_total / 1e3:10.3f} ms {item.count:6} x  {item.key[:150]}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+", choices=CASES)
    parser.add_argument("--plans", nargs="+", default=["", "fused attention:flash4"])
    parser.add_argument("--peers", nargs="*", default=["eager", "compiled"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steady", type=float, default=0.0)
    parser.add_argument("--products", action="store_true")
    parser.add_argument("--out", default="-")
    parser.add_argument("--profile")
    parser.add_argument("--commit", default="")
    arguments = parser.parse_args()
    if not arguments.commit:
        asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        arguments.commit = asked.stdout.strip()
    with torch.no_grad():
        for name in arguments.cases:
            rows = measure(name, arguments)
            with sys.stdout if arguments.out == "-" else Path(arguments.out).open("a") as out:
                for row in rows:
                    out.write(json.dumps(row) + "\n")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
