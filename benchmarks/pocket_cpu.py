"""`pocket-cpu`: the embedded model on this machine's CPU, process start to file, beside diffusers' pipeline.

    python benchmarks/pocket_cpu.py [--repeats 5] >> benchmarks/pocket_cpu.jsonl

Both run as fresh processes, turn about, with the same weights, prompt, seed, steps, solver and size, and write an
mp4. diffusers loads in float32 as we do (its default here) and exports through its own `export_to_video`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

PLAN = ["prompt-cache:off"]  # or the peer alone would read the prompt
PROMPT = "a red circle moves left over a blue background"
PEER = """
import sys, numpy, av, torch
from diffusers import UniPCMultistepScheduler, WanPipeline
pipe = WanPipeline.from_pretrained(sys.argv[1], dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
video = pipe(sys.argv[2], width=128, height=128, num_frames=33, num_inference_steps=20, guidance_scale=3.0,
             generator=torch.Generator("cpu").manual_seed(7)).frames[0]
with av.open(sys.argv[3], "w") as container:
    stream = container.add_stream("libx264", rate=16)
    stream.width = stream.height = 128
    stream.pix_fmt = "yuv420p"
    for frame in (video * 255).round().astype(numpy.uint8):
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
    container.mux(stream.encode(None))
"""


def timed(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    model = str(files("swiftwan.pocket") / "model")
    ours: list[float] = []
    peer: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "out.mp4")
        generate = [sys.executable, "-m", "swiftwan", "generate", PROMPT, "--with", *PLAN, "--seed", "7", "--out", out]
        for repeat in range(repeats + 1):  # the first pair warms the file cache and is not counted
            pair = (timed(generate), timed([sys.executable, "-W", "ignore", "-c", PEER, model, PROMPT, out]))
            if repeat:
                ours.append(pair[0])
                peer.append(pair[1])
    row = {
        "case": "pocket-cpu",
        "rung": "exact",
        "plan": PLAN,
        "shape": "128x128x33, 20 steps, guidance 3, unipc",
        "seconds": round(statistics.median(ours), 2),
        "spread": [round(min(ours), 2), round(max(ours), 2)],
        "repeats": repeats,
        "peer": "diffusers WanPipeline, float32, process start to mp4",
        "peer_seconds": round(statistics.median(peer), 2),
        "peer_spread": [round(min(peer), 2), round(max(peer), 2)],
        "ratio": round(statistics.median(b / a for a, b in zip(ours, peer, strict=True)), 2),
        "ceiling_fraction": None,
        "peak_bytes": None,
        "error": None,
        "dtype": "float32",
        "device": f"CPU, {platform.machine()}, 2 cores",
        "versions": {name: version(name) for name in ("swiftwan", "torch", "diffusers", "transformers")},
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
