"""A benchmark without a model: what a cell measures is made from its name, so every report is known before."""

import pytest

from swiftwan.bench.machine import Machine
from swiftwan.bench.matrix import BenchPlan, Matrix

MACHINE = Machine("Abacus", {"swiftwan": "0.1.0", "torch": "2.13.0"}, "c0de", "1234567")
SECONDS = {"peer": 10.0, "plain": 5.0, "fast": 2.5}


@pytest.fixture
def machine():
    return MACHINE


@pytest.fixture
def matrix():
    return Matrix(
        name="toy",
        title="Toy <b>matrix</b>",
        models=("pocket",),
        requests={
            "a": {"task": "TextToVideo", "prompt": "x | <script>alert(1)</script>", "seed": 1, "num_inference_steps": 3}
        },
        plans=(
            BenchPlan("peer", peer="diffusers", dtype="fp32"),
            BenchPlan("plain"),
            BenchPlan("fast", ("quantize:int8",)),
            BenchPlan("broken", ("nothing",)),
        ),
        baseline="peer",
        warm_up_steps=1,
        metrics=("psnr",),
    )


@pytest.fixture
def measured():
    """A cell's process, without the process; its rounds differ by a tenth."""

    def measure(job, timeout_seconds):
        name = job.cell.plan.name
        if name == "broken":
            return {"status": "refused", "reason": "unknown technique 'nothing'."}
        seconds = SECONDS[name] * (1 + job.round / 10)
        phases = {"text": 0.1 * seconds, "denoise": 0.8 * seconds, "decode": 0.1 * seconds}
        row = {
            "status": "ok",
            "reason": None,
            "plan": list(job.cell.plan.with_),
            "kinds": ["near"] if name == "fast" else [],
            "request": dict(job.cell.request),
            "dtype": "float32",
            "load_seconds": 3.0,
            "warm_up_seconds": 1.0,
            "runs": [
                {
                    "clip_latency_seconds": seconds,
                    "frame_latency_seconds": seconds / 10,
                    "throughput_frames_per_second": 10 / seconds,
                    "phase_seconds": phases,
                    "step_seconds": [0.4 * seconds, 0.4 * seconds],
                    "step_median_seconds": 0.4 * seconds,
                    "denoise_tflop_per_second": 8 / phases["denoise"],
                }
            ],
            "peak_bytes": 2**30 if name == "peer" else 2**29,
            "tflop": 8.0,
            "ceiling_tflop_per_second": 10.0,
            "hardware": {
                "devices": [],
                "memory_over_time": [[[0.0, 2**28], [seconds, 2**29]]],
                "phases": [[0.1 * seconds, "text"], [seconds, "decode"]],
                "cost_percent": 0.2,
            },
        }
        if job.round == 0:
            if job.cell.is_baseline:
                job.reference.touch()
            value = {"missing": "it is the baseline"} if name == "peer" else 40.0 - SECONDS[name]
            row |= {"encode_seconds": 0.1, "video": None, "error": value, "quality": {"psnr_db": value}}
        return row

    return measure
