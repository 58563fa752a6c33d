"""Noise schedules and solvers for flow prediction with the model's shift: UniPC is ours, the others are diffusers'."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from swiftwan.errors import RequestError, did_you_mean
from swiftwan.models.config import Defaults
from swiftwan.unipc import UniPC

SCHEDULERS = ("unipc", "euler", "heun", "dpm++", "lcm")

TAKES_LEVELS = ("euler", "lcm")
"""Schedulers that a few-step model's own noise levels can be given to."""

REFUSED = {
    "ddim": "it integrates noise (epsilon) or v predictions on a beta schedule",
    "ddpm": "it integrates noise (epsilon) or v predictions on a beta schedule",
    "lms": "it extrapolates noise (epsilon) predictions",
    "pndm": "it extrapolates noise (epsilon) predictions",
    "eulerancestral": "its noise re-injection assumes a variance-exploding process",
    "eulera": "its noise re-injection assumes a variance-exploding process",
}
"""Schedulers that people ask for and that would give noise with a flow model, with the reason."""


def check_scheduler(name: str) -> None:
    """Raise RequestError for a scheduler that is unknown, or that cannot follow a flow prediction."""
    if name in SCHEDULERS:
        return
    plain = re.sub(r"[^a-z]", "", name.lower()).removesuffix("scheduler").removesuffix("discrete")
    if plain in REFUSED:
        raise RequestError(
            f"scheduler '{name}' cannot run Wan: the model predicts flow (noise minus data), and {REFUSED[plain]}. "
            f"Use one of: {', '.join(SCHEDULERS)}."
        )
    raise RequestError(f"unknown scheduler '{name}'." + did_you_mean(name, SCHEDULERS))


def warped(level: float, shift: float) -> float:
    """A noise level of an even schedule, moved towards noise by the flow shift."""
    return shift * level / (1 + (shift - 1) * level)


@dataclass(frozen=True)
class FewStep:
    """How a step-distilled model is sampled: without guidance, and at the noise levels that it was trained at.

    Attributes:
        steps: how many, where the request does not say.
        scheduler: ``euler`` goes straight on; ``lcm`` jumps to the data and adds fresh noise.
        flow_shift: warps the even levels 1, 1 - 1 / steps, ...
        levels: falling levels in (0, 1] that stand for the even ones; fewer steps take the first of them.
    """

    steps: int
    scheduler: str
    flow_shift: float
    levels: tuple[float, ...] = ()

    def over(self, defaults: Defaults) -> Defaults:
        """A model's defaults, with what the distillation fixes in their place."""
        return replace(
            defaults,
            num_inference_steps=self.steps,
            scheduler=self.scheduler,
            flow_shift=self.flow_shift,
            guidance_scale=1.0,
            guidance_scale_2=None if defaults.guidance_scale_2 is None else 1.0,
        )

    def levels_for(self, steps: int, flow_shift: float) -> tuple[float, ...]:
        """Where a request of so many steps evaluates the model; its own shift, or more steps than there are levels,
        asks for the even levels."""
        if steps <= len(self.levels) and flow_shift == self.flow_shift:
            return self.levels[:steps]
        return tuple(warped(1 - step / steps, flow_shift) for step in range(steps))


def make_scheduler(
    name: str,
    *,
    num_inference_steps: int,
    flow_shift: float,
    device: torch.device,
    levels: Sequence[float] | None = None,
) -> Any:
    """A scheduler, of diffusers or like them, with its timesteps set.

    Its sigmas run from 1 to 0 along ``shift * s / (1 + (shift - 1) * s)``. ``unipc`` (arXiv 2302.04867, order 2)
    is Wan's own choice; ``dpm++`` (arXiv 2211.01095) is of order 2 as well; ``euler`` and ``heun`` take one and two
    model calls a step; ``lcm`` (arXiv 2310.04378) jumps to the data and renoises, for few-step models.

    Args:
        levels: where ``euler`` and ``lcm`` evaluate the model instead: one falling noise level a step. (Their own last
            step begins at 0.001, which with four steps is a quarter of the work for nothing.)
    """
    check_scheduler(name)
    if name == "unipc":
        return UniPC(num_inference_steps, flow_shift, device)
    return diffusers_scheduler(
        name, num_inference_steps=num_inference_steps, flow_shift=flow_shift, device=device, levels=levels
    )


def diffusers_scheduler(
    name: str,
    *,
    num_inference_steps: int,
    flow_shift: float,
    device: torch.device,
    levels: Sequence[float] | None = None,
) -> Any:
    """As :func:`make_scheduler`, of diffusers in any case."""
    import diffusers  # a second, which Wan's own solver is spared

    flow: dict[str, Any] = {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": flow_shift,
    }
    fixed = list(levels) if levels and name in TAKES_LEVELS else None
    scheduler: Any
    match name:
        case "unipc":
            scheduler = diffusers.UniPCMultistepScheduler(**flow)
        case "dpm++":
            scheduler = diffusers.DPMSolverMultistepScheduler(**flow)
        case "euler":
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0 if fixed else flow_shift)
        case "heun":
            scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=flow_shift)
        case _:
            scheduler = diffusers.FlowMatchLCMScheduler(shift=1.0 if fixed else flow_shift)
    if fixed:
        scheduler.set_timesteps(sigmas=fixed, device=device)
    else:
        scheduler.set_timesteps(num_inference_steps, device=device)
    # Known from the start, the index needs no search by value, which syncs with the device at each step.
    scheduler.set_begin_index(0)
    return scheduler
