"""Is a plan right on these weights, on this machine? The exact run and the plan's, same seed, beside each other.

Five questions: how far apart are the latents after each step, how far the frames, does every run come out the same,
does memory grow, and how much faster is it. The verdict's limits are by what the plan says of itself.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from swiftwan.bench.summary import rung_of
from swiftwan.device import pick_device
from swiftwan.engine import Engine
from swiftwan.measure.missing import Missing, to_json
from swiftwan.measure.quality import Material, psnr_db, relative_distance, score, ssim
from swiftwan.plan import complete, make_plan

if TYPE_CHECKING:
    from swiftwan.pipelines.request import Request
    from swiftwan.pipelines.result import Result, StepEvent

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """The least likeness to the exact run; None where the trajectory is meant to be another."""

    psnr_db: float | None
    ssim: float | None
    latent_error: float | None


LIMITS = {
    "exact": Limits(33, 0.98, 0.1),
    "near": Limits(23, 0.91, 0.6),
    "approximate": Limits(22.5, 0.88, 0.75),
    "retrained": Limits(None, None, None),
    "few-step": Limits(None, None, None),
}
EXACT_FP32 = Limits(50, 0.995, 0.01)
"""In float32 the same maths leaves only rounding; in 16 bits rounding grows over the steps.

They are drawn from the pocket model (benchmarks/pocket_verify.jsonl: bf16, 8 prompts, H200), whose judge tells which
clips still show their prompt's words. Approximate: between the worst clip of plans that kept all words (cfg-interval,
deepcache: 23.7 dB, SSIM 0.90, latents 0.67 off) and the one that lost some (sparse-attention: 21.6, 0.855, 0.86).
Near: just below the worst of int4, which kept all (24.0, 0.93, 0.52). Exact: well below batched-cfg (43.6, 0.996,
0.06), as one of 64 other clips came to 35 dB. Float32: batched-cfg came to 97 dB in 3 steps on a CPU. On other
weights all this is a judgement.
"""

REPEAT_LIMIT = 0.01
"""Largest distance between two runs of one seed: kernels that add in changing order stay far below it."""

GROWTH_LIMIT_BYTES = 64 * MIB
"""From the second run to the last; an allocator that settles takes less, a tensor kept from each run more."""


@dataclass(frozen=True)
class Check:
    """One question answered: ``limit`` says in words what was allowed."""

    name: str
    value: float | bool
    limit: str
    passed: bool


@dataclass(frozen=True)
class Verdict:
    """What a verification found.

    Attributes:
        rung: the loosest of the plan's techniques; it chose the limits.
        step_errors: (timestep, relative distance of the latents that have come down to it).
        quality: PSNR, SSIM, and LPIPS where its weights are here.
        exact_seconds, plan_seconds: of a clip; the plan's median.
        memory_bytes: in use after each of the plan's runs.
    """

    plan: tuple[str, ...]
    rung: str
    checks: tuple[Check, ...]
    step_errors: tuple[tuple[float, float], ...]
    quality: dict[str, float | Missing]
    exact_seconds: float
    plan_seconds: float
    memory_bytes: tuple[int, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        told = asdict(self) | {"passed": self.passed}
        return told | {"quality": {name: to_json(value) for name, value in self.quality.items()}}


def verify(
    plan: str | Sequence[str],
    model: str,
    request: Request,
    *,
    runs: int = 10,
    device: str | None = None,
    dtype: str | None = None,
    on_run: Callable[[str], None] | None = None,
) -> Verdict:
    """Compare a plan with the plain run, then run it again and again.

    Args:
        plan: a recipe's name or technique specs, as ``Engine.load`` takes them.
        runs: of the plan, all with the same seed.
        on_run: told what has just been done.

    Raises:
        PlanError, RequestError, WeightsError, MemoryLimitError: as the runs themselves would.
    """

    def tell(what: str) -> None:
        if on_run is not None:
            on_run(what)

    make_plan(plan, pick_device(device), dtype)  # what is wrong with it is told before minutes of the exact run
    engine = Engine.load(model, plan=[], device=device, dtype=dtype)
    request = replace(request, seed=complete(request, engine.facts).seed)  # one noise; each takes its own defaults
    exact, exact_steps = _recorded(engine, request)
    exact = engine.run(request)  # the first one warmed up
    tell(f"exact run: {exact.seconds['total']:.2f} s")
    del engine
    _free()

    engine = Engine.load(model, plan=plan, device=device, dtype=dtype)
    first, steps = _recorded(engine, request)
    seconds, memory, apart, finite = [], [_memory(engine)], 0.0, _is_whole(first)
    for number in range(2, runs + 1):
        result = engine.run(request)
        seconds.append(result.seconds["total"])
        memory.append(_memory(engine))
        apart = max(apart, relative_distance(result.latents, first.latents))
        finite = finite and _is_whole(result)
        tell(f"run {number} of {runs}: {seconds[-1]:.2f} s, {memory[-1] / MIB:.0f} MiB in use")
    kinds = [technique.kind for technique in engine.plan.techniques]
    rung = rung_of(engine.plan.specs, kinds)
    strict = rung == "exact" and engine.plan.settings.dtype == torch.float32
    limits = EXACT_FP32 if strict else LIMITS[rung]
    on = engine.torch_device
    quality = score(Material(first.frames, request.prompt, exact.frames, on), ("psnr", "ssim", "lpips"))
    checks = [
        *_likeness(limits, first, exact),
        Check("every value is finite and the frames are no flat colour", finite, "yes", finite),
        Check("largest distance between runs", apart, f"at most {REPEAT_LIMIT:g}", apart <= REPEAT_LIMIT),
        _growth(memory),
    ]
    common = [t for t in exact_steps if t in steps and exact_steps[t].shape == steps[t].shape]
    return Verdict(
        plan=engine.plan.specs,
        rung=rung,
        checks=tuple(checks),
        step_errors=tuple((t, relative_distance(steps[t], exact_steps[t])) for t in sorted(common, reverse=True)),
        quality=quality,
        exact_seconds=exact.seconds["total"],
        plan_seconds=median(seconds or [first.seconds["total"]]),
        memory_bytes=tuple(memory),
    )


def _likeness(limits: Limits, ours: Result, exact: Result) -> list[Check]:
    checks = []
    if limits.latent_error is not None:
        error = relative_distance(ours.latents, exact.latents)
        told = f"at most {limits.latent_error:g}"
        checks.append(Check("latent error at the end", error, told, error <= limits.latent_error))
    for name, metric, limit in (("PSNR in dB", psnr_db, limits.psnr_db), ("SSIM", ssim, limits.ssim)):
        if limit is not None:
            value = metric(ours.frames, exact.frames)
            checks.append(Check(name, value, f"at least {limit:g}", value >= limit))
    return checks


def _growth(memory: Sequence[int]) -> Check:
    growth = max(0, memory[-1] - memory[1]) if len(memory) > 2 else 0
    limit = f"at most {GROWTH_LIMIT_BYTES / MIB:.0f} MiB from run 2 to {len(memory)}"
    return Check("memory growth in MiB", growth / MIB, limit, growth <= GROWTH_LIMIT_BYTES)


def _is_whole(result: Result) -> bool:
    return bool(torch.isfinite(result.latents).all()) and bool(result.frames.max() > result.frames.min())


def _recorded(engine: Engine, request: Request) -> tuple[Result, dict[float, Tensor]]:
    """Run, and keep what each step left (1, C, f, h, w) by its timestep; no time is taken of a run so looked at."""
    seen: dict[float, Tensor] = {}

    def keep(event: StepEvent) -> None:
        if event.latents is not None and event.timestep is not None:
            seen[event.timestep] = event.latents.to("cpu", torch.float32, copy=True)

    return engine.run(request, on_step=keep), seen


def _memory(engine: Engine) -> int:
    """Bytes in use now: of torch's allocator on a GPU, of the process elsewhere."""
    gc.collect()
    if engine.torch_device.type == "cuda":
        return int(torch.cuda.memory_allocated(engine.torch_device))
    import psutil

    return int(psutil.Process().memory_info().rss)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
