"""A distillation from prompts to a LoRA file: ``swiftwan train distill``.

Needs no videos: the teacher walks once from noise to a video for each prompt, and what it passed on its way is the
training data; clips for the prompts may be given beside. Everything a step draws follows from (seed, step), each stage
keeps its state on disk, and a run that is started again with the same words goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swiftwan.errors import OutputError, RequestError, reason
from swiftwan.models.config import TransformerConfig
from swiftwan.models.dit import Condition, Run
from swiftwan.models.text import TextEncoder, clean_prompt
from swiftwan.ops.modulate import Tokens
from swiftwan.techniques.few_step import METADATA_KEY, to_metadata
from swiftwan.train import distill
from swiftwan.train.distill import Expert, Roles
from swiftwan.train.distill_settings import Settings
from swiftwan.train.distill_stages import Clips, Say, Trainer, Walks, autocast
from swiftwan.train.loop import seed_of
from swiftwan.weights.build import Parts, parameter_count
from swiftwan.weights.check import check_file, write_json
from swiftwan.weights.lora_write import write_lora
from swiftwan.weights.write import write_tensors

SMALL = 200_000_000
"""Parameters below which a step waits for launches: its blocks are compiled, and the step recorded as a CUDA graph.
Larger models compute their blocks again in the backward pass instead of keeping what lies between."""


def is_small(config: TransformerConfig) -> bool:
    """Whether a step of such a transformer waits for launches rather than for arithmetic."""
    return parameter_count(config) < SMALL


def run(
    folder: Path,
    parts: Parts,
    prompts: Sequence[str],
    negative_prompt: str,
    latent_shape: tuple[int, ...],
    settings: Settings,
    *,
    base: str,
    clips: Tensor | None = None,
    start: Path | None = None,
    say: Say,
) -> Path:
    """Distill, or go on, and write ``folder/few_step_STEPS.safetensors``; returns its path, which names an expert.

    Args:
        parts: the teacher's, on the device where all is computed. Its transformer is the student's from now on.
        latent_shape: (C, f, h, w) of a clip.
        base: the teacher's name, for the file's header.
        clips: latents of one for each prompt, for ``consistency``; without them it takes what the teacher makes.
        start: a LoRA that this wrote, to go on from with other settings.
        say: is told how far it is.

    Raises:
        RequestError: the folder holds another run, a prompt is too long, the rank is larger than the layers, or
            ``start`` has other layers or another rank.
        OutputError: the folder cannot be written.
    """
    for prompt in (*prompts, negative_prompt):
        parts.text.check(prompt)
    told = {"base": base, "latent_shape": list(latent_shape), "prompts": digest(prompts), "start": str(start or "")}
    roles = cast(parts, settings)
    transformer, beside = roles.transformer, roles.beside
    if start is not None:
        read_lora(start, roles)
    _begin(folder, asdict(settings) | told)  # now that nothing of it is refused any more
    text = embedded(parts.text, (*prompts, negative_prompt))
    small, on_gpu = is_small(transformer.config), text.is_cuda
    # Autocast would leave the residual stream in 16 bits behind the first layer; small changes drown there.
    for one in [transformer] if beside is None else [transformer, beside.transformer]:
        one.patch_embedding.register_forward_hook(lambda module, args, out: out.float())
    if not small:
        transformer.walk = _checkpointed
    elif on_gpu:
        torch._dynamo.config.recompile_limit = 16  # each role, with gradients and without
        for block in transformer.blocks:
            block.compile(dynamic=False)
    walks = walked(folder / "walks", roles, text, latent_shape, settings, say)
    trained = slice(0, walks.count)
    source = Clips(walks.places[trained, -1], walks.text[trained]) if clips is None else Clips(clips, text[:-1])
    trainer = Trainer(folder, roles, walks, source, settings, recorded=small and on_gpu, say=say)
    trainer.learn("regression", settings.regression)
    trainer.learn("consistency", settings.consistency)
    trainer.match(settings.matching)
    return deliver(folder / f"few_step_{settings.steps}.safetensors", roles, settings, base)[0]


def cast(parts: Parts, settings: Settings) -> Roles:
    """Give out the roles: the transformer that learns plays them all, but where the other expert teaches.

    Raises:
        RequestError: the rank is larger than the transformer is wide.
    """
    if settings.rank > (width := parts.transformer.config.dim):
        raise RequestError(f"rank is {settings.rank}, and the transformer is {width} wide; take {width} or less.")
    learns, scale, beside = parts.transformer, settings.guidance_scale, None
    if parts.transformer_2 is not None:
        beside = Expert(parts.transformer_2, 0.0, settings.boundary, settings.guidance_scale_2)
    if settings.expert == "low" and beside is not None:
        beside = Expert(learns, settings.boundary, math.inf, scale)
        learns, scale = parts.transformer_2 or learns, settings.guidance_scale_2
    return Roles(learns, guidance_scale=scale, rank=settings.rank, seed=settings.seed, beside=beside)


def _begin(folder: Path, told: dict[str, Any]) -> None:
    """Make the folder, or check that the run in it is this one."""
    path = folder / "run.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_json(path, told)
            return
        there = json.loads(path.read_text())
    except (OSError, ValueError) as problem:
        raise OutputError(f"{folder} cannot hold a run: {reason(problem)}; give another --out.") from None
    for key, value in told.items():
        if there.get(key) != value:
            raise RequestError(
                f"{folder} holds a run with {key} {there.get(key)}, and this one has {value}; give the same "
                "words to go on with it, or another --out."
            )


def digest(prompts: Sequence[str]) -> str:
    """Names a list of prompts by content."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]


def _checkpointed(run: Run, count: int, x: Tokens, condition: Condition) -> Tokens:
    """Each block in order, computed again in the backward pass."""
    for number in range(count):
        x = checkpoint(run, number, x, use_reentrant=False) if torch.is_grad_enabled() else run(number, x)
    return x


@torch.no_grad()
def embedded(text: TextEncoder, prompts: Sequence[str], batch: int = 256) -> Tensor:
    """(N, S, D), zero behind each prompt's end, as Wan pads text; the encoder's memory is given back."""
    encoded = []
    for start in range(0, len(prompts), batch):
        words = [clean_prompt(prompt) for prompt in prompts[start : start + batch]]
        tokens = [torch.tensor(text.tokenizer.encode(line).ids) for line in words]
        ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(text.runs_on)
        lengths = torch.tensor([len(line) for line in tokens])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(text.runs_on)
        encoded.append((text.encoder(ids, mask) * mask[..., None]).to(text.device))
    text.stays_loaded = False
    text.release()
    longest = max(part.shape[1] for part in encoded)
    return torch.cat([nn.functional.pad(part, (0, 0, 0, longest - part.shape[1])) for part in encoded])


def walked(
    folder: Path, roles: Roles, text: Tensor, latent_shape: tuple[int, ...], settings: Settings, say: Say
) -> Walks:
    """Let the teacher walk where it has not yet; a file a batch, so that a stopped run keeps what it has.

    Args:
        text: of all prompts, and the negative one behind them.
    """
    text, negative = text[:-1][-settings.walks :], text[-1:]
    folder.mkdir(exist_ok=True)
    places = []
    for start in range(0, len(text), settings.batch):
        path, part = folder / f"{start:06d}.safetensors", text[start : start + settings.batch]
        if not path.exists():
            generator = torch.Generator("cpu").manual_seed(seed_of(settings.seed, start))
            noise = torch.randn((len(part), *latent_shape), generator=generator).to(part.device)
            with autocast(part.device):
                passed = distill.walk(roles, settings.phases, noise, part, negative.expand_as(part))
            write_tensors(path, {"places": passed.transpose(0, 1).half()})
            say(f"walks: {start + len(part)} of {len(text)}")
        with safe_open(path, framework="pt") as file:
            places.append(file.get_tensor("places"))
    together = torch.cat(places)
    if is_small(roles.transformer.config):
        together = together.to(text.device)
    return Walks(together, text, negative, count=len(text) - min(settings.batch, len(text) // 4))


# Files


def deliver(path: Path, roles: Roles, settings: Settings, base: str) -> list[Path]:
    """Write the student in float16; the header has the base, the settings and the schedule."""
    from peft import get_peft_model_state_dict

    return write_lora(
        path,
        {settings.expert or None: get_peft_model_state_dict(roles.transformer, adapter_name="student")},
        peft_config={"r": settings.rank, "lora_alpha": settings.rank, "target_modules": distill.TARGETS},
        metadata={
            "base_model": base,
            "settings": json.dumps(asdict(settings)),
            METADATA_KEY: to_metadata(settings.few_step),
        },
        form=settings.format,
        dtype=torch.float16,
    )


@torch.no_grad()
def read_lora(path: Path, roles: Roles) -> None:
    """Make a LoRA that :func:`deliver` wrote, in diffusers' form, the student.

    Raises:
        WeightsError: it is missing or damaged.
        RequestError: it is not of this rank, or not of these layers.
    """
    shapes = check_file(path)
    prefix = "transformer_2." if any(name.startswith("transformer_2.") for name in shapes) else "transformer."
    wanted = {prefix + name.replace(".student.", "."): p for name, p in roles.parameters("student").items()}
    if {name: tuple(p.shape) for name, p in wanted.items()} != shapes:
        raise RequestError(
            f"{path} is not a student of this model with rank {roles.config.r}: it has {len(shapes)} tensors, of which "
            f"{sum(shapes.get(name) == tuple(p.shape) for name, p in wanted.items())} fit; give the --rank that it has."
        )
    for name, factor in load_file(path).items():
        wanted[name].copy_(factor)
