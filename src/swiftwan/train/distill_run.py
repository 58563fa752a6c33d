"""A distillation from prompts to a LoRA file: ``swiftwan train distill``.

Needs no videos: the teacher walks once from noise to a video for each prompt, and what it passed on its way is all the
training data. Everything a step draws follows from (seed, step), each stage keeps its state on disk, and a run
that is started again with the same words goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swiftwan.errors import OutputError, RequestError
from swiftwan.models.config import TransformerConfig
from swiftwan.models.dit import Condition
from swiftwan.models.text import TextEncoder, clean_prompt
from swiftwan.sampling import FewStep
from swiftwan.techniques.few_step import METADATA_KEY, to_metadata
from swiftwan.train import distill
from swiftwan.train.distill import Phases, Roles
from swiftwan.train.loop import Run, Schedule, seed_of
from swiftwan.train.recorded import Recorded, plain
from swiftwan.weights.build import Parts, parameter_count
from swiftwan.weights.check import write_json
from swiftwan.weights.write import sync

LOG_EVERY = 100
SAVE_EVERY = 500
HELD_OUT = 32
"""So many of the last prompts are never trained on; how far the student ends from the teacher there is logged."""
SMALL = 200_000_000
"""Parameters below which a step waits for launches: its blocks are compiled, and the step recorded as a CUDA graph.
Larger models compute their blocks again in the backward pass instead of keeping what lies between."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What decides a run's result; another value is another run.

    Attributes:
        steps: of the student.
        flow_shift, guidance_scale: of the teacher's walk, and the first also of the student's schedule.
        walk: the teacher's steps, a multiple of the student's.
        rank: of the LoRA.
        batch: clips of a step.
        regression, consistency, matching: updates of each stage.
        learning_rate: of the first two stages; ``matching`` takes a tenth.
    """

    steps: int
    flow_shift: float
    guidance_scale: float
    walk: int
    rank: int
    batch: int
    regression: int
    consistency: int
    matching: int
    learning_rate: float
    seed: int

    def __post_init__(self) -> None:
        for name in ("steps", "rank", "batch"):
            if (value := getattr(self, name)) < 1:
                raise RequestError(f"{name} is {value}; it must be at least 1.")
        for name in ("regression", "consistency", "matching"):
            if (value := getattr(self, name)) < 0:
                raise RequestError(f"{name} is {value}; it is a number of updates, 0 or more.")
        if self.walk < self.steps or self.walk % self.steps:
            near = max(1, round(self.walk / self.steps)) * self.steps
            raise RequestError(f"walk is {self.walk}; it must be a multiple of steps, {self.steps}: take {near}.")
        if not 0 < self.learning_rate < 1:
            raise RequestError(f"learning rate is {self.learning_rate}; it must be between 0 and 1.")
        if not 0.01 <= self.flow_shift <= 100:
            raise RequestError(f"flow shift is {self.flow_shift}; it must be from 0.01 to 100.")
        if not 0 <= self.guidance_scale <= 100:
            raise RequestError(f"guidance is {self.guidance_scale}; it must be from 0 to 100.")

    @property
    def phases(self) -> Phases:
        return Phases.of(self.steps, self.flow_shift, self.walk)

    @property
    def few_step(self) -> FewStep:
        """How the student is to be sampled."""
        return FewStep(self.steps, "euler", self.flow_shift)


@dataclass(frozen=True)
class Walks:
    """What the teacher passed on its way, one walk a prompt.

    Attributes:
        places: (N, edges, C, f, h, w) float16, from noise to video.
        text: (N, S, D) in the text encoder's dtype.
        negative: (1, S, D), what guidance leads away from.
    """

    places: Tensor
    text: Tensor
    negative: Tensor

    @property
    def count(self) -> int:
        """How many are trained on."""
        return len(self.places) - min(HELD_OUT, len(self.places) // 4)

    @property
    def latent_shape(self) -> torch.Size:
        return self.places.shape[2:]


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
    say: Say,
) -> Path:
    """Distill, or go on, and write ``folder/few_step_STEPS.safetensors``; returns its path.

    Args:
        parts: the teacher's, on the device where all is computed. Its transformer is the student's from now on.
        latent_shape: (C, f, h, w) of a clip.
        base: the teacher's name, for the file's header.
        say: is told how far it is.

    Raises:
        RequestError: the folder holds another run, or a prompt is too long.
        OutputError: the folder cannot be written.
    """
    for prompt in (*prompts, negative_prompt):
        parts.text.check(prompt)
    _begin(folder, asdict(settings) | {"base": base, "latent_shape": list(latent_shape), "prompts": digest(prompts)})
    transformer = parts.transformer
    text = embedded(parts.text, (*prompts, negative_prompt))
    roles = Roles(transformer, rank=settings.rank, seed=settings.seed)
    small, on_gpu = is_small(transformer.config), text.is_cuda
    # Autocast would leave the residual stream in 16 bits behind the first layer; small changes drown there.
    transformer.patch_embedding.register_forward_hook(lambda module, args, out: out.float())
    if not small:
        transformer.walk = _checkpointed
    elif on_gpu:
        for block in transformer.blocks:
            block.compile(dynamic=False)
    walks = walked(folder / "walks", roles, text, latent_shape, settings, say)
    trainer = Trainer(folder, roles, walks, settings, recorded=small and on_gpu, say=say)
    trainer.learn("regression", settings.regression)
    trainer.learn("consistency", settings.consistency)
    trainer.match(settings.matching)
    path = folder / f"few_step_{settings.steps}.safetensors"
    write_lora(path, roles, settings, base)
    return path


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
        raise OutputError(f"{folder} cannot hold a run: {problem}; give another --out.") from None
    for key, value in told.items():
        if there.get(key) != value:
            raise RequestError(
                f"{folder} holds a run with {key} {there.get(key)}, and this one has {value}; give the same "
                "words to go on with it, or another --out."
            )


def digest(prompts: Sequence[str]) -> str:
    """Names a list of prompts by content."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]


def _checkpointed(run: Callable[[int, Tensor], Tensor], count: int, x: Tensor, condition: Condition) -> Tensor:
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
        tokens = text.tokenizer(words, padding=True, return_tensors="pt")
        ids, mask = tokens.input_ids.to(text.runs_on), tokens.attention_mask.to(text.runs_on)
        encoded.append((text.encoder(ids, mask).last_hidden_state * mask[..., None]).to(text.device))
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
    text, negative = text[:-1], text[-1:]
    folder.mkdir(exist_ok=True)
    places = []
    for start in range(0, len(text), settings.batch):
        path, part = folder / f"{start:06d}.safetensors", text[start : start + settings.batch]
        if not path.exists():
            generator = torch.Generator("cpu").manual_seed(seed_of(settings.seed, start))
            noise = torch.randn((len(part), *latent_shape), generator=generator).to(part.device)
            with autocast(part.device):
                passed = distill.walk(
                    roles, settings.phases, noise, part, negative.expand_as(part), settings.guidance_scale
                )
            _save({"places": passed.transpose(0, 1).half()}, path, {})
            say(f"walks: {start + len(part)} of {len(text)}")
        with safe_open(path, framework="pt") as file:
            places.append(file.get_tensor("places"))
    return Walks(torch.cat(places), text, negative)


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


class Trainer:
    """The stages of one run, each with its state in a folder of its own; the next one begins where it ended.

    Args:
        recorded: whether a step is a CUDA graph.
    """

    def __init__(
        self, folder: Path, roles: Roles, walks: Walks, settings: Settings, *, recorded: bool, say: Say
    ) -> None:
        self.folder, self.roles, self.walks, self.settings = folder, roles, walks, settings
        self.recorded, self.say = recorded, say
        self.device = walks.text.device
        self.levels = torch.tensor(settings.phases.levels, device=self.device)

    def learn(self, stage: str, updates: int) -> None:
        """Run ``regression`` or ``consistency``; the student ends as its average over the last updates."""
        if not updates:
            return
        drawn = self.regression_batch if stage == "regression" else self.consistency_batch
        loss = self.regression if stage == "regression" else self.consistency
        run = self._student(stage, updates, self.settings.learning_rate)
        step = plain(loss, list(run.parameters.values()))
        step = Recorded(step) if self.recorded else step
        while run.step < updates:
            value, gradients = step(*drawn(run.step))
            norm = run.descend(gradients)
            self._after(stage, run, updates, {"loss": value, "gradient_norm": norm})
        run.deliver()

    def match(self, updates: int) -> None:
        """A short end by distribution matching: five updates of the critic, then one of the student."""
        if not updates:
            return
        run = self._student("matching", updates, self.settings.learning_rate / 10)
        self.roles.play("critic")
        critic = Run(
            self.folder / "critic",
            self.roles.transformer,
            Schedule(5 * updates, run.schedule.learning_rate),
            ema_decay=0.0,
        )
        while run.step < updates:
            while critic.step < 5 * (run.step + 1):
                learned = self._criticism(critic.step)
                critic.update(learned)
            norm = run.update(self._matching(run.step))
            self._after("matching", run, updates, {"critic": learned, "gradient_norm": norm}, critic)
        run.deliver()

    # Batches: all that a step draws follows from (seed, stage, step)

    def regression_batch(self, step: int) -> tuple[Tensor, ...]:
        """Arguments of :func:`distill.regression`: random jumps of random walks."""
        generator = self._generator(1, step)
        index, phase = self._draw(self.walks.count, generator), self._draw(self.settings.steps, generator)
        jump = (phase + torch.tensor([[0], [1]])) * self.settings.phases.stride
        here, there = self.levels[jump.to(self.device)]
        start, end = (self._place(index, phase + ahead) for ahead in (0, 1))
        return start, end, self._text(index), here, there

    def consistency_batch(self, step: int) -> tuple[Tensor, ...]:
        """Arguments of :func:`distill.consistency`; a fifth of the levels are those that a sampler visits."""
        generator = self._generator(2, step)
        stride, batch = self.settings.phases.stride, self.settings.batch
        index, place = self._draw(self.walks.count, generator), self._draw(self.settings.walk, generator)
        visited = torch.rand(batch, generator=generator) < 0.2
        place = torch.where(visited, place // stride * stride, place)
        end = torch.full((batch,), self.settings.steps)
        here, near, edge = self.levels[torch.stack((place, place + 1, (place // stride + 1) * stride)).to(self.device)]
        noise = torch.randn((batch, *self.walks.latent_shape), generator=generator).to(self.device)
        text = self._text(index)
        return self._place(index, end), noise, text, self.walks.negative.expand_as(text), here, near, edge

    def _generator(self, stage: int, step: int) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(seed_of(self.settings.seed + stage, step))

    def _draw(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(count, (self.settings.batch,), generator=generator)

    def _place(self, index: Tensor, edge: Tensor) -> Tensor:
        return self.walks.places[index, edge].to(self.device).float()

    def _text(self, index: Tensor) -> Tensor:
        return self.walks.text[index.to(self.device)]

    # Losses

    def regression(self, *drawn: Tensor) -> Tensor:
        with autocast(self.device):
            return distill.regression(self.roles, *drawn)

    def consistency(self, *drawn: Tensor) -> Tensor:
        with autocast(self.device):
            return distill.consistency(self.roles, *drawn, scale=self.settings.guidance_scale)

    def _criticism(self, step: int) -> Tensor:
        generator = self._generator(4, step)
        with autocast(self.device):
            with torch.no_grad():
                made, text, here, there, noise = self._made(generator)
            return distill.criticism(self.roles, made, noise, text, here, there)

    def _matching(self, step: int) -> Tensor:
        generator = self._generator(5, step)
        with autocast(self.device):
            made, text, here, there, noise = self._made(generator)
            negative = self.walks.negative.expand_as(text)
            return distill.matching(self.roles, made, noise, text, negative, here, there, self.settings.guidance_scale)

    def _made(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """What the student makes of noise up to a random edge, the last jump with gradients; its text, its level, a
        higher level, and noise to get there."""
        batch, edges = self.settings.batch, self.settings.phases.edges
        jumps = int(torch.randint(1, len(edges), (), generator=generator))
        text = self._text(self._draw(self.walks.count, generator))
        noise = torch.randn((2, batch, *self.walks.latent_shape), generator=generator).to(self.device)
        latents = distill.sample(self.roles, "student", edges[:jumps], noise[0], text)
        before, here = next(distill.steps_of(edges[jumps - 1 : jumps + 1], latents))
        made = distill.between(latents, self.roles.flow("student", latents, before, text), before, here)
        share = 0.02 + 0.96 * torch.rand(batch, generator=generator).to(self.device)
        there = here + share * (1 - here)
        return made, text, here, there, noise[1]

    # State

    def _student(self, stage: str, updates: int, learning_rate: float) -> Run:
        """The student's run, its average shared with the transformer's adapter of that name."""
        self.roles.play("student")
        schedule = Schedule(updates, learning_rate, warmup=min(100, updates), hold_until=0.4)
        run = Run(self.folder / stage, self.roles.transformer, schedule, ema_decay=0.95)
        for name, parameter in self.roles.parameters("average").items():
            parameter.data = run.average[name.replace(".average.", ".student.")]
        return run

    def _after(self, stage: str, run: Run, updates: int, values: dict[str, Tensor], *beside: Run) -> None:
        if run.step % LOG_EVERY == 0 or run.step == updates:
            told = {name: value.item() for name, value in values.items()}
            run.log(**told)
            self.say(f"{stage}: {run.step} of {updates}, {', '.join(f'{k} {v:.4g}' for k, v in told.items())}")
        if run.step % SAVE_EVERY == 0 or run.step == updates:
            run.log(gap=self.gap())
            for one in (*beside, run):
                one.save()

    @torch.no_grad()
    def gap(self) -> float:
        """How far the averaged student's clips end from the teacher's, of prompts and noise that it never saw: relative
        to the size of those; nan without any."""
        places, text = (
            self.walks.places[self.walks.count :].to(self.device).float(),
            self.walks.text[self.walks.count :],
        )
        if not len(places):
            return float("nan")
        with autocast(self.device):
            ends = distill.sample(self.roles, "average", self.settings.phases.edges, places[:, 0], text)
        return ((ends - places[:, -1]).norm() / places[:, -1].norm()).item()


# Files


def write_lora(path: Path, roles: Roles, settings: Settings, base: str) -> None:
    """The student as diffusers and peft read it, float16; its header has the base, the settings and the schedule."""
    from peft import get_peft_model_state_dict

    factors = get_peft_model_state_dict(roles.transformer, adapter_name="student")
    adapter = {"r": settings.rank, "lora_alpha": settings.rank, "target_modules": distill.TARGETS}
    header = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in adapter.items()}),
        "swiftwan.base": base,
        "swiftwan.settings": json.dumps(asdict(settings)),
        METADATA_KEY: to_metadata(settings.few_step),
    }
    _save({f"transformer.{name}": factor.half() for name, factor in factors.items()}, path, header)


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".tmp")
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial, metadata=metadata)
        sync(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as problem:
        partial.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {problem}; free room, and run the same command again.") from None
