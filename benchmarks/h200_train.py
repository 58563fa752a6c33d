"""A LoRA training step at true sizes on an H200, beside diffusers' transformer with peft on the same random weights.

    python benchmarks/h200_train.py CASE RUN... [--repeats 2] [--turns 2] [--out rows.jsonl] [--profile kernels.txt]

A step is everything from latents on the device to the changed adapter: noise, forward, backward, clipping, AdamW; rank
32 on all linears of the blocks, batch 1. A RUN is ``peer`` or ``ours`` and its settings, joined by ``+``. For a peer:
``eager`` or ``compiled`` (block by block), ``checkpointed``, ``cudnn``, ``fp32`` (adapters; default bf16, which is
faster). For ours: self-attention, ``flash4``, ``cudnn``, ``sdpa`` or ``fp8-attention``; what blocks keep
(``all``, ``products``, ``attention``, ``nothing``, or what fits ``24gb``), ``fp8`` (the frozen layers), ``eager``,
``offloaded`` (the frozen weights in host memory; last, since it takes them from the others); our adapters are fp32.

All runs share one process, one chip and its weights, and are timed by turns; a row's peak is without what the others
hold. TFLOP are those of ``swiftwan.train.work``.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import inspect
import json
import math
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from swiftwan.device import pick_device, versions
from swiftwan.models.config import KNOWN_MODELS, POCKET, KnownModel
from swiftwan.models.dit import KEEP_FP32, WanTransformer
from swiftwan.ops.attention import kernel, sdpa
from swiftwan.ops.attention_fp8_training import attention_fp8
from swiftwan.ops.flash4_training import flash4
from swiftwan.train import memory, work
from swiftwan.weights.load import randomize

RANK = 32
TEXT_TOKENS = 64
TARGETS = r".*blocks\..*(to_q|to_k|to_v|to_out\.0|ffn\.net\.0\.proj|ffn\.net\.2)"


@dataclass(frozen=True)
class Case:
    model: str
    width: int
    height: int
    frames: int
    gemm_tflops: float = 782
    attention_tflops: float = 708

    @property
    def known(self) -> KnownModel:
        return POCKET if self.model == POCKET.name else KNOWN_MODELS[self.model]

    @property
    def latent_shape(self) -> tuple[int, ...]:
        vae = self.known.vae
        step = vae.scale_factor_spatial
        frames = (self.frames - 1) // vae.scale_factor_temporal + 1
        return 1, self.known.transformer.in_channels, frames, self.height // step, self.width // step

    @property
    def tokens(self) -> int:
        return math.prod(self.latent_shape[2:]) // math.prod(self.known.transformer.patch_size)

    @property
    def tflop(self) -> tuple[float, float]:
        return work.tflop(self.known.transformer, self.tokens)

    def floor_seconds(self) -> float:
        linears, attention = self.tflop
        return linears / self.gemm_tflops + attention / self.attention_tflops


CASES = {
    "train-1.3b-832x480x81": Case("wan2.1-t2v-1.3b", 832, 480, 81),
    "train-14b-832x480x81": Case("wan2.1-t2v-14b", 832, 480, 81, 705, 657),
    "tiny": Case("pocket", 64, 64, 5),
}


def optimized(parameters: list[nn.Parameter], loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A whole step, from a loss."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> Tensor:
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


class Bench:
    """One case: random weights and inputs, shared by all runs."""

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        self.where = pick_device(device)
        self.device = torch.device(self.where.torch_device)
        with torch.device("meta"):
            self.weights = WanTransformer(case.known.transformer).requires_grad_(False)
        randomize(self.weights, device=self.device, dtype=torch.bfloat16, keep_fp32=KEEP_FP32)
        draw = torch.Generator("cpu").manual_seed(1)
        self.latents = torch.randn(case.latent_shape, generator=draw).to(self.device)
        self.text = torch.randn(1, TEXT_TOKENS, case.known.transformer.text_dim, generator=draw).to(self.device)
        self.own = allocated()
        self.gradients: dict[str, Tensor] | None = None

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, timestep (1,) and the flow to predict."""
        noise = torch.randn_like(self.latents)
        level = torch.sigmoid(torch.randn(1, device=self.device))
        noisy = torch.lerp(self.latents, noise, level.view(-1, 1, 1, 1, 1))
        return noisy, 1000 * level, noise - self.latents

    def peer(self, words: set[str]) -> Callable[[], Tensor]:
        from diffusers import WanTransformer3DModel
        from peft import LoraConfig

        accepted = inspect.signature(WanTransformer3DModel.__init__).parameters
        with torch.device("meta"):
            config = asdict(self.case.known.transformer)
            model = WanTransformer3DModel(**{k: v for k, v in config.items() if k in accepted})
        model.load_state_dict(self.weights.state_dict(), assign=True)
        rope = model.rope
        model.rope = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len).to(self.device)
        model = model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
        model.train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.data = parameter.data.to(self.device, torch.float32 if "fp32" in words else torch.bfloat16)
        if "checkpointed" in words:
            model.enable_gradient_checkpointing()
        if "cudnn" in words:
            model.set_attention_backend("_native_cudnn")
        if "compiled" in words:
            model.compile_repeated_blocks()
        text = torch.nn.functional.pad(self.text, (0, 0, 0, 512 - TEXT_TOKENS)).bfloat16()

        def loss() -> Tensor:
            noisy, timestep, flow = self.batch()
            with torch.autocast(self.device.type, torch.bfloat16, enabled="fp32" in words):
                got = model(noisy.bfloat16(), timestep, text, return_dict=False)[0]
            return (got.float() - flow).square().mean()

        return optimized(parameters, loss)

    def ours(self, words: set[str]) -> Callable[[], Tensor]:
        from swiftwan.train import adapter, flow, processes
        from swiftwan.train.trainee import compile_blocks, equip

        with torch.device("meta"):
            model = WanTransformer(self.case.known.transformer).requires_grad_(False)
        model.load_state_dict(self.weights.state_dict(), assign=True)
        targets = adapter.chosen_targets(["all"])
        factors = adapter.inject(model, RANK, RANK, targets, seed=0)
        attend = next(ATTENTION[word] for word in words if word in ATTENTION)
        if attend in (flash4, attention_fp8):
            kernel("flash4").load()  # sets where it keeps what it compiles
        equip(model, self.where, attend)
        if "fp8" in words:
            adapter.freeze_in_fp8(model, self.where)
        config = self.case.known.transformer
        keep = next((keep for keep in memory.KEEPS if keep in words), "all")
        choice = [keep] * config.num_layers
        if limit := next((int(word.removesuffix("gb")) for word in words if word.endswith("gb")), None):
            budget = limit * 10**9 - self.own - 16 * sum(f.numel() for f in factors.values())
            choice = memory.choose(config, self.case.tokens, int(0.95 * budget), 2)
        print(label_of(choice), flush=True)
        memory.keep_in_blocks(model, choice)
        if "eager" not in words:
            compile_blocks(model)
        if "offloaded" in words:
            processes.Processes(self.device, "offloaded")
            processes.shard(model, list(factors.values()), self.device, "offloaded")
            self.weights = None  # type: ignore[assignment]  # the only whole copy on the device

        def loss() -> Tensor:
            noise = torch.randn_like(self.latents)
            level = torch.sigmoid(torch.randn(1, device=self.device))
            return flow.loss(model, flow.Batch(self.latents, self.text), level, noise)

        self.learning = factors, loss
        return optimized(list(factors.values()), loss)

    def gradient_error(self) -> float:
        """How far the gradients of the adapter that was built last lie from those of the first, relative in norm: the
        same noise and the same factors, none of them zero. On the host, where they are in nobody's way."""
        factors, loss = self.learning
        was = {name: factor.data.clone() for name, factor in factors.items()}
        draw = torch.Generator(self.device).manual_seed(2)
        for factor in factors.values():
            factor.data.normal_(0, factor.shape[1] ** -0.5 / 4, generator=draw)
        torch.manual_seed(3)
        loss().backward()
        found = {}
        for name, factor in factors.items():
            assert factor.grad is not None
            found[name] = factor.grad.cpu()
            factor.data, factor.grad = was[name], None
        self.gradients = self.gradients or found
        off = sum((found[name] - first).double().square().sum().item() for name, first in self.gradients.items())
        return math.sqrt(off / sum(first.double().square().sum().item() for first in self.gradients.values()))


def label_of(choice: list[str]) -> str:
    return ", ".join(f"{choice.count(keep)} blocks keep {keep}" for keep in dict.fromkeys(choice))


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v)


ATTENTION = {"cudnn": _cudnn, "flash4": flash4, "sdpa": sdpa, "fp8-attention": attention_fp8}


def allocated() -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


class Run:
    """One setting: its step, and the row that grows with each turn."""

    def __init__(self, bench: Bench, name: str, label: str, commit: str) -> None:
        self.bench, self.label = bench, label
        self.times: list[float] = []
        self.step: Callable[[], Tensor] | None = None
        self.row: dict[str, Any] = {"case": name, "rung": rung(label), "runner": runner(label), "plan": words(label)}
        self.facts = {
            "rank": RANK,
            "tokens_per_step": bench.case.tokens,
            "text_tokens": TEXT_TOKENS,
            "tflop_per_step": round(sum(bench.case.tflop), 1),
            "floor_seconds": round(bench.case.floor_seconds(), 3),
            "device": bench.where.name,
            "versions": versions(bench.where),
            "commit": commit,
            "date": datetime.date.today().isoformat(),
        }

    def build(self, compare: bool) -> None:
        kind = self.label.split(" ")[0]
        others = allocated() - self.bench.own
        began = time.perf_counter()
        self.step = getattr(self.bench, kind)(set(words(self.label)))
        if compare and kind == "ours":
            self.row["error"] = round(self.bench.gradient_error(), 5)
        self.timed(2)
        self.row["first_steps_seconds"] = round(time.perf_counter() - began, 1)
        if self.bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.timed(1)
            self.row["peak_bytes"] = torch.cuda.max_memory_allocated() - others

    def timed(self, count: int) -> list[float]:
        """Seconds of steps in a row, between their ends: the host runs ahead, as it does in training."""
        assert self.step is not None
        ends = [self.now()]
        for _ in range(count):
            self.loss = self.step()
            ends.append(self.now())
        if self.bench.device.type == "cuda":
            torch.cuda.synchronize()
        return [
            after - before if isinstance(before, float) else before.elapsed_time(after) / 1e3
            for before, after in pairwise(ends)
        ]

    def now(self) -> float | torch.cuda.Event:
        """Read at once, or when the device comes to it."""
        if self.bench.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def turn(self, repeats: int) -> None:
        self.times += self.timed(1 + repeats)[1:]  # with the first, memory changes hands
        seconds = statistics.median(self.times)
        self.row |= {
            "status": "ok",
            "seconds": round(seconds, 4),
            "spread": [round(min(self.times), 4), round(max(self.times), 4)],
            "repeats": len(self.times),
            "tokens_per_second": round(self.bench.case.tokens / seconds),
            "tflops": round(sum(self.bench.case.tflop) / seconds, 1),
            "ceiling_fraction": round(self.bench.case.floor_seconds() / seconds, 3),
            "loss": self.loss.item(),
        }

    def attempt(self, part: Callable[..., None], *args: Any) -> None:
        """Run a part of it; a failure becomes the row."""
        if self.row.get("status") == "failed":
            return
        try:
            part(*args)
        except Exception as problem:
            traceback.print_exc()
            self.step = None
            self.row |= {"status": "failed", "reason": f"{type(problem).__name__}: {str(problem).strip()[:300]}"}
        print(json.dumps(self.row), flush=True)
        if self.bench.device.type == "cuda":
            torch.cuda.empty_cache()


def words(label: str) -> list[str]:
    return label.split(" ")[1].split("+")


def runner(label: str) -> str:
    if label.startswith("ours"):
        return "ours"
    return ", ".join(["diffusers + peft", *words(label), *([] if "fp32" in label else ["bf16 adapters"])])


def rung(label: str) -> str:
    """Peers are no rung; memory limits that a step without any would meet are none."""
    if label.startswith("peer"):
        return "peer"
    if "fp8" in label:
        return "near"
    return "exact-24gb" if "24gb" in label else "exact"


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each of ours beside the fastest peer of the same process that computes activations again as it does, or not."""

    def again(row: dict[str, Any]) -> bool:
        return any(word == "checkpointed" or word in memory.KEEPS[1:] or word.endswith("gb") for word in row["plan"])

    done = [row for row in rows if row.get("status") == "ok"]
    for row in (row for row in done if row["rung"] != "peer"):
        peers = [peer for peer in done if peer["rung"] == "peer" and again(peer) == again(row)]
        if peers:
            best = min(peers, key=lambda peer: peer["seconds"])
            row |= {"peer": best["runner"], "peer_seconds": best["seconds"], "peer_peak_bytes": best.get("peak_bytes")}
            row["ratio"] = round(best["seconds"] / row["seconds"], 3)
    return rows


def profile(step: Callable[[], Tensor], path: Path, title: str) -> None:
    """Append the kernels of one step, longest total first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    kernels = sorted(trace.key_averages(), key=lambda item: -item.device_time_total)
    with path.open("a") as out:
        out.write(f"\n{title}: {sum(item.device_time_total for item in kernels) / 1e3:.1f} ms of kernels\n")
        for item in kernels[:40]:
            out.write(f"{item.device_time_total / 1e3:10.2f} ms {item.count:6} x  {item.key[:170]}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--repeats", type=int, default=2, help="of a turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--gradients", action="store_true", help="rows' error: of ours from the first of ours")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--profile", type=Path, help="append the kernels of a step here")
    parser.add_argument("--commit", default="")
    options = parser.parse_args()
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    torch._dynamo.config.recompile_limit = 64  # the runs share a block's code
    bench = Bench(CASES[options.case], options.device)
    runs = [Run(bench, options.case, label, options.commit or asked.stdout.strip()) for label in options.runs]

    def save() -> None:
        rows = compared([run.row | run.facts for run in runs])
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))

    for run in runs:
        run.attempt(run.build, options.gradients)
        run.attempt(run.turn, options.repeats)
        save()
        if options.profile and run.step is not None and run.row["rung"] != "peer":
            profile(run.step, options.profile, f"{options.case}: {run.label}")
    for _ in range(options.turns - 1):
        for run in runs:
            run.attempt(run.turn, options.repeats)
            save()


if __name__ == "__main__":
    main()
