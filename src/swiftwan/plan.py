"""From technique specs to a checked plan, and what a run will take, told before anything loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from swiftwan import inputs
from swiftwan.device import Device, parse_dtype, pick_device
from swiftwan.errors import PlanError, RequestError, did_you_mean
from swiftwan.guidance import Guide
from swiftwan.models.config import KNOWN_MODELS, POCKET, ClipConfig, KnownModel
from swiftwan.models.vae import Tiling
from swiftwan.ops.attention import kernel
from swiftwan.pipelines.request import Grid, Request
from swiftwan.sampling import check_scheduler
from swiftwan.techniques import TECHNIQUES
from swiftwan.techniques.base import Settings, Technique
from swiftwan.techniques.fused import Fused
from swiftwan.techniques.precision import Dtype
from swiftwan.techniques.vae import FastVae
from swiftwan.weights.build import UMT5_XXL, parameter_count, text_parameter_count
from swiftwan.weights.find import identify, known_model, locate, published_file, read_layout
from swiftwan.weights.layout import RandomModel, WeightsFile

RECIPES = ("auto", "none")
TEXT_TOKENS = 512


def parse(spec: str) -> Technique:
    """Read ``name[:value][:key=value,...]``.

    Raises:
        PlanError: unknown technique or option, a value missing, left over or of the wrong type.
    """
    name, _, rest = spec.partition(":")
    kind = TECHNIQUES.get(name)
    if kind is None:
        raise PlanError(f"unknown technique '{name}'." + did_you_mean(name, TECHNIQUES))
    return kind.read(rest)


# Plans


@dataclass(frozen=True)
class Plan:
    """Techniques in order of application, and what they come to."""

    techniques: tuple[Technique, ...]
    settings: Settings

    @property
    def specs(self) -> tuple[str, ...]:
        return tuple(technique.spec for technique in self.techniques)

    def adapt(self, facts: Facts) -> Facts:
        """What is known of a model once this plan has changed it: a few-step model has other defaults."""
        if self.settings.few_step is None:
            return facts
        defaults = self.settings.few_step.over(facts.known.defaults)
        return replace(facts, known=replace(facts.known, defaults=defaults))

    @property
    def guide(self) -> Guide:
        return self.settings.guide

    @property
    def tiling(self) -> Tiling | None:
        return self.settings.tiling


def make_plan(
    plan: str | Sequence[str], device: Device, dtype: str | None = None, model: KnownModel | None = None
) -> Plan:
    """Check everything, then put it in order.

    Args:
        plan: a recipe's name, or specs; an empty list is the plain run.
        device: where it will run.
        dtype: stands above the plan's.
        model: which model it is for, where that is known.

    Raises:
        PlanError: every problem at once.
    """
    techniques: list[Technique] = []
    problems: list[str] = []
    if isinstance(plan, str):
        if plan not in RECIPES:
            raise PlanError(f"unknown plan '{plan}'." + did_you_mean(plan, RECIPES))
        plan = _auto(device, parse_dtype(dtype) if dtype else device.dtype) if plan == "auto" else []
    for spec in plan:
        try:
            techniques.append(parse(spec))
        except RequestError as problem:
            problems.append(str(problem))
    if dtype is not None:
        wanted = parse_dtype(dtype)
        techniques = [t for t in techniques if not isinstance(t, Dtype) or parse_dtype(t.value) == wanted]
    for technique in techniques:
        if missing := technique.missing_on(device):
            problems.append(f"'{technique.name}' cannot run on {device.name}: {missing}")
        if model and (unfit := technique.unfit_for(model)):
            problems.append(f"{technique.name}: {unfit}")
    problems += _conflicts(techniques)
    if problems:
        told = "; ".join(problem.rstrip(".") for problem in problems)
        raise PlanError(told if told.endswith("?") else f"{told}.")
    techniques.sort(key=lambda technique: (technique.slot, technique.spec))
    settings = Settings(dtype=parse_dtype(dtype) if dtype else device.dtype)
    for technique in techniques:
        settings = technique.apply(settings)
    return Plan(tuple(techniques), settings)


def _auto(device: Device, dtype: torch.dtype) -> list[str]:
    """The fastest exact techniques that fit any request; what is measured is in benchmarks/h200_forward.jsonl.

    Left out because they depend on the request's size, unknown here: ``cuda-graphs`` and ``batched-cfg``, which pay
    for pictures and short clips.
    """
    specs = [] if Fused().missing_on(device) else ["fused"]
    # cuDNN's attention is the faster one from Hopper on; before that torch's own choice, FlashAttention-2, is.
    if dtype is not torch.float32 and device.capability is not None and device.capability >= (9, 0):
        names = (name for name in ("flash4", "cudnn") if not kernel(name).missing_on(device.capability))
        specs += [f"attention:{name}" for name in list(names)[:1]]
    if not FastVae("fast").missing_on(device):
        specs.append("vae:fast")
    return specs


def _conflicts(techniques: Sequence[Technique]) -> list[str]:
    return [
        f"'{one.spec}' and '{other.spec}': {why}"
        for i, one in enumerate(techniques)
        for other in techniques[i + 1 :]
        if (why := one.conflict(other))
    ]


# What a run will take


@dataclass(frozen=True)
class Facts:
    """What must be known of a model before a run, without its weights."""

    name: str
    known: KnownModel
    text_parameters: int

    @property
    def grid(self) -> Grid:
        vae, patch = self.known.vae, self.known.transformer.patch_size
        return Grid(spatial=vae.scale_factor_spatial * patch[1], temporal=vae.scale_factor_temporal)

    @property
    def experts(self) -> int:
        return 2 if self.known.boundary_ratio else 1


def describe(model: str) -> Facts:
    """Find a model's sizes and defaults: published ones from the table, others from their config files.

    Raises:
        WeightsError: there is no such model.
    """
    if model == POCKET.name:
        return Facts(model, POCKET, text_parameters=1_181_184)
    if known := known_model(model):
        return Facts(model, known, text_parameter_count(UMT5_XXL))
    source = locate(model)
    assert not isinstance(source, RandomModel)
    if isinstance(source, WeightsFile) and (known := published_file(source)):
        # Its other parts are the published ones: no need to bring them to know their sizes.
        return Facts(model, known, text_parameter_count(UMT5_XXL))
    layout = read_layout(source)
    text_sizes = {k: v for k, v in layout.configs["text_encoder"].items() if k in UMT5_XXL}
    family = identify(layout) or _family(layout.boundary_ratio, layout.expand_timesteps, layout.transformer.in_channels)
    sized = KnownModel(
        name=source.name,
        hub_id="",
        transformer=layout.transformer,
        vae=layout.vae,
        defaults=family.defaults,
        boundary_ratio=layout.boundary_ratio if layout.transformer_2 else None,
        expand_timesteps=layout.expand_timesteps,
        sizes=family.sizes,
    )
    return Facts(model, sized, text_parameter_count(text_sizes))


def _family(boundary_ratio: float | None, expand_timesteps: bool, in_channels: int) -> KnownModel:
    """Whose defaults a model of unknown sizes takes: those of the published one that works the same way."""
    if boundary_ratio is not None:
        return KNOWN_MODELS["wan2.2-i2v-a14b" if in_channels == 36 else "wan2.2-t2v-a14b"]
    if expand_timesteps:
        return KNOWN_MODELS["wan2.2-ti2v-5b"]
    return KNOWN_MODELS["wan2.1-i2v-14b-480p" if in_channels == 36 else "wan2.1-t2v-1.3b"]


def complete(request: Request, facts: Facts) -> Request:
    """Fill a request with the model's defaults and check it.

    Raises:
        RequestError: a task or a value that the model cannot take, or an input that cannot be read.
    """
    request.check_model(facts.known)
    request = inputs.sized(request, facts.known.defaults, facts.grid).completed(facts.known.defaults)
    check_scheduler(request.scheduler or "")
    request.check(facts.grid, experts=facts.experts)
    return request


@dataclass(frozen=True)
class Load:
    """The work and the memory of a run, from its shapes.

    ``weight_bytes`` is exact; ``activation_bytes`` counts the largest tensors that live together and is not
    calibrated against a GPU yet.
    """

    tokens: int
    forwards: int
    tflop_per_forward: float
    weight_bytes: int
    activation_bytes: int

    @property
    def peak_bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes


def estimate(request: Request, facts: Facts, dtype: torch.dtype) -> Load:
    """Count tokens, operations (two a multiply-add) and bytes of a completed request."""
    assert request.num_frames
    assert request.width
    assert request.height
    config, vae = facts.known.transformer, facts.known.vae
    dim, ffn, layers, size = config.dim, config.ffn_dim, config.num_layers, dtype.itemsize
    _, patch_h, patch_w = config.patch_size
    frames = (request.num_frames - 1) // vae.scale_factor_temporal + 1
    rows, columns = request.height // vae.scale_factor_spatial, request.width // vae.scale_factor_spatial
    tokens = frames * (rows // patch_h) * (columns // patch_w)
    projections = 12 * tokens * dim**2  # q, k, v, out of self-attention; q, out of cross-attention
    attention = 4 * tokens * (tokens + TEXT_TOKENS) * dim
    flop = layers * (projections + attention + 4 * tokens * dim * ffn)
    steps = request.steps_to_run
    calls = max(0, 2 * steps - 1) if request.scheduler == "heun" else steps
    guided = (request.guidance_scale or 1) > 1
    weights = facts.experts * parameter_count(config) + parameter_count(vae) + facts.text_parameters
    if config.image_dim is not None:
        weights += parameter_count(ClipConfig())
    # Residual stream and its float32 copies, q, k, v and the attention's result, or the feed-forward's middle.
    denoising = tokens * (12 * dim + size * max(6 * dim, 2 * ffn + dim))
    width = (vae.decoder_base_dim or vae.base_dim) * vae.dim_mult[0]
    pixels = request.height * request.width // (vae.patch_size or 1) ** 2
    decoding = 4 * pixels * width * (6 + vae.scale_factor_temporal * size)
    return Load(
        tokens=tokens,
        forwards=calls * (2 if guided else 1),
        tflop_per_forward=flop / 1e12,
        weight_bytes=weights * size,
        activation_bytes=max(denoising, decoding),
    )


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
            f"work       {load.forwards} forwards of {load.tokens} tokens, {load.tflop_per_forward:.3g} TFLOP each",
            f"memory     {_gib(load.weight_bytes)} of weights + about {_gib(load.activation_bytes)}; "
            f"{_gib(self.device.free_bytes)} free: {'fits' if self.fits else 'does not fit'}",
        ]
        for number, technique in enumerate(self.plan.techniques, 1):
            lines.append(f"{number}. {technique.spec} ({technique.kind}): {technique.reason}")
            lines += [f"   {line}" for line in technique.tell(self.facts.known)]
        return lines if self.plan.techniques else [*lines, "plan       plain: no techniques"]

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
                    "told": t.tell(self.facts.known),
                }
                for t in self.plan.techniques
            ],
            "tokens": self.load.tokens,
            "forwards": self.load.forwards,
            "tflop_per_forward": self.load.tflop_per_forward,
            "weight_bytes": self.load.weight_bytes,
            "activation_bytes": self.load.activation_bytes,
            "free_bytes": self.device.free_bytes,
            "fits": self.fits,
        }


def _steps(request: Request) -> str:
    steps, all_steps = request.steps_to_run, request.num_inference_steps
    return f"{steps} steps" if steps == all_steps else f"the last {steps} of {all_steps} steps"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


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
    chosen = make_plan(plan, where, dtype, facts.known)
    facts = chosen.adapt(facts)
    full = complete(request, facts)
    given = inputs.read(full)
    load = estimate(full, facts, chosen.settings.dtype)
    return Explanation(facts, full, chosen, where, load, given.inputs if given else ())
