"""Load a model once, apply a plan, run requests. Owns the device's memory."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from swiftwan.device import Device, pick_device
from swiftwan.errors import MemoryLimitError
from swiftwan.memory import SLACK, WillNotFitError, refuse_what_cannot_fit, what_would_fit
from swiftwan.models.text import TextEncoder
from swiftwan.ops.products import without_workspace
from swiftwan.pipelines.generate import OnStep, generate
from swiftwan.pipelines.request import Request
from swiftwan.pipelines.result import Out, Result
from swiftwan.pipelines.stages import words
from swiftwan.places import cache_folder
from swiftwan.plan import Explanation, Facts, Plan, complete, describe, estimate, make_plan
from swiftwan.prompt_cache import PromptCache
from swiftwan.techniques.lora import find_loras, labels
from swiftwan.techniques.switching import switch
from swiftwan.weights.build import Parts, build
from swiftwan.weights.find import locate


class Engine:
    """A loaded model with its plan applied. Make one with :meth:`load`.

    Attributes:
        model_name: as the user called it.
        device, plan: where and how it runs.
        parts: text encoder, transformers, VAE, and an image encoder where the model has one.
    """

    def __init__(self, facts: Facts, parts: Parts, plan: Plan, device: Device) -> None:
        self.facts = facts
        self.parts = parts
        self.plan = plan
        self.device = device
        self.torch_device = torch.device(device.torch_device)

    @classmethod
    def load(
        cls,
        model: str,
        *,
        plan: str | Sequence[str] = "auto",
        device: str | None = None,
        dtype: str | None = None,
        request: Request | None = None,
    ) -> Engine:
        """Load a model.

        Args:
            model: ``pocket``, a folder in diffusers layout, a hub id, a known name, or ``random:NAME``.
            plan: a recipe's name, or technique specs ``name[:value][:key=value,...]``; [] is the plain run.
            device: ``cuda``, ``cuda:N`` or ``cpu``; None takes the best here.
            dtype: ``bf16``, ``fp16`` or ``fp32``; None takes the device's.
            request: the first to be run. ``plan="auto"`` shall fit it (None: the model's official size), and the text
                encoder begins to load for it beside the rest.

        Raises:
            PlanError, UnavailableError, WeightsError, OutputError, MemoryLimitError: in one line each.
        """
        where = pick_device(device)
        facts = describe(model)
        chosen = make_plan(plan, where, dtype, facts, request)
        _allow_tf32(chosen)
        if where.torch_device.startswith("cuda"):
            torch.cuda.set_device(where.torch_device)  # Triton launches on the current device
            without_workspace()
            if chosen.settings.transformers_on_host:
                _grow_by_pages()

        for technique in chosen.techniques:
            technique.begin(torch.device(where.torch_device))

        def first(text: TextEncoder) -> None:
            text.cache = _prompt_cache(chosen.settings.prompt_cache)
            if request is not None:
                text.expect(words(complete(request, chosen.adapt(facts))))

        try:
            parts = build(
                locate(model),
                device=torch.device(where.torch_device),
                dtype=chosen.settings.dtype,
                vae_dtype=chosen.settings.vae_dtype,
                transformers_on_host=chosen.settings.transformers_on_host,
                resident_blocks=chosen.settings.resident_blocks,
                text_home=chosen.settings.text_home,
                as_loaded=chosen.settings.as_loaded,
                first=first,
            )
            for technique in chosen.techniques:
                technique.install(parts)
        except torch.OutOfMemoryError:
            failed = True
        else:
            failed = False
        if failed:  # outside the except: its traceback would keep the tensors alive
            _free_memory()
            raise MemoryLimitError(
                f"{where.name} has {where.free_bytes / 1e9:.1f} GB free, too little for the weights of '{model}' in "
                f"{_name(chosen.settings.dtype)}; take --plan auto, a smaller model or a 16-bit --dtype."
            )
        return cls(chosen.adapt(facts), parts, chosen, where)

    @property
    def model_name(self) -> str:
        return self.facts.name

    @property
    def dtype_name(self) -> str:
        return _name(self.plan.settings.dtype)

    def latent_shape(self, request: Request) -> tuple[int, ...]:
        """(1, C, f, h, w) of a completed request's latents."""
        assert request.num_frames is not None
        assert request.height is not None
        assert request.width is not None
        vae = self.facts.known.vae
        return (
            1,
            vae.z_dim,
            (request.num_frames - 1) // vae.scale_factor_temporal + 1,
            request.height // vae.scale_factor_spatial,
            request.width // vae.scale_factor_spatial,
        )

    @property
    def loras(self) -> dict[str, float]:
        """Strength by name: the file's without its ending, or its path where two files share a name."""
        return {label: lora.strength for label, lora in labels(self.plan.techniques).items()}

    def set_lora(self, name: str, strength: float) -> None:
        """Change a live LoRA's strength for the requests to come: nothing is reloaded or compiled anew.

        Args:
            name: as in :attr:`loras`, or its path.
            strength: 0 gives bit for bit the model without it.

        Raises:
            PlanError: there is no such LoRA, it is merged into the weights, or the strength is not finite.
        """
        changed = {}
        for lora in find_loras(self.plan.techniques, name):
            changed[id(lora)] = replace(lora, strength=strength)
            changed[id(lora)].change(self.parts)
        techniques = tuple(changed.get(id(technique), technique) for technique in self.plan.techniques)
        self.plan = replace(self.plan, techniques=techniques)

    def switch(self, plan: str | Sequence[str]) -> None:
        """Run by another plan from now on, without loading anew; ``explain`` says what each technique's switch costs.

        Raises:
            PlanError: the plan cannot be, or differs in a technique that decides how weights load.
        """
        chosen = make_plan(plan, self.device, self.dtype_name, self.facts)
        switch(self.parts, self.plan.techniques, chosen.techniques)
        _free_memory()  # of recorded graphs, and of weights in another format
        self.parts.text.cache = _prompt_cache(chosen.settings.prompt_cache)
        _allow_tf32(chosen)
        self.plan = chosen

    def run(
        self, request: Request, *, on_step: OnStep | None = None, out: str | Path | None = None, quality: int = 8
    ) -> Result:
        """Run one request.

        Args:
            request: fields at None take the model's official values.
            on_step: told after each unit of work; what it raises ends the run within a step.
            out: a file to write as :meth:`Result.save` would, but with its encoder at work beside the VAE.
            quality: of that file, as in :meth:`Result.save`.

        Raises:
            RequestError: a task or a value that the model or the plan cannot take, or an input that cannot be read.
            WillNotFitError: it takes more than all memory of the device; says which settings would fit.
            MemoryLimitError: the device's memory ran out; says the same.
            OutputError: ``out`` cannot be written; told before anything runs where that is known.
        """
        request = complete(request, self.facts)
        self.plan.check(request)
        self._check_memory(request)
        film = None if out is None else Out(Path(out), quality)
        if film is not None:
            film.check(request)
        if self.torch_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.torch_device)
        try:
            return generate(self, request, on_step, film)
        except torch.OutOfMemoryError:
            pass
        _free_memory()
        raise MemoryLimitError(self._memory_advice(request))

    def run_many(self, requests: Iterable[Request], *, on_step: OnStep | None = None) -> Iterator[Result]:
        """Run requests one after the other on the loaded model, yielding each result as it is done."""
        for request in requests:
            yield self.run(request, on_step=on_step)

    def _explain(self, request: Request, *, new_prompt: bool = True) -> Explanation:
        load = estimate(request, self.facts, self.plan, self.device.total_bytes, new_prompt=new_prompt)
        return Explanation(self.facts, request, self.plan, self.device, load)

    def _check_memory(self, request: Request) -> None:
        try:
            refuse_what_cannot_fit(self._explain(request))
        except WillNotFitError:
            if self.parts.text.is_loaded or not self.parts.text.knows(words(request)):
                raise
            refuse_what_cannot_fit(self._explain(request, new_prompt=False))

    def _memory_advice(self, request: Request) -> str:
        explanation = self._explain(request)
        # What has just failed may have been told too low, so what would fit takes a tenth less than that, too.
        budget = min(pick_device(self.device.torch_device).free_bytes, explanation.load.activation_bytes)
        fits = what_would_fit(
            explanation, lambda smaller: SLACK * explanation.load_of(smaller).activation_bytes < budget
        )
        return (
            f"{self.device.name} ran out of memory at {request.width}x{request.height}, {request.num_frames} frames, "
            f"which takes about {explanation.load.activation_bytes / 1e9:.1f} GB beside "
            f"{explanation.load.weight_bytes / 1e9:.1f} GB of weights; {fits}"
        )


def _grow_by_pages() -> None:
    """Let torch's allocator grow its segments instead of adding others, where a plan says that memory is short.

    Fragments of segments held 1.4 GB beyond the tensors of 14B in 16 GB. What the user set stands.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def _allow_tf32(plan: Plan) -> None:
    torch.backends.cuda.matmul.allow_tf32 = plan.settings.tf32
    torch.backends.cudnn.allow_tf32 = plan.settings.tf32


def _prompt_cache(place: str) -> PromptCache | None:
    if place == "off":
        return None
    return PromptCache(cache_folder() / "prompts" if place == "disk" else None)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _name(dtype: torch.dtype) -> str:
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[str(dtype).removeprefix("torch.")]
