"""The stages of a distillation: what each draws, what it learns, and its state on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from swiftwan.measure.quality import relative_distance
from swiftwan.train import distill
from swiftwan.train.distill import Roles
from swiftwan.train.distill_settings import Settings
from swiftwan.train.loop import Run, Schedule, seed_of
from swiftwan.train.recorded import Recorded, plain

LOG_EVERY = {"regression": 100, "consistency": 100, "matching": 10}
SAVE_EVERY = {"regression": 400, "consistency": 400, "matching": 50}
"""Updates; one of ``matching`` is as much work as six of the others."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Walks:
    """What the teacher passed on its way, one walk a prompt.

    Attributes:
        places: (N, edges, C, f, h, w) float16, from noise to video; on the host for large models.
        text: (N, S, D) in the text encoder's dtype.
        negative: (1, S, D), what guidance leads away from.
        count: how many are trained on; the others show how far the student ends from the teacher.
    """

    places: Tensor
    text: Tensor
    negative: Tensor
    count: int

    @property
    def latent_shape(self) -> torch.Size:
        return self.places.shape[2:]


@dataclass(frozen=True)
class Clips:
    """What ``consistency`` noises: latents (N, C, f, h, w), and their text (N, S, D)."""

    latents: Tensor
    text: Tensor


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


class Trainer:
    """The stages of one run, each with its state in a folder of its own; the next one begins where it ended.

    Args:
        recorded: whether a step is a CUDA graph.
    """

    def __init__(
        self, folder: Path, roles: Roles, walks: Walks, clips: Clips, settings: Settings, *, recorded: bool, say: Say
    ) -> None:
        self.folder, self.roles, self.walks, self.clips, self.settings = folder, roles, walks, clips, settings
        self.recorded, self.say = recorded, say
        self.device = walks.text.device
        self.own = settings.own
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
        run = self._student("matching", updates, self.settings.learning_rate / 3)
        self.roles.play("critic")
        critic = Run(
            self.folder / "critic",
            self.roles.transformer,
            # Sooner warm than the student, who is to follow what it says.
            Schedule(5 * updates, run.schedule.learning_rate, warmup=min(100, updates)),
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
        index, phase = self._draw(self.walks.count, generator), self._draw(len(self.own), generator) + self.own.start
        jump = (phase + torch.tensor([[0], [1]])) * self.settings.phases.stride
        here, there = self.levels[jump.to(self.device)]
        start, end = (self._place(index, phase + ahead) for ahead in (0, 1))
        return start, end, self._text(index), here, there

    def consistency_batch(self, step: int) -> tuple[Tensor, ...]:
        """Arguments of :func:`distill.consistency`; a fifth of the levels are those that a sampler visits."""
        generator = self._generator(2, step)
        stride, batch = self.settings.phases.stride, self.settings.batch
        index, place = self._draw(len(self.clips.latents), generator), self._draw(len(self.own) * stride, generator)
        place = place + self.own.start * stride
        visited = torch.rand(batch, generator=generator) < 0.2
        place = torch.where(visited, place // stride * stride, place)
        here, near, edge = self.levels[torch.stack((place, place + 1, (place // stride + 1) * stride)).to(self.device)]
        clips = self.clips.latents[index.to(self.clips.latents.device)].to(self.device).float()
        noise, text = self._noise(2, step, 1)[0], self.clips.text[index.to(self.device)]
        return clips, noise, text, self.walks.negative.expand_as(text), here, near, edge

    def _generator(self, stage: int, step: int) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(seed_of(self.settings.seed + stage, step))

    def _noise(self, stage: int, step: int, count: int) -> Tensor:
        """Drawn on the device: five million numbers take a CPU as long as the step."""
        generator = torch.Generator(self.device).manual_seed(seed_of(self.settings.seed + stage, step))
        shape = (count, self.settings.batch, *self.walks.latent_shape)
        return torch.randn(shape, generator=generator, device=self.device)

    def _draw(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(count, (self.settings.batch,), generator=generator)

    def _place(self, index: Tensor, edge: Tensor) -> Tensor:
        where = self.walks.places.device
        return self.walks.places[index.to(where), edge.to(where)].to(self.device).float()

    def _text(self, index: Tensor) -> Tensor:
        return self.walks.text[index.to(self.device)]

    # Losses

    def regression(self, *drawn: Tensor) -> Tensor:
        with autocast(self.device):
            return distill.regression(self.roles, *drawn)

    def consistency(self, *drawn: Tensor) -> Tensor:
        with autocast(self.device):
            return distill.consistency(self.roles, *drawn)

    def _criticism(self, step: int) -> Tensor:
        with autocast(self.device):
            with torch.no_grad():
                made, text, here, there, noise = self._made(4, step)
            return distill.criticism(self.roles, made, noise, text, here, there)

    def _matching(self, step: int) -> Tensor:
        with autocast(self.device):
            made, text, here, there, noise = self._made(5, step)
            negative = self.walks.negative.expand_as(text)
            return distill.matching(self.roles, made, noise, text, negative, here, there)

    def _made(self, stage: int, step: int) -> tuple[Tensor, ...]:
        """What the student makes of noise up to a random edge, the last jump with gradients; its text, its level, a
        higher level, and noise to get there."""
        generator, noise = self._generator(stage, step), self._noise(stage, step, 2)
        batch, edges = self.settings.batch, self.settings.phases.edges[self.own.start : self.own.stop + 1]
        jumps = int(torch.randint(1, len(edges), (), generator=generator))
        index = self._draw(self.walks.count, generator)
        text = self._text(index)
        # The high-noise expert's part is the teacher's; all others begin with noise.
        begins = noise[0] if not self.own.start else self._place(index, torch.full_like(index, self.own.start))
        latents = distill.sample(self.roles, "student", edges[:jumps], begins, text)
        before, here = next(distill.steps_of(edges[jumps - 1 : jumps + 1], latents))
        made = distill.between(latents, self.roles.flow("student", latents, before, text), before, here)
        share = 0.02 + 0.96 * torch.rand(batch, generator=generator).to(self.device)
        there = here + share * (1 - here)
        return made, text, here, there, noise[1]

    # State

    def _student(self, stage: str, updates: int, learning_rate: float) -> Run:
        """The student's run, its average shared with the transformer's adapter of that name."""
        self.roles.play("student")
        # A short stage must be warm long before it ends: 60 updates that warmed up for 60 changed next to nothing.
        schedule = Schedule(updates, learning_rate, warmup=min(100, 1 + updates // 5), hold_until=0.4)
        run = Run(self.folder / stage, self.roles.transformer, schedule, ema_decay=0.95)
        for name, parameter in self.roles.parameters("average").items():
            parameter.data = run.average[name.replace(".average.", ".student.")]
        return run

    def _after(self, stage: str, run: Run, updates: int, values: dict[str, Tensor], *beside: Run) -> None:
        if run.step % LOG_EVERY[stage] == 0 or run.step == updates:
            told = {name: value.item() for name, value in values.items()}
            run.log(**told)
            self.say(f"{stage}: {run.step} of {updates}, {', '.join(f'{k} {v:.4g}' for k, v in told.items())}")
        if run.step % SAVE_EVERY[stage] == 0 or run.step == updates:
            run.log(gap=self.gap())
            for one in (*beside, run):
                one.save()

    @torch.no_grad()
    def gap(self) -> float:
        """How far the averaged student ends from the teacher, over all its phases, for prompts and noise that it never
        saw: relative to the size of what the teacher made; nan without any."""
        places, text = (
            self.walks.places[self.walks.count :].to(self.device).float(),
            self.walks.text[self.walks.count :],
        )
        if not len(places):
            return float("nan")
        with autocast(self.device):
            edges = self.settings.phases.edges[self.own.start : self.own.stop + 1]
            ends = distill.sample(self.roles, "average", edges, places[:, self.own.start], text)
        return relative_distance(ends, places[:, self.own.stop])
