"""Whether a request can be met, told before it is queued: its plan, its values, and whether it fits the device.

The workers own the devices. This asks nothing of them: a CUDA context in the server's process would
take half a gigabyte of their memory, so the server reasons about the facts that they told.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from swiftwan.device import Device, parse_dtype
from swiftwan.errors import PlanError, RequestError
from swiftwan.pipelines.request import Request
from swiftwan.plan import Explanation, Facts, complete, describe, estimate, make_plan


class WillNotFitError(RequestError):
    """The device has too little memory for it, even when it does nothing else."""


@dataclass(frozen=True)
class Admission:
    """What one model can be asked on one device.

    Attributes:
        model, plan, dtype: as the server was started with.
        device: of the first worker; the others are taken to be alike.
    """

    model: str
    plan: str | Sequence[str]
    device: Device
    dtype: str | None = None

    @cached_property
    def facts(self) -> Facts:
        return describe(self.model)

    def explain(self, request: Request, plan: str | Sequence[str] | None = None) -> Explanation:
        """Complete and check a request, and say what it takes; as :func:`swiftwan.explain`, on the worker's device.

        Raises:
            RequestError, PlanError: as the run would.
        """
        chosen = make_plan(self.plan if plan is None else plan, self.device, self.dtype, self.facts, request)
        facts = chosen.adapt(self.facts)
        full = complete(request, facts)
        chosen.check(full)
        return Explanation(facts, full, chosen, self.device, estimate(full, facts, chosen, self.device.total_bytes))

    def check(self, request: Request, plan: str | Sequence[str] | None = None) -> Explanation:
        """As :meth:`explain`, and refuse what cannot fit.

        Raises:
            WillNotFitError: says which settings would.
        """
        explanation = self.explain(request, plan)
        if explanation.load.peak_bytes > self.device.total_bytes:
            raise WillNotFitError(self._advice(explanation))
        return explanation

    def _advice(self, explanation: Explanation) -> str:
        request, load = explanation.request, explanation.load
        told = (
            f"will not fit: {request.width}x{request.height}, {request.num_frames} frames take about "
            f"{_gb(load.peak_bytes)} GB, and {self.device.name} has {_gb(self.device.total_bytes)} GB"
        )
        if load.weight_bytes > self.device.total_bytes:
            weights = _gb(load.weight_bytes)
            return f"{told}; the weights alone are {weights} GB: try a smaller model, or serve it by --plan auto."
        if frames := self._frames_that_fit(explanation):
            return f"{told}; try {frames} frames, or a smaller size."
        if size := self._size_that_fits(explanation):
            return f"{told}; try {size[0]}x{size[1]} and one frame."
        return f"{told}; try a smaller model."

    def _fits(self, request: Request, explanation: Explanation) -> bool:
        total = self.device.total_bytes
        return estimate(request, explanation.facts, explanation.plan, total).peak_bytes <= total

    def _frames_that_fit(self, explanation: Explanation) -> int | None:
        """The most frames of this size that fit, by bisection: memory rises with them."""
        step = self.facts.grid.temporal
        low, high = -1, ((explanation.request.num_frames or 1) - 1) // step
        while high - low > 1:
            middle = (low + high) // 2
            if self._fits(replace(explanation.request, num_frames=middle * step + 1), explanation):
                low = middle
            else:
                high = middle
        return low * step + 1 if low >= 0 else None

    def _size_that_fits(self, explanation: Explanation) -> tuple[int, int] | None:
        grid, request = self.facts.grid.spatial, explanation.request
        assert request.width is not None
        assert request.height is not None
        for halvings in range(1, 1 + math.ceil(math.log2(max(request.width, request.height)))):
            width, height = (max(grid, (side >> halvings) // grid * grid) for side in (request.width, request.height))
            if self._fits(replace(request, width=width, height=height, num_frames=1), explanation):
                return width, height
        return None


FILE_FIELDS = ("image", "last_image", "images", "video")
"""Fields of requests that hold files."""


def stand_in(request: Request, sizes: Sequence[tuple[int, int]]) -> Request:
    """The same request with blank pictures of the files' sizes for the files: the server checks what is asked without
    decoding what a client sent, which is the worker's part.

    Args:
        sizes: width and height of each file, in order; () takes the request's own for all.
    """
    from PIL import Image

    files = {name: value for name in FILE_FIELDS if (value := getattr(request, name, None)) is not None}
    if not files:
        return request
    shrink = max([1, *(side // 1024 for size in sizes for side in size)])  # only the aspect counts
    blanks = [Image.new("RGB", (max(1, width // shrink), max(1, height // shrink))) for width, height in sizes]
    while len(blanks) < len(request.sources() or (1,)):
        blanks.append(Image.new("RGB", (request.width or 64, request.height or 64)))
    following = iter(blanks)
    placed: dict[str, Any] = {}
    for name, value in files.items():
        if name == "video":
            placed[name] = [next(following)] * (request.num_frames or 1)
        else:
            placed[name] = tuple(next(following) for _ in value) if name == "images" else next(following)
    return replace(request, **placed)


def device_from_facts(facts: Mapping[str, Any]) -> Device:
    """Rebuild what a worker told of its device."""
    capability = tuple(facts["capability"]) if facts["capability"] else None
    return Device(**dict(facts) | {"dtype": parse_dtype(facts["dtype"]), "capability": capability})


def check_plan_of_client(plan: object) -> str | list[str]:
    """Return the plan that a client sent, if it names no file: a client must not choose what the server reads.

    Raises:
        PlanError: it is no recipe's name or list of specs, or one holds a path or a hub id.
    """
    specs = [plan] if isinstance(plan, str) else plan
    if not isinstance(specs, list) or not all(isinstance(spec, str) for spec in specs):
        raise PlanError("plan is neither a recipe's name nor a list of techniques.")
    for spec in specs:
        if any(part in spec for part in ("/", "\\", "~", "..", ".safetensors")):
            raise PlanError(f"plan names a file in '{spec[:80]}'; files are chosen by whoever runs the server.")
    return plan if isinstance(plan, str) else specs


def _gb(count: int) -> str:
    return f"{count / 1e9:.3g}"
