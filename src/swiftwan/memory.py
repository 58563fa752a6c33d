"""Whether a run fits its device, and what would: told alike by the engine, the command line and the server."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from swiftwan.errors import UnavailableError

if TYPE_CHECKING:
    from swiftwan.pipelines.request import Request
    from swiftwan.plan import Explanation

SLACK = 1.1
"""Estimated peaks are within 6 % of the measured ones (docs/plans.md), so a tenth is left to them."""


class WillNotFitError(UnavailableError):
    """The device has too little memory for it, even when it does nothing else."""


def refuse_what_cannot_fit(explanation: Explanation, *, slack: float = SLACK) -> None:
    """Raise now what a GPU would tell after minutes, and a CPU never: the system ends a process that takes too much.

    Args:
        slack: what a peak may be of all memory of the device.

    Raises:
        WillNotFitError: the peak is more; says which settings would fit.
    """
    request, load, device = explanation.request, explanation.load, explanation.device
    most = slack * device.total_bytes
    if load.peak_bytes <= most:
        return
    told = (
        f"will not fit: {request.width}x{request.height}, {request.num_frames} frames take about "
        f"{load.peak_bytes / 1e9:.1f} GB, and {device.name} has {device.total_bytes / 1e9:.1f} GB"
    )
    if load.weight_bytes > most:
        weights = f"the weights alone are {load.weight_bytes / 1e9:.1f} GB"
        raise WillNotFitError(f"{told}; {weights}: take a smaller model, or --plan auto.")
    fits = what_would_fit(explanation, lambda smaller: explanation.load_of(smaller).peak_bytes <= most)
    raise WillNotFitError(f"{told}; {fits}")


def what_would_fit(explanation: Explanation, fits: Callable[[Request], bool]) -> str:
    """The way out of too little memory, as the end of a sentence.

    Args:
        fits: whether a request would do; what holds of some frames must hold of fewer.
    """
    if frames := _most_frames(explanation, fits):
        return f"{frames} frames should fit, or a smaller size, or a plan that takes less."
    if smaller := _largest_size(explanation, fits):
        one = "" if smaller.num_frames == explanation.request.num_frames else " and one frame"
        return f"{smaller.width}x{smaller.height}{one} should fit, or a plan that takes less."
    return "free memory on the device, or take a smaller model or a plan that takes less."


def _most_frames(explanation: Explanation, fits: Callable[[Request], bool]) -> int | None:
    """The most frames, fewer than asked for, of this size that fit, by bisection."""
    step = explanation.facts.grid.temporal
    low, high = -1, ((explanation.request.num_frames or 1) - 1) // step
    while high - low > 1:
        middle = (low + high) // 2
        if fits(replace(explanation.request, num_frames=middle * step + 1)):
            low = middle
        else:
            high = middle
    return low * step + 1 if low >= 0 else None


def _largest_size(explanation: Explanation, fits: Callable[[Request], bool]) -> Request | None:
    """The sides halved until it fits, with all frames, or else with one."""
    grid, request = explanation.facts.grid.spatial, explanation.request
    assert request.width is not None
    assert request.height is not None
    for halvings in range(1, 1 + math.ceil(math.log2(max(request.width, request.height)))):
        width, height = (max(grid, (side >> halvings) // grid * grid) for side in (request.width, request.height))
        for num_frames in (request.num_frames, 1):
            smaller = replace(request, width=width, height=height, num_frames=num_frames)
            if fits(smaller):
                return smaller
    return None
