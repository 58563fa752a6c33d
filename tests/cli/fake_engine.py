"""Stands in for the engine and the plan: the real words, no model. Subprocesses load it as sitecustomize."""

import os
import sys
import time
import types
from dataclasses import dataclass

from swiftwan.errors import RequestError, did_you_mean
from swiftwan.models.config import KNOWN_MODELS, POCKET_DEFAULTS
from swiftwan.pipelines.request import Grid

CALLS = []


def work(phase):
    """Take no time, but for one phase that a test wants to interrupt."""
    if os.environ.get("FAKE_STUCK_IN") == phase:
        sys.stderr.write(f"stuck in {phase}\n")
        sys.stderr.flush()
        time.sleep(60)


@dataclass
class Explanation:
    model: str
    request: object
    plan: object
    asked: object

    device = types.SimpleNamespace(name="an abacus", total_bytes=10**9)
    facts = types.SimpleNamespace(grid=Grid(spatial=16, temporal=4))

    @property
    def load(self):
        return self.load_of(self.request)

    def load_of(self, request):
        return types.SimpleNamespace(peak_bytes=10**6 * request.num_frames, weight_bytes=0)

    def lines(self):
        return [f"{self.model} runs {type(self.request).__name__}", f"plan: {self.plan}"]

    def to_json(self):
        return {"model": self.model, "request": self.asked.to_json(), "plan": self.plan}


def explain(model, request, *, plan, device, dtype):
    if model != "pocket" and model not in KNOWN_MODELS:
        raise RequestError(f"model is '{model}'." + did_you_mean(model, ["pocket", *KNOWN_MODELS]))
    schedulers = ("unipc", "euler", "heun", "dpm++", "lcm")
    if request.scheduler not in (None, *schedulers):
        hint = did_you_mean(request.scheduler, schedulers)
        raise RequestError(f"scheduler is '{request.scheduler}'." + hint)
    CALLS.append(("explain", model, request, plan, device, dtype))
    defaults = KNOWN_MODELS[model].defaults if model in KNOWN_MODELS else POCKET_DEFAULTS
    return Explanation(model, request.completed(defaults), plan, request)


class Engine:
    def __init__(self, model, plan, device, dtype):
        self.model_name, self.plan, self.device, self.dtype = model, plan, device, dtype

    @classmethod
    def load(cls, model, *, plan="auto", device=None, dtype=None, request=None):
        sys.stdout.write("a library prints while loading\n")
        CALLS.append(("load", model, plan, device, dtype))
        if os.environ.get("FAKE_FAILURE"):
            raise TypeError("two\nlines")
        work("load")
        return cls(model, plan, device, dtype)

    def run(self, request, on_step=None, out=None, quality=8):
        import torch

        from swiftwan.pipelines.result import Result, StepEvent

        request = request.completed(POCKET_DEFAULTS)
        began = time.perf_counter()
        for phase, steps in (("text", 1), ("denoise", request.num_inference_steps), ("decode", 3)):
            for step in range(1, steps + 1):
                work(phase)
                on_step(StepEvent(phase, step, steps, time.perf_counter() - began))
        shape = request.num_frames, request.height, request.width, 3
        generator = torch.Generator().manual_seed(request.seed)
        result = Result(
            frames=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
            latents=torch.zeros(1, 16, 9, 16, 16),
            seconds={"text": 0.1, "denoise": 1.0, "decode": 0.2, "total": 1.3},
            step_seconds=(0.05,) * request.num_inference_steps,
            peak_bytes=123456789,
            request=request,
            plan=() if self.plan == "auto" else tuple(self.plan),
            model=self.model_name,
            device=self.device or "cpu",
            dtype=self.dtype or "float32",
            versions={"swiftwan": "0.1.0"},
        )
        result.save(out, quality=quality)
        return result


for name, members in {"swiftwan.engine": {"Engine": Engine}, "swiftwan.plan": {"explain": explain}}.items():
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(members)
