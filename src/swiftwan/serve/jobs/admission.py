"""Whether a request can be met, told before it is queued: its plan, its values, and whether it fits the device.

The workers own the devices. This asks nothing of them: a CUDA context in the server's process would
take half a gigabyte of their memory, so the server reasons about the facts that they told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from swiftwan.device import Device, parse_dtype
from swiftwan.errors import PlanError
from swiftwan.memory import refuse_what_cannot_fit
from swiftwan.pipelines.request import Request
from swiftwan.plan import Explanation, Facts, complete, describe, estimate, make_plan


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
        refuse_what_cannot_fit(explanation, slack=1)
        return explanation


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
