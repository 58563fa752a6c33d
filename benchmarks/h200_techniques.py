"""Techniques and recipes on random weights of true size: peak memory by phase and seconds a step, beside the estimate.

    python benchmarks/h200_techniques.py GROUP|CASE... [--out rows.jsonl] [--steps 2]

An engine that is loaded is switched to the next case's plan where that does (``switched``; ``load_seconds`` is then
what the switch took). A case runs twice (unless ``--once``): the first run loads the text encoder and compiles, the
second is timed; memory is the larger of both. A case with ``cap`` runs while torch may take no more than so many GB.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import resource
import shutil
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import random_lora
import torch
from pocket_pairs import Loaded
from safetensors.torch import load_file, save_file

import swiftwan as sw
from swiftwan.device import pick_device, versions
from swiftwan.models.vae_tiny import TinyDecoder, TinySizes
from swiftwan.pipelines.result import StepEvent
from swiftwan.places import cache_folder
from swiftwan.plan import parse
from swiftwan.recipes import RECIPES
from swiftwan.techniques.base import RELOAD
from swiftwan.techniques.vae import channels_last

PROMPT = "A cat walks on the grass, realistic, its tail high, while the camera follows it slowly from behind"


@dataclass(frozen=True)
class Case:
    model: str
    plan: tuple[str, ...] | str
    size: tuple[int, int, int] = (832, 480, 81)
    cap: float | None = None
    """GB that torch may take."""
    peer: Callable[[Any], None] | None = None
    """What is done to a diffusers pipeline, which then runs instead."""


SMALL, LARGE = "random:wan2.1-t2v-1.3b", "random:wan2.1-t2v-14b"
MIDDLE, EXPERTS = "random:wan2.2-ti2v-5b", "random:wan2.2-t2v-a14b"
EXACT = ("fused", "attention:flash4", "vae:fast")


LORA, TINY = "random_lora.safetensors", "random_tiny.safetensors"
"""Files of true size with random weights, made where they are missing."""


def made(file: str) -> str:
    """The file's name, with the file there."""
    if not Path(file).exists():
        if file == LORA:
            random_lora.write(SMALL.removeprefix("random:"), file)
        else:  # the shapes of taew2_1
            save_file(TinyDecoder(TinySizes(16, (256, 128, 64, 64), 1)).state_dict(), file)
    return file


def alone(*specs: str) -> dict[str, Case]:
    return {f"alone {spec}": Case(SMALL, (spec,)) for spec in specs}


def recipe(name: str) -> Case:
    one = RECIPES[name]
    size = (one.width, one.height, one.num_frames)
    return Case(f"random:{one.model}", name, size, cap=float(name.removesuffix("gb")))


def group_offload(pipe: Any) -> None:
    devices = {"onload_device": torch.device("cuda"), "offload_device": torch.device("cpu")}
    pipe.transformer.enable_group_offload(
        **devices, offload_type="block_level", num_blocks_per_group=1, use_stream=True
    )


def group_offload_all(pipe: Any) -> None:
    """Text encoder and transformers, as diffusers' page on Wan does."""
    from diffusers.hooks import apply_group_offloading

    devices = {"onload_device": torch.device("cuda"), "offload_device": torch.device("cpu")}
    apply_group_offloading(pipe.text_encoder, **devices, offload_type="block_level", num_blocks_per_group=4)
    group_offload(pipe)


def float32_by_tf32(pipe: Any) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    pipe.to(torch.float32)


def lora(pipe: Any) -> None:
    pipe.load_lora_weights(load_file(made(LORA)))


def first_block_cache(pipe: Any) -> None:
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))


def by_torchao(config: str) -> Callable[[Any], None]:
    """What ``TorchAoConfig`` does to each linear layer as it loads."""

    def change(pipe: Any) -> None:
        from torchao import quantization as ao

        options: dict[str, Any] = {
            # The least value: see h200_forward.Bench.peer.
            "Float8DynamicActivationFloat8Weight": {"granularity": ao.PerRow(), "activation_value_lb": 1e-12},
            "Int4WeightOnly": {"int4_packing_format": "tile_packed_to_4d"},  # torch's own kernel; others need packages
        }.get(config, {})
        ao.quantize_(pipe.transformer.blocks, getattr(ao, f"{config}Config")(**options))

    return change


def nf4_weights(pipe: Any) -> None:
    """What ``BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")`` does to each linear layer."""
    import bitsandbytes as bnb

    for parent in list(pipe.transformer.blocks.modules()):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, torch.nn.Linear):
                layer = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, compute_dtype=linear.weight.dtype, quant_type="nf4"
                )
                device = linear.weight.device
                layer.weight = bnb.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                layer.bias = linear.bias
                setattr(parent, name, layer.to(device))


PEERS: dict[str, Callable[[Any], None]] = {
    "plain": lambda pipe: None,
    "enable_model_cpu_offload": lambda pipe: pipe.enable_model_cpu_offload(),
    "enable_group_offload, blocks, stream": group_offload,
    "vae.enable_tiling": lambda pipe: pipe.vae.enable_tiling(),
    "enable_layerwise_casting float8_e4m3fn": lambda pipe: pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16
    ),
    **{
        f"TorchAoConfig {config}": by_torchao(config)
        for config in (
            "Int4WeightOnly",
            "Int8WeightOnly",
            "Int8DynamicActivationInt8Weight",
            "Float8DynamicActivationFloat8Weight",
        )
    },
    "BitsAndBytesConfig nf4": nf4_weights,
    "FirstBlockCache 0.1": first_block_cache,
    "load_lora_weights": lora,
    "vae channels_last_3d": lambda pipe: channels_last(pipe.vae),
    "vae in float32": lambda pipe: pipe.vae.to(torch.float32),
    "float16": lambda pipe: pipe.to(torch.float16),
    "float32": lambda pipe: pipe.to(torch.float32),
    "compile_repeated_blocks": lambda pipe: pipe.transformer.compile_repeated_blocks(fullgraph=True),
    "float32, allow_tf32": float32_by_tf32,
    # Each in a process of its own, as the one above: diffusers keeps it for all later models.
    "set_attention_backend _native_flash": lambda pipe: pipe.transformer.set_attention_backend("_native_flash"),
    "set_attention_backend _native_cudnn": lambda pipe: pipe.transformer.set_attention_backend("_native_cudnn"),
}

CHANGES = PEERS | {"group offload of text encoder and transformer": group_offload_all}
"""The same, and what stands for recipes alone."""

RECIPE_PEERS = {
    "8gb": "enable_model_cpu_offload",
    "12gb": "group offload of text encoder and transformer",
    "16gb": "group offload of text encoder and transformer",
    "24gb": "group offload of text encoder and transformer",
    "48gb": "enable_model_cpu_offload",
    "141gb": "plain",
}
"""What diffusers has of each recipe's techniques, without a cap; 80gb's budget it has not."""


def recipe_peer(name: str) -> str:
    """The case of it; 8gb's, of the small model, is among the peers."""
    return f"diffusers {RECIPE_PEERS[name]}" if name == "8gb" else f"diffusers for {name}"


GROUPS: dict[str, dict[str, Case]] = {
    "alone": {"plain": Case(SMALL, ()), "auto": Case(SMALL, "auto")}
    | alone("offload:blocks", "offload:model", "offload:auto:budget=1.5", "quantize:int4", "quantize:fp8", "fused")
    | alone("attention:cudnn", "attention:flash4", "attention:sdpa", "vae:fast", "vae:tiling", "text-encoder:unload")
    | alone(
        "text-encoder:cpu",
        "text-encoder:blocks",
        "batched-cfg",
        "cfg-interval",
        "cfg-skip",
        "step-cache",
        "deepcache",
        "cuda-graphs",
    )
    | alone("sparse-attention:keep=0.25", "compile", "dtype:fp16", "attention:fp8", "progressive-resolution")
    | alone("quantize:int8", "quantize:int8:activations=dynamic", "quantize:fp8:activations=none")
    | alone("quantize:nf4:keep=1", "dtype:fp32", "vae:fp32", "channels-last", "attention-slicing")
    | alone("attention:flash2", "attention:sage", "prompt-cache:off", "vae:bf16")
    | {"alone tf32": Case(SMALL, ("dtype:fp32", "tf32"))}
    | {"alone lora": Case(SMALL, (f"lora:{LORA}",)), "alone vae:tiny": Case(SMALL, (f"vae:tiny={TINY}",))}
    | {"alone offload:experts": Case(EXPERTS, ("offload:experts",))},
    "together": {
        "near": Case(SMALL, "auto:near"),
        "fast": Case(SMALL, "auto:fast"),
        "int4 streamed": Case(SMALL, ("quantize:int4", "offload:blocks", *EXACT)),
        "fp8 streamed": Case(SMALL, ("quantize:fp8", "offload:blocks", *EXACT)),
        "tiled": Case(SMALL, ("vae:tiling", "text-encoder:unload", *EXACT)),
        "text by blocks": Case(SMALL, ("prompt-cache:off", "text-encoder:blocks", *EXACT)),
        "text on the cpu": Case(SMALL, ("prompt-cache:off", "text-encoder:cpu", *EXACT)),
        "auto picture": Case(SMALL, "auto", (832, 480, 1)),
        "picture": Case(SMALL, ("cuda-graphs", "batched-cfg", *EXACT), (832, 480, 1)),
        "1.3b in 6 GB": Case(SMALL, ("offload:blocks", "text-encoder:blocks", "fused", "attention:flash4"), cap=6),
    },
    "large": {
        "14b 480p resident": Case(LARGE, EXACT),
        "14b 480p streamed": Case(LARGE, ("offload:blocks", *EXACT)),
        "5b in 12 GB, plain decoder": Case(
            MIDDLE, ("offload:blocks", "text-encoder:blocks", *EXACT[:2]), (1280, 704, 121), cap=12
        ),
        "14b in 12 GB": Case(LARGE, ("offload:blocks", "text-encoder:blocks", *EXACT), cap=12),
        "14b 480p fp8": Case(LARGE, ("quantize:fp8", "text-encoder:unload", *EXACT)),
        "14b 480p int4": Case(LARGE, ("quantize:int4", "text-encoder:unload", *EXACT)),
    },
    "peers": {f"diffusers {name}": Case(SMALL, (), peer=change) for name, change in PEERS.items()},
    "recipe peers": {
        recipe_peer(name): replace(recipe(name), plan=(), cap=None, peer=CHANGES[theirs])
        for name, theirs in RECIPE_PEERS.items()
    },
    "recipes": {f"recipe {name}": recipe(name) for name in RECIPES},
}
CASES = {name: case for group in GROUPS.values() for name, case in group.items()}


class Watch:
    """Peaks by phase, read as a run passes from one to the next; torch counts on the host, so there is no sync.

    What is there while weights come and go between two phases counts for neither (``between``).
    """

    def __init__(self) -> None:
        self.allocated: dict[str, int] = {}
        self.reserved = 0

    def __call__(self, event: StepEvent) -> None:
        self.note(event.phase)

    def note(self, phase: str) -> None:
        self.allocated[phase] = max(self.allocated.get(phase, 0), torch.cuda.max_memory_allocated())
        self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def handed_over(engine: Any, watch: Watch) -> Iterator[None]:
    """While it runs, note the memory at each change of the component at work."""
    if not hasattr(engine, "parts"):  # diffusers
        yield
        return
    enter = engine.parts.enter

    def noted(component: str) -> None:
        enter(component)
        watch.note("between")

    engine.parts.enter = noted
    try:
        yield
    finally:
        engine.parts.enter = enter


def make(case: Case, specs: Sequence[str], loaded: Loaded) -> Any:
    if case.peer is None:
        return loaded.engine(case.model, specs)
    from swiftwan.bench.peers import DiffusersPeer

    loaded.engines.clear()
    peer = DiffusersPeer(case.model, pick_device("cuda"), "bf16", compile=False)
    case.peer(peer.pipe)
    return peer


def measure(case: Case, loaded: Loaded, watch: Watch, steps: int, once: bool, repeats: int = 1) -> dict[str, Any]:
    shutil.rmtree(cache_folder() / "prompts", ignore_errors=True)
    for file in (LORA, TINY):
        if any(spec.endswith(file) for spec in case.plan):
            made(file)
    width, height, frames = case.size
    request = sw.TextToVideo(PROMPT, width=width, height=height, num_frames=frames, num_inference_steps=steps, seed=1)
    told = sw.explain(case.model, request, plan=case.plan)
    specs = told.plan.specs
    row: dict[str, Any] = {"plan": list(specs), "switched": loaded.has(case.model, specs), "estimate": told.to_json()}
    if case.peer is not None:
        row, request = {"plan": [], "runner": "diffusers"}, told.request
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    engine = make(case, specs, loaded)
    torch.cuda.synchronize()
    row["load_seconds"] = round(time.perf_counter() - started, 2)
    watch.note("load")
    row["resident_bytes"] = torch.cuda.memory_allocated()
    steps_taken: list[float] = []
    runs: list[float] = []
    with handed_over(engine, watch):
        started = time.perf_counter()
        first = engine.run(request, on_step=watch)
        row["first_run_seconds"] = round(time.perf_counter() - started, 2)
        for result in [first] if once else (engine.run(request, on_step=watch) for _ in range(repeats)):
            # Of one run alone the first step is not counted: kernels compile in it.
            steps_taken += result.step_seconds[1:] if once else result.step_seconds
            runs.append(result.seconds["total"])
    assert result.frames.shape[0] == frames
    return row | {
        "first_stages": {k: round(v, 4) for k, v in first.seconds.items()},
        "status": "ok",
        "seconds": round(statistics.median(runs), 3),
        "spread": [round(min(runs), 3), round(max(runs), 3)],
        "repeats": repeats,
        "step_seconds": [round(s, 4) for s in steps_taken],
        "stages": {k: round(v, 4) for k, v in result.seconds.items()},
        "peak_bytes": max(v for k, v in watch.allocated.items() if k != "load"),
        "phase_peak_bytes": watch.allocated,
        "reserved_bytes": watch.reserved,
        "finite": bool(result.latents.isfinite().all()),
    }


def run(name: str, case: Case, loaded: Loaded, arguments: argparse.Namespace) -> dict[str, Any]:
    device = loaded.device
    if case.cap is not None:
        loaded.engines.clear()
        torch.cuda.set_per_process_memory_fraction(min(1.0, case.cap * 1e9 / device.total_bytes))
    watch = Watch()
    try:
        row = measure(case, loaded, watch, arguments.steps, arguments.once)
    except Exception as problem:
        traceback.print_exc()
        loaded.engines.clear()
        told = f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0][:400]}"
        row = {
            "status": "failed",
            "reason": told,
            "phase_peak_bytes": watch.allocated,
            "reserved_bytes": watch.reserved,
        }
    if case.cap is not None:
        loaded.engines.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    torch.cuda.empty_cache()
    return {
        "case": name,
        "model": case.model,
        "size": case.size,
        "steps": arguments.steps,
        "cap_gb": case.cap,
        **row,
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device": device.name,
        "versions": versions(device),
        "commit": arguments.commit,
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=[*GROUPS, *CASES])
    parser.add_argument("--out", type=Path, default=Path("h200_techniques.jsonl"))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--once", action="store_true", help="one run a case, for the largest models")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    parser.add_argument("--commit", default=commit or "see LOG.md")
    arguments = parser.parse_args()
    wanted: dict[str, Case] = {}
    for name in arguments.names:
        wanted |= GROUPS.get(name) or {name: CASES[name]}
    loaded = Loaded(pick_device("cuda"))
    # Plans that a switch leads to follow each other on one engine.
    for name, case in sorted(wanted.items(), key=lambda item: reloads(item[1])):
        started = time.perf_counter()
        row = run(name, case, loaded, arguments)
        row["wall_seconds"] = round(time.perf_counter() - started, 1)
        with arguments.out.open("a") as out:
            out.write(json.dumps(row) + "\n")
        print(f"{name:28} {told(row)}", flush=True)


def reloads(case: Case) -> list[str]:
    """What decides how the weights load; a plan by name is read as it comes."""
    return [case.model, *(s for s in case.plan if not isinstance(case.plan, str) and parse(s).switch == RELOAD)]


def told(row: dict[str, Any]) -> str:
    """Measured and, in brackets, estimated."""
    if row["status"] != "ok":
        return f"failed: {row['reason']}"
    step = statistics.median(row["step_seconds"])
    if "estimate" not in row:
        return f"{row['peak_bytes'] / 1e9:.2f} GB; step {step:.3f}, decode {row['stages']['decode']:.2f} s"
    guess = row["estimate"]
    phases = {phase["name"]: phase["weight_bytes"] + phase["activation_bytes"] for phase in guess["phases"]}
    parts = [f"{name} {row['phase_peak_bytes'][name] / 1e9:.2f} ({size / 1e9:.2f})" for name, size in phases.items()]
    seconds = f"step {step:.3f} ({guess['step_seconds']:.3f}), decode {row['stages']['decode']:.2f}"
    return f"{', '.join(parts)} GB; {seconds} ({guess['decode_seconds']:.2f}) s; wall {row['wall_seconds']:.0f} s"


if __name__ == "__main__":
    main()
