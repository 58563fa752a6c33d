"""Named plans: ``auto`` by what the machine has, and one for each usual size of GPU memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch

from swiftwan.ceilings import H200, Ceilings
from swiftwan.composition import Plan, compose
from swiftwan.device import Device, parse_dtype
from swiftwan.errors import PlanError, did_you_mean
from swiftwan.estimate import Load, estimate
from swiftwan.facts import Facts, complete
from swiftwan.ops.attention import kernel
from swiftwan.pipelines.request import Request, TextToVideo
from swiftwan.techniques import TECHNIQUES
from swiftwan.techniques.fused import Fused
from swiftwan.techniques.quantize import Quantize
from swiftwan.techniques.vae import FastVae

Quality = Literal["exact", "near", "fast"]
"""exact: the same maths; near: 8 or 4 bits too; fast: work may be skipped as well."""

SPARE = 0.06
"""Share of the memory that a plan leaves for what lies between tensors."""


@dataclass(frozen=True)
class Recipe:
    """A plan for a GPU of so many GB (10^9 bytes), for the largest model and size that it runs well."""

    model: str
    width: int
    height: int
    num_frames: int
    specs: tuple[str, ...]


RECIPES = {
    "8gb": Recipe("wan2.1-t2v-1.3b", 832, 480, 81, ("offload:model", "text-encoder:blocks")),
    "12gb": Recipe("wan2.2-ti2v-5b", 1280, 704, 121, ("offload:blocks", "text-encoder:blocks")),
    "16gb": Recipe("wan2.1-t2v-14b", 832, 480, 81, ("offload:auto:budget=7", "text-encoder:blocks")),
    "24gb": Recipe("wan2.1-t2v-14b", 1280, 720, 81, ("offload:auto:budget=6", "text-encoder:unload")),
    "48gb": Recipe("wan2.2-t2v-a14b", 1280, 720, 81, ("offload:model",)),
    "80gb": Recipe("wan2.2-t2v-a14b", 1280, 720, 81, ("offload:auto:budget=46", "text-encoder:unload")),
    "141gb": Recipe("wan2.2-t2v-a14b", 1280, 720, 81, ()),
}
"""Exact all; how each ran under a cap of its memory is in docs/plans.md, made of benchmarks/h200_techniques.jsonl."""

SKIPPING = ("step-cache", "cfg-skip")
WORTH = 0.9
"""Of the time, below which a plan is taken for it."""
EXACT_ATTENTION = ("flash4", "cudnn")
"""From the fastest on."""

NAMES = ("auto", *(f"auto:{quality}" for quality in get_args(Quality)), "none", *RECIPES)


def check_name(name: str) -> None:
    """Raise PlanError if there is no plan of that name."""
    if name in NAMES:
        return
    first, _, rest = name.partition(":")
    if first == "auto":
        raise PlanError(f"unknown quality '{rest}'." + did_you_mean(rest, get_args(Quality)))
    if first in TECHNIQUES:
        raise PlanError(f"'{name}' is a technique, not a plan's name; give it in a list (--with {name}).")
    raise PlanError(f"unknown plan '{name}'." + did_you_mean(name, NAMES))


def check_no_name(specs: Sequence[str]) -> None:
    """Raise PlanError if a plan's name is among techniques."""
    if name := next((spec for spec in specs if spec in NAMES), None):
        raise PlanError(
            f"'{name}' is a plan's name, which stands alone (--plan {name}); to add techniques, list those that "
            "'swiftwan explain' tells of it beside them."
        )


def specs_of(name: str, device: Device, dtype: str | None, facts: Facts | None, request: Request | None) -> list[str]:
    """The techniques of a named plan on this machine.

    Args:
        facts: of the model; None leaves memory out of account.
        request: what ``auto`` shall fit; None takes the model's official size.

    Raises:
        PlanError: there is no plan of that name.
    """
    check_name(name)
    if name == "none":
        return []
    number_format = parse_dtype(dtype) if dtype else device.dtype
    fast = _kernels(device, number_format, EXACT_ATTENTION)
    if name in RECIPES:
        return [*RECIPES[name].specs, *fast]
    wish = cast(Quality, name.partition(":")[2] or "exact")
    if facts is None or device.capability is None:
        return fast
    if wish != "exact" and facts.known.transformer.attention_head_dim in kernel("fp8").widths:
        fast = _kernels(device, number_format, ("fp8", *EXACT_ATTENTION))
    return _fitting(wish, fast, device, dtype, facts, request)


def _kernels(device: Device, dtype: torch.dtype, attention: Sequence[str]) -> list[str]:
    """The fastest kernels that this machine has, of self-attention the first of those named; what is measured is in
    benchmarks/h200_forward.jsonl and h200_rungs.jsonl.

    """
    specs = [] if Fused().missing_on(device) else ["fused"]
    # cuDNN's attention is the faster one from Hopper on; before that torch's own choice, FlashAttention-2, is.
    if dtype is not torch.float32 and device.capability is not None and device.capability >= (9, 0):
        names = (name for name in attention if not kernel(name).missing_on(device.capability))
        specs += [f"attention:{name}" for name in list(names)[:1]]
    if not FastVae("fast").missing_on(device):
        specs.append("vae:fast")
    return specs


def _fitting(
    quality: Quality, fast: list[str], device: Device, dtype: str | None, facts: Facts, request: Request | None
) -> list[str]:
    """The first of the candidates that fits; the last, which takes least, where none does."""
    specs = fast
    for specs in _candidates(quality, fast, device):
        plan = compose(specs, device, dtype, facts.known)
        load = _load(plan, device, facts, request)
        room = (1 - SPARE) * device.free_bytes - load.peak_bytes
        if room < 0:
            continue
        if "offload:blocks" in specs:
            return _with_budget(specs, load, room)
        return _launched_at_once(specs, device, dtype, facts, request)
    return specs


def _launched_at_once(
    specs: list[str], device: Device, dtype: str | None, facts: Facts, request: Request | None
) -> list[str]:
    """With recorded forwards of both predictions instead of skipped steps, where launches take most of the time.

    So with one picture of 1.3B at 832x480: 16 ms a guided step instead of 63 (benchmarks/h200_forward.jsonl). Told for
    an H200: another GPU's launches and products stand to each other alike. Without a request nothing is known of sizes.
    """
    if request is None or "offload:model" in specs:
        return specs
    # Of so few tokens any kernel of attention takes the same (16.1 ms with torch's own choice and FlashAttention-4).
    kept = [spec for spec in specs if spec not in SKIPPING and not spec.startswith("attention:")]
    at_once = [*kept, "batched-cfg", "cuda-graphs"]
    as_they_are, instead = (
        _load(compose(plan, device, dtype, facts.known), device, facts, request, H200) for plan in (specs, at_once)
    )
    fits = instead.peak_bytes <= (1 - SPARE) * device.free_bytes
    assert instead.denoise_seconds is not None
    assert as_they_are.denoise_seconds is not None
    return at_once if fits and instead.denoise_seconds < WORTH * as_they_are.denoise_seconds else specs


def _candidates(quality: Quality, fast: list[str], device: Device) -> Iterator[list[str]]:
    """From the fastest to the one that takes least memory."""
    skipping = SKIPPING if quality == "fast" else ()
    eight = not Quantize("fp8").missing_on(device)
    lighter: tuple[Sequence[str], ...] = ((),)
    if quality != "exact":
        lighter = (("quantize:fp8",),) if eight else ((), ("quantize:int4",))
    homes: tuple[Sequence[str], ...] = ((), ("text-encoder:unload",), ("offload:model",))
    for linear in lighter:
        for home in homes:
            yield [*linear, *home, *fast, *skipping]
    linear = lighter[-1]
    for place in ("unload", "blocks"):
        yield [*linear, "offload:blocks", f"text-encoder:{place}", *fast, *skipping]
    if quality == "fast":
        yield [*linear, "offload:blocks", "text-encoder:blocks", *fast, *skipping, "vae:tiling"]


def _with_budget(specs: list[str], load: Load, room: float) -> list[str]:
    """Streamed blocks with as many resident as the room holds."""
    budget = int((load.transformer_bytes + room) / 1e8) / 10
    if budget * 1e9 < load.transformer_bytes:  # no room for another tenth of a GB
        return specs
    return [f"offload:auto:budget={budget:g}" if spec == "offload:blocks" else spec for spec in specs]


def _load(plan: Plan, device: Device, facts: Facts, request: Request | None, ceilings: Ceilings | None = None) -> Load:
    facts = plan.adapt(facts)
    if request is None:
        # Every model can be asked for its own size; what it begins with takes no memory that counts.
        request = TextToVideo("").completed(facts.known.defaults)
    else:
        request = complete(request, facts)
    return estimate(request, facts, plan, device.total_bytes, ceilings)
