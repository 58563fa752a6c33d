"""Noise schedules and solvers: diffusers' own, set up for flow prediction with the model's shift."""

from __future__ import annotations

import re
from typing import Any

import torch

from swiftwan.errors import RequestError, did_you_mean

SCHEDULERS = ("unipc", "euler", "heun", "dpm++", "lcm")

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


def make_scheduler(name: str, *, num_inference_steps: int, flow_shift: float, device: torch.device) -> Any:
    """A diffusers scheduler with its timesteps set.

    Its sigmas run from 1 to 0 along ``shift * s / (1 + (shift - 1) * s)``. ``unipc`` (arXiv 2302.04867, order 2)
    is Wan's own choice; ``dpm++`` (arXiv 2211.01095) is of order 2 as well; ``euler`` and ``heun`` take one and two
    model calls a step; ``lcm`` (arXiv 2310.04378) jumps to the data and renoises, for few-step models.
    """
    import diffusers

    check_scheduler(name)
    flow: dict[str, Any] = {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": flow_shift,
    }
    scheduler: Any
    match name:
        case "unipc":
            scheduler = diffusers.UniPCMultistepScheduler(**flow)
        case "dpm++":
            scheduler = diffusers.DPMSolverMultistepScheduler(**flow)
        case "euler":
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=flow_shift)
        case "heun":
            scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=flow_shift)
        case _:
            scheduler = diffusers.FlowMatchLCMScheduler(shift=flow_shift)
    scheduler.set_timesteps(num_inference_steps, device=device)
    # Known from the start, the index needs no search by value, which syncs with the device at each step.
    scheduler.set_begin_index(0)
    return scheduler
