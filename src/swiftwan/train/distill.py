"""Few-step students: a LoRA that jumps where its teacher walks.

The noise levels from 1 to 0 are cut into as many phases as the student has steps. Wherever it is in a phase, its
flow points straight at the place where its teacher, guided, will be at the phase's end; so a sampler takes one
Euler step a phase, and no guidance. Three losses teach it, with one set of frozen weights between them:

1. ``regression`` on walks: the teacher goes from noise to a video, once for each prompt, and the student learns to
   jump from where each phase began to where it ended.
2. ``consistency`` (multi-phase: arXiv 2405.18407, 2506.03123): from any level the teacher takes one small step and
   the student, averaged over time, jumps on from there; the student should have jumped there at once.
3. ``matching`` (DMD2, arXiv 2405.14867; within a phase as in arXiv 2510.27684): what the student jumps to is noised,
   and teacher and critic, who learns what the student makes, say which way it is more like the teacher's.

Shapes: B clips; latents (B, C, f, h, w); text (B, S, D), zero behind each prompt's end; noise levels (B,) in [0, 1].
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from swiftwan.models.dit import WanTransformer
from swiftwan.sampling import warped

Role = Literal["teacher", "student", "average", "critic"]
ROLES: tuple[Role, ...] = ("teacher", "student", "average", "critic")
TARGETS = (
    r"blocks\.\d+\.(attn[12]\.to_[qkv]|attn[12]\.to_out\.0|ffn\.net\.(0\.proj|2))|proj_out|"
    r"condition_embedder\.(time_embedder\.linear_[12]|time_proj)"
)
"""Every linear but those of the text, which all steps share."""


@dataclass(frozen=True)
class Phases:
    """The noise levels between which a student jumps, and the smaller ones by which its teacher walks.

    Attributes:
        levels: of the walk, falling from 1 to 0.
        stride: so many of the walk's steps are one jump.
    """

    levels: tuple[float, ...]
    stride: int

    @classmethod
    def of(cls, steps: int, flow_shift: float, walk: int) -> Phases:
        """``walk`` steps of the teacher, a multiple of the student's, along the shifted schedule."""
        return cls(tuple(warped(1 - step / walk, flow_shift) for step in range(walk + 1)), walk // steps)

    @property
    def edges(self) -> tuple[float, ...]:
        return self.levels[:: self.stride]


@dataclass(frozen=True)
class Expert:
    """The other transformer of a two-expert model: a teacher at its own levels, ``low`` and up to below ``high``."""

    transformer: WanTransformer
    low: float
    high: float
    guidance_scale: float

    def teaches(self, level: Tensor) -> Tensor:
        """At which of the levels (B,) it does; booleans."""
        return (level >= self.low) & (level < self.high)


class Roles:
    """One frozen transformer that plays every part: the teacher as it is, the others each through a LoRA.

    Args:
        transformer: gets the adapters; its own weights are frozen.
        guidance_scale: of the teacher.
        rank: of each adapter.
        seed: of the adapters' first values, which change nothing yet.
        beside: who teaches where the transformer itself does not.
    """

    def __init__(
        self,
        transformer: WanTransformer,
        *,
        guidance_scale: float,
        rank: int,
        seed: int,
        beside: Expert | None = None,
    ) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        self.guidance_scale, self.beside = guidance_scale, beside
        self.transformer = transformer.requires_grad_(False)
        self.config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)
        device = transformer.patch_embedding.weight.device
        roles = ROLES[1:]
        for role in roles:
            with torch.random.fork_rng([device] if device.type == "cuda" else []), warnings.catch_warnings():
                # peft warns of a second adapter on one model, which is what we are here for.
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                torch.manual_seed(seed)
                inject_adapter_in_model(self.config, transformer, adapter_name=role)
        for role in roles:
            for parameter in self.parameters(role).values():
                parameter.data = parameter.data.float()
        self.layers = [module for module in transformer.modules() if isinstance(module, LoraLayer)]

    def play(self, role: Role) -> None:
        """From now on, the transformer is this one; only its adapter takes gradients."""
        for layer in self.layers:
            layer.enable_adapters(role != "teacher")
            if role != "teacher":
                layer.set_adapter(role)

    def parameters(self, role: Role) -> dict[str, torch.nn.Parameter]:
        """A role's adapter, by the names that the transformer has for it."""
        return {name: p for name, p in self.transformer.named_parameters() if f".{role}." in name}

    def flow(self, role: Role, latents: Tensor, level: Tensor, text: Tensor) -> Tensor:
        """The flow that a role predicts, float32."""
        self.play(role)
        if role == "teacher" and self.beside is not None:
            return self._by_expert(self.beside, latents, level, text)
        return predicted(self.transformer, latents, level, text)

    def _by_expert(self, beside: Expert, latents: Tensor, level: Tensor, text: Tensor) -> Tensor:
        """Each clip's flow by the expert of its level."""
        flow = torch.empty_like(latents, dtype=torch.float32)
        others = beside.teaches(level)
        for transformer, clips in ((self.transformer, ~others), (beside.transformer, others)):
            if clips.any():
                flow[clips] = predicted(transformer, latents[clips], level[clips], text[clips])
        return flow

    def guided(self, latents: Tensor, level: Tensor, text: Tensor, negative: Tensor) -> Tensor:
        """The teacher's flow with guidance, both predictions in one pass."""
        scale = torch.full_like(level, self.guidance_scale)
        if self.beside is not None:
            scale = torch.where(self.beside.teaches(level), self.beside.guidance_scale, scale)
        latents, level = torch.cat((latents, latents)), torch.cat((level, level))
        with_text, without = self.flow("teacher", latents, level, torch.cat((text, negative))).chunk(2)
        return without + like(scale, without) * (with_text - without)


def predicted(transformer: WanTransformer, latents: Tensor, level: Tensor, text: Tensor) -> Tensor:
    """A transformer's flow, float32."""
    flow: Tensor = transformer(latents, 1000 * level, transformer.condition(text, latents.shape))
    return flow.float()


# Where roles lead


def between(start: Tensor, flow: Tensor, here: Tensor, there: Tensor) -> Tensor:
    """Where a straight line along ``flow`` from the level ``here`` is at the level ``there``."""
    return start + like(there - here, start) * flow


@torch.no_grad()
def walk(roles: Roles, phases: Phases, noise: Tensor, text: Tensor, negative: Tensor) -> Tensor:
    """The guided teacher's way from noise to a video: where it is at each edge, (edges, B, C, f, h, w)."""
    places, latents = [noise], noise
    for number, (here, there) in enumerate(steps_of(phases.levels, noise), 1):
        latents = between(latents, roles.guided(latents, here, text, negative), here, there)
        if number % phases.stride == 0:
            places.append(latents)
    return torch.stack(places)


@torch.no_grad()
def sample(roles: Roles, role: Role, edges: Sequence[float], noise: Tensor, text: Tensor) -> Tensor:
    """What a sampler does with a few-step model: a jump from edge to edge. Latents at the last one."""
    latents = noise
    for here, there in steps_of(edges, noise):
        latents = between(latents, roles.flow(role, latents, here, text), here, there)
    return latents


def steps_of(levels: Sequence[float], latents: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of neighbouring levels, each for all clips of a batch."""
    for pair in pairwise(levels):
        here, there = (latents.new_full((len(latents),), level, dtype=torch.float32) for level in pair)
        yield here, there


# Losses


def regression(roles: Roles, start: Tensor, end: Tensor, text: Tensor, here: Tensor, there: Tensor) -> Tensor:
    """How far the student's flow at ``start`` is from pointing at ``end``; scalar."""
    wanted = (end - start) / like(there - here, start)
    return distance(roles.flow("student", start, here, text) - wanted)


def consistency(
    roles: Roles,
    clips: Tensor,
    noise: Tensor,
    text: Tensor,
    negative: Tensor,
    here: Tensor,
    near: Tensor,
    edge: Tensor,
) -> Tensor:
    """How far the student is from where one step of the teacher, and its own average from there, lead; scalar.

    Args:
        here, near, edge: falling levels: of the clip, of the teacher's step, of the phase's end.
    """
    noisy = torch.lerp(clips, noise, like(here, clips))
    with torch.no_grad():
        stepped = between(noisy, roles.guided(noisy, here, text, negative), here, near)
        end = between(stepped, roles.flow("average", stepped, near, text), near, edge)
    return regression(roles, noisy, end, text, here, edge)


def distance(error: Tensor) -> Tensor:
    """Mean over clips of the root mean square, rounded off below a hundredth (pseudo-Huber, arXiv 2310.14189)."""
    squares = error.flatten(1).square().mean(1)
    return ((squares + 1e-4).sqrt() - 1e-2).mean()


def noised(clips: Tensor, noise: Tensor, here: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Carry clips from a lower level of noise to a higher one; returns them, and the flow to learn there.

    From data, ``here`` 0, the flow is ``noise - clips``. From a noised clip its parts are not known any more; but
    ``(there noise / added - noisy) / (1 - there)``, with the share of noise ``added``, has the same mean at each place,
    by the score of what was added (arXiv 2510.27684, section 3).
    """
    keep = (1 - there) / (1 - here)
    added = (there.square() - (keep * here).square()).sqrt()
    noisy = like(keep, clips) * clips + like(added, clips) * noise
    return noisy, (like(there / added, clips) * noise - noisy) / like(1 - there, clips)


def matching(
    roles: Roles, made: Tensor, noise: Tensor, text: Tensor, negative: Tensor, here: Tensor, there: Tensor
) -> Tensor:
    """A loss whose gradient moves what the student made towards the teacher's distribution; scalar.

    Args:
        made: latents at the level ``here``, with the student's graph behind them.
        there: higher levels, at which critic and teacher look.
    """
    with torch.no_grad():
        noisy, flow = noised(made, noise, here, there)
        real = roles.guided(noisy, there, text, negative)
        away = like(there, made) * (real - roles.flow("critic", noisy, there, text))
        size = (like(there, made) * (real - flow)).abs().flatten(1).mean(1)
    roles.play("student")  # whose gradients are to be taken
    return 0.5 * (made - (made - away / like(size, made)).detach()).square().mean()


def criticism(roles: Roles, made: Tensor, noise: Tensor, text: Tensor, here: Tensor, there: Tensor) -> Tensor:
    """How far the critic is from the flow of what the student made; scalar."""
    noisy, flow = noised(made, noise, here, there)
    # The flow's noise grows without bound towards either end; so weighted it is of size one.
    keep = (1 - there) / (1 - here)
    added = (there.square() - (keep * here).square()).sqrt()
    weight = like((1 - there) * added / there, made)
    return (weight * (roles.flow("critic", noisy, there, text) - flow)).square().mean()


def like(values: Tensor, latents: Tensor) -> Tensor:
    """(B,) to (B, 1, 1, 1, 1)."""
    return values.view(-1, *[1] * (latents.ndim - 1))
