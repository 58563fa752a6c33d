"""A plan for a model on a machine, and what a run by it will take: checked and told before anything loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swiftwan import inputs
from swiftwan.ceilings import ceilings_of
from swiftwan.composition import Plan, compose, parse
from swiftwan.device import Device, host_memory, pick_device
from swiftwan.estimate import Load, Phase, estimate
from swiftwan.facts import Facts, complete, describe
from swiftwan.pipelines.request import Request
from swiftwan.recipes import check_no_name, specs_of

__all__ = ["Explanation", "Facts", "Load", "Plan", "complete", "describe", "estimate", "explain", "make_plan", "parse"]


def make_plan(
    plan: str | Sequence[str],
    device: Device,
    dtype: str | None = None,
    facts: Facts | None = None,
    request: Request | None = None,
) -> Plan:
    """Check a plan, and put it in order.

    Args:
        plan: a recipe's name, or specs; an empty list is the plain run.
        device: where it will run.
        dtype: stands above the plan's.
        facts: of the model that it is for, where that is known.
        request: what ``auto`` shall fit; None takes the model's official size.

    Raises:
        PlanError: every problem at once.
    """
    if isinstance(plan, str):
        plan = specs_of(plan, device, dtype, facts, request)
    else:
        check_no_name(plan)
    return compose(plan, device, dtype, facts.known if facts else None)


@dataclass(frozen=True)
class Explanation:
    """What would run; see :func:`explain`."""

    facts: Facts
    request: Request
    plan: Plan
    device: Device
    load: Load
    given: tuple[inputs.Input, ...] = ()

    @property
    def fits(self) -> bool:
        return self.load.peak_bytes <= self.device.free_bytes

    def load_of(self, request: Request) -> Load:
        """What another completed request would take here, without its times."""
        return estimate(request, self.facts, self.plan, self.device.total_bytes)

    def lines(self) -> list[str]:
        request, load, dtype = self.request, self.load, str(self.plan.settings.dtype).removeprefix("torch.")
        scale = f"{request.guidance_scale:g}"
        if request.guidance_scale_2 is not None:
            scale += f" then {request.guidance_scale_2:g} below {self.facts.known.boundary_ratio:g} of the noise"
        why = self.device.dtype_reason if self.plan.settings.dtype == self.device.dtype else "asked for"
        lines = [
            f"model      {self.facts.name}",
            f"device     {self.device.name} ({self.device.torch_device})",
            f"dtype      {dtype}: {why}",
            f"task       {type(request).__name__}",
            *(f"input      {given}" for given in self.given),
            f"size       {request.width}x{request.height}"
            + (f", {request.num_frames} frames at {request.fps} fps" if request.num_frames != 1 else ""),
            f"sampling   {request.scheduler}, {_steps(request)}, guidance {scale}, shift {request.flow_shift:g}"
            + self._asked_above_the_plan(),
            f"work       {load.forwards} forwards of {load.tokens} tokens, {_count(load.tflop_per_forward)} TFLOP each",
            *_times(load),
            f"memory     peak {_gb(load.peak_bytes)} GB in {load.fullest.name}; {_gb(self.device.free_bytes)} GB free: "
            f"{'fits' if self.fits else 'does not fit'}",
            *(
                f"  {phase.name:8} {_gb(phase.weight_bytes):>6} GB of weights + about {_gb(phase.activation_bytes)} GB"
                + self._beside(phase)
                for phase in load.phases
            ),
            *self._host(),
        ]
        for number, technique in enumerate(self.plan.techniques, 1):
            lines.append(f"{number}. {technique.spec} ({technique.kind}): {technique.reason}")
            lines += [f"   {line}" for line in technique.fit(self.facts.known)]
            lines.append(f"   a switch costs: {technique.switch}")
        return lines if self.plan.techniques else [*lines, "plan       plain: no techniques"]

    def _shares_memory(self) -> bool:
        """Whether the device computes in host memory: a CPU, an Apple GPU."""
        return self.device.capability is None

    def _beside(self, phase: Phase) -> str:
        """A phase's host memory, where that is another."""
        return "" if self._shares_memory() else f"; {_gb(phase.host_bytes)} GB of host memory"

    def _host(self) -> list[str]:
        """What there is of it."""
        if self._shares_memory():
            return []
        need, free = self.load.host_bytes, host_memory()[1]
        return [f"host       peak {_gb(need)} GB; {_gb(free)} GB free: {'fits' if need <= free else 'does not fit'}"]

    def _asked_above_the_plan(self) -> str:
        """Which of a few-step model's own settings the request changes."""
        if self.plan.settings.few_step is None:
            return ""
        words = {
            "scheduler": "scheduler",
            "num_inference_steps": "steps",
            "guidance_scale": "guidance",
            "flow_shift": "shift",
        }
        own = self.facts.known.defaults
        asked = [word for key, word in words.items() if getattr(self.request, key) != getattr(own, key)]
        return f" ({' and '.join(asked)} as asked for, against the few-step model's own)" if asked else ""

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.facts.name,
            "device": self.device.name,
            "dtype": str(self.plan.settings.dtype).removeprefix("torch."),
            "request": self.request.to_json(),
            "inputs": [vars(given) for given in self.given],
            "plan": [
                {
                    "spec": t.spec,
                    "kind": t.kind,
                    "reason": t.reason,
                    "slot": t.slot.name.lower(),
                    "told": t.fit(self.facts.known),
                    "switch": t.switch,
                }
                for t in self.plan.techniques
            ],
            "tokens": self.load.tokens,
            "forwards": self.load.forwards,
            "tflop_per_forward": self.load.tflop_per_forward,
            "weight_bytes": self.load.weight_bytes,
            "activation_bytes": self.load.activation_bytes,
            "free_bytes": self.device.free_bytes,
            "peak_bytes": self.load.peak_bytes,
            "host_bytes": self.load.host_bytes,
            "phases": [vars(phase) for phase in self.load.phases],
            "step_seconds": self.load.step_seconds,
            "denoise_seconds": self.load.denoise_seconds,
            "decode_seconds": self.load.decode_seconds,
            "at_most": self.load.at_most,
            "fits": self.fits,
        }


def _steps(request: Request) -> str:
    steps, all_steps = request.steps_to_run, request.num_inference_steps
    return f"{steps} steps" if steps == all_steps else f"the last {steps} of {all_steps} steps"


def _times(load: Load) -> list[str]:
    if load.step_seconds is None or load.denoise_seconds is None or load.decode_seconds is None:
        return []
    most = "at most " if load.at_most else "about "
    total = load.denoise_seconds + load.decode_seconds
    return [
        f"time       {most}{_time(load.step_seconds)} a step, {_time(load.denoise_seconds)} of denoising and "
        f"{_time(load.decode_seconds)} of decoding: {_time(total)}"
    ]


def _time(seconds: float) -> str:
    """Three digits, in the largest unit of which there are ten or more."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 10 * size:
            return f"{_count(seconds / size)} {unit}"
    return f"{seconds:.3g} s"


def _count(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number:.3g}" if number < 1000 else f"{number:,.0f}"


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f}"


def explain(
    model: str,
    request: Request,
    *,
    plan: str | Sequence[str] = "auto",
    device: str | None = None,
    dtype: str | None = None,
) -> Explanation:
    """Say what a run would do and take; no weights are read. (A hub id unknown to swiftwan is fetched first,
    since its sizes are in its files.)

    Raises:
        RequestError, PlanError, UnavailableError, WeightsError: as the run itself would.
    """
    where = pick_device(device)
    facts = describe(model)
    chosen = make_plan(plan, where, dtype, facts, request)
    facts = chosen.adapt(facts)
    full = complete(request, facts)
    chosen.check(full)
    given = inputs.read(full)
    load = estimate(full, facts, chosen, where.total_bytes, ceilings_of(where))
    return Explanation(facts, full, chosen, where, load, given.inputs if given else ())
