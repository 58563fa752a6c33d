"""A video in few steps on one H200, from prompt to mp4: 1.3B, 832x480, 81 frames, a step-distilled LoRA.

    python benchmarks/h200_few_step.py [--repeats 3] [--peer-steps 50] [--out benchmarks/h200_few_step.jsonl]

Weights and LoRA are random, of true size: this times, and says nothing of how good a video is. The schedule is that of
the LightX2V distillation (4 steps of lcm, shift 5, no guidance). Each plan makes a video first that does not count.
Timed: text (no prompt cache), denoising, decoding, and writing the mp4; ``mp4`` in ``seconds_by_stage`` is what that
takes longer than the frames. Random weights make noise, the longest work there is for an mp4's encoder. ``error`` is
the distance of the last latents to those of the exact plan, ``few-step``. The peer is diffusers' pipeline, eager
in bf16, with 50 guided steps of UniPC, as the model was published; its four unguided steps are a row too, since a
few-step LoRA runs there as well. Rows are written as they come.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from h200_forward import Case
from h200_rungs import floor_seconds

import swiftwan as sw
from swiftwan import media
from swiftwan.bench.peers import DiffusersPeer
from swiftwan.device import pick_device, versions
from swiftwan.measure.quality import relative_distance
from swiftwan.plan import complete, describe

PROMPT = "A ginger cat walks along a stone wall in the evening sun, the camera follows it slowly"
COMMON = ("fused", "vae:fast")
RUNGS: dict[str, tuple[str, tuple[str, ...]]] = {  # name in the rows: rung of its forwards, plan
    "few-step": ("exact", ("attention:flash4",)),
    "few-step, near": ("near", ("quantize:fp8", "attention:fp8")),
    "few-step, near, sparse12": ("sparse12", ("quantize:fp8", "sparse-attention:keep=0.125,bits=8")),
    "few-step, near, sparse12, graphs": (
        "sparse12",
        ("quantize:fp8", "sparse-attention:keep=0.125,bits=8", "cuda-graphs"),
    ),
    "few-step, near, sparse25": ("sparse25", ("quantize:fp8", "sparse-attention:keep=0.25,bits=8")),
    "few-step, sparse25": ("sparse25", ("sparse-attention:keep=0.25",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="random:wan2.1-t2v-1.3b")
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rungs", nargs="*", default=list(RUNGS), choices=list(RUNGS))
    parser.add_argument("--peer-steps", type=int, default=50, help="0: no peer")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="")
    options = parser.parse_args()
    device = pick_device(options.device)
    size = {"width": options.width, "height": options.height, "num_frames": options.frames}
    with tempfile.TemporaryDirectory() as folder:
        lora = Path(folder) / "lightx2v_random.safetensors"
        script = Path(__file__).with_name("random_lora.py")
        subprocess.run([sys.executable, script, options.model.removeprefix("random:"), lora], check=True)
        latents: dict[str, torch.Tensor] = {}
        rows: list[dict[str, Any]] = []
        for rung in options.rungs:
            forwards, techniques = RUNGS[rung]
            plan = [f"few-step:{lora}", *COMMON, *techniques]
            started = time.perf_counter()
            try:
                engine = sw.Engine.load(options.model, plan=plan, device=options.device)
                engine.parts.text.cache = None
                print(f"{rung}: loaded after {time.perf_counter() - started:.1f} s", flush=True)
                request = complete(sw.TextToVideo(PROMPT, seed=7, **size), engine.facts)
                row, latents[rung] = timed(engine, request, options.repeats, folder)
                row["ceiling_fraction"] = floor(options, forwards) / row["seconds_by_stage"]["denoise"]
            except Exception as problem:
                row = {"status": "failed", "reason": f"{type(problem).__name__}: {str(problem)[:300]}"}
            engine = None
            plan[0] = "few-step:LORA"
            rows.append({"rung": rung, "plan": plan} | row | about(options, device))
            for told in rows:
                if told["rung"] in latents and "few-step" in latents:
                    told["error"] = relative_distance(latents[told["rung"]], latents["few-step"])
            write(rows, options.out)
            gc.collect()
            torch.cuda.empty_cache()
        if not options.peer_steps:
            return
        peer = DiffusersPeer(options.model, device, "bf16" if device.capability else "fp32", compile=False)
        plain = complete(sw.TextToVideo(PROMPT, seed=7, **size), describe(options.model))
        few = replace(plain, num_inference_steps=4, guidance_scale=1.0, scheduler="lcm", flow_shift=5.0)
        peer.run(replace(plain, num_inference_steps=1))
        for name, request in (
            ("4 steps", few),
            (f"{options.peer_steps} steps", replace(plain, num_inference_steps=options.peer_steps)),
        ):
            row, _ = timed(peer, request, 1, folder, warm=False)
            runner = {"runner": f"diffusers eager, bf16, {name}"}
            rows.append({"rung": f"peer, {name}", "plan": [], **runner} | row | about(options, device))
            write(rows, options.out)
    whole = rows[-1]
    for row in rows[:-1]:
        if "seconds" in row:
            row |= {"peer": whole["runner"], "peer_seconds": whole["seconds"]}
            row["ratio"] = round(whole["seconds"] / row["seconds"], 2)
    write(rows, options.out)


def write(rows: list[dict[str, Any]], out: Path | None) -> None:
    """All rows as they stand now: a run cut short leaves what it has."""
    print(json.dumps(rows[-1]), flush=True)
    if out:
        out.write_text("".join(json.dumps(row) + "\n" for row in rows))


def timed(
    model: Any, request: Any, repeats: int, folder: str, warm: bool = True
) -> tuple[dict[str, Any], torch.Tensor]:
    """Seconds of whole runs, their median first, and the last latents."""
    if warm:
        model.run(replace(request, prompt="warm-up"))
    taken, stages = [], []
    for number in range(repeats):
        path = Path(folder) / f"{number}.mp4"
        started = time.perf_counter()
        if isinstance(model, sw.Engine):  # encodes while it decodes
            result = model.run(request, out=path)
        else:
            result = model.run(request)
            media.write(path, result.frames, fps=request.fps or 16, record={})
        taken.append(time.perf_counter() - started)
        stages.append(result.seconds | {"mp4": taken[-1] - result.seconds["total"]})
        path.unlink()
    row = {
        "seconds": round(statistics.median(taken), 3),
        "spread": round(max(taken) - min(taken), 3),
        "repeats": repeats,
        "seconds_by_stage": {name: round(statistics.median(s[name] for s in stages), 3) for name in stages[0]},
        "peak_bytes": result.peak_bytes,
    }
    return row, result.latents


def floor(options: Any, rung: str) -> float:
    """Seconds of the four forwards if every product and all self-attention ran at the rung's measured rates."""
    case = Case(options.model.removeprefix("random:"), options.width, options.height, options.frames)
    return 4 * floor_seconds(case, rung)


def about(options: Any, device: Any) -> dict[str, Any]:
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "case": f"video-1.3b-{options.width}x{options.height}x{options.frames}",
        "device": device.name,
        "dtype": "bf16",
        "versions": versions(device),
        "commit": options.commit or asked.stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "weights": "random",
    }


if __name__ == "__main__":
    main()
