"""Few-step students: a LoRA that jumps where its teacher walks.

Multi-phase consistency distillation (arXiv 2405.18407, 2506.03123) in flow form, with guidance folded in. The
noise levels from 1 to 0 are cut into as many phases as the student has steps. From any level of a phase the
student's flow points straight at where the guided teacher would be at the phase's end; so a sampler takes one step
a phase, without guidance. Three losses teach it, each from the same frozen weights (see :class:`Roles`):

1. ``regression``: the teacher walks, once, from noise to a video for each of a few thousand prompts; the student learns
   to jump from where each phase began to where it ended.
2. ``consistency``: from a noised clip the teacher makes one small step, and the student, averaged over time,
   jumps on from there; that is where the student should have jumped to at once.
3. ``matching`` (DMD2, arXiv 2405.14867, optional, short): what the student samples, noised, is denoised by the teacher and by
   a critic that learns the student's samples; their difference says which way the samples should go.

Shapes: B clips; latents (B, C, f, h, w); text (B, S, D), zero behind each prompt's end; noise levels (B,) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from swiftwan.models.dit import WanTransformer

Role = Literal["teacher", "student", "average", "critic"]
ADAPTERS: tuple[Role, ...] = ("student", "average", "critic")
TARGETS = (
    r"blocks\..*\.(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2)|.*time_embedder\.linear_[12]|.*time_proj|proj_out"
)
"""Each linear but those of the text and image embedders, which all steps share."""


@dataclass(frozen=True)
class Phases:
    """The noise levels between which a student jumps, and the smaller ones by which its teacher walks.

    Attributes:
        steps: how many jumps.
        levels: falling from 1 to 0; each ``len(levels) // steps``-th is a jump's end.
    """

    steps: int
    levels: tuple[float, ...]

    @classmethod
    def make(cls, steps: int, shift: float, walk: int) -> Phases:
        """``walk`` teacher steps, a multiple of ``steps``, along ``shift * u / (1 + (shift - 1) * u)``."""
        even = [1 - i / walk for i in range(walk + 1)]
        return cls(steps, tuple(shift * u / (1 + (shift - 1) * u) for u in even))

    @property
    def stride(self) -> int:
        return (len(self.levels) - 1) // self.steps

    @property
    def edges(self) -> tuple[float, ...]:
        return self.levels[:: self.stride]


class Roles:
    """One frozen transformer that plays every part: teacher as it is, the others through a LoRA each.

    Args:
        transformer: frozen here; gets an adapter for the student, for the student's average over time and, with
            ``critic``, for the critic.
    """

    def __init__(self, transformer: WanTransformer, *, rank: int, seed: int, critic: bool = False) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        torch.manual_seed(seed)
        self.transformer = transformer.requires_grad_(False)
        for role in ADAPTERS if critic else ADAPTERS[:2]:
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=True)
            inject_adapter_in_model(config, transformer, adapter_name=role)
        self.layers = [module for module in transformer.modules() if isinstance(module, LoraLayer)]

    def play(self, role: Role) -> None:
        for layer in self.layers:
            layer.enable_adapters(role != "teacher")
            if role != "teacher":
                layer.set_adapter(role)

    def flow(self, role: Role, latents: Tensor, level: Tensor, text: Tensor) -> Tensor:
        """The flow that a role predicts, float32."""
        self.play(role)
        condition = self.transformer.condition(text, latents.shape)
        flow: Tensor = self.transformer(latents, 1000 * level, condition).float()
        return flow

    def guided(self, latents: Tensor, level: Tensor, text: Tensor, negative: Tensor, scale: float) -> Tensor:
        """The teacher's flow with classifier-free guidance; both predictions in one pass."""
        latents, level = torch.cat((latents, latents)), torch.cat((level, level))
        with_text, without = self.flow("teacher", latents, level, torch.cat((text, negative))).chunk(2)
        return without + scale * (with_text - without)

    def parameters(self, role: Role) -> dict[str, Tensor]:
        """A role's adapter, by name."""
        return {name: p for name, p in self.transformer.named_parameters() if f".{role}." in name}


def between(start: Tensor, flow: Tensor, here: Tensor, there: Tensor) -> Tensor:
    """Where a straight line along ``flow`` is at the level ``there``."""
    return start + _as(there - here, start) * flow


def distance(error: Tensor) -> Tensor:
    """Pseudo-Huber (arXiv 2310.14189) of each clip's root mean square: linear beyond a hundredth."""
    squares = error.flatten(1).square().mean(1)
    return ((squares + 1e-4).sqrt() - 1e-2).mean()


def regression(roles: Roles, start: Tensor, end: Tensor, text: Tensor, here: Tensor, there: Tensor) -> Tensor:
    """How far the student's flow is from the straight line between two places of the teacher's walk."""
    wanted = (end - start) / _as(there - here, start)
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
    scale: float,
) -> Tensor:
    """How far the student's flow is from where one teacher step, and the averaged student from there, lead.

    Args:
        here, near, edge: falling levels: of the clip, one teacher step on, and of the phase's end.
    """
    noisy = torch.lerp(clips, noise, _as(here, clips))
    with torch.no_grad():
        stepped = between(noisy, roles.guided(noisy, here, text, negative, scale), here, near)
        end = between(stepped, roles.flow("average", stepped, near, text), near, edge)
    return regression(roles, noisy, end, text, here, edge)


@torch.no_grad()
def walk(roles: Roles, phases: Phases, noise: Tensor, text: Tensor, negative: Tensor, scale: float) -> Tensor:
    """The guided teacher's way from noise: latents at each edge, (steps + 1, B, C, f, h, w)."""
    places, latents = [noise], noise
    for number, (here, there) in enumerate(zip(phases.levels, phases.levels[1:], strict=False), 1):
        here_, there_ = (noise.new_full((len(noise),), level) for level in (here, there))
        latents = between(latents, roles.guided(latents, here_, text, negative, scale), here_, there_)
        if number % phases.stride == 0:
            places.append(latents)
    return torch.stack(places)


@torch.no_grad()
def sample(roles: Roles, role: Role, edges: Sequence[float], noise: Tensor, text: Tensor) -> Tensor:
    """One jump a phase, from noise to latents."""
    latents = noise
    for here, there in zip(edges, edges[1:], strict=False):
        here_, there_ = (noise.new_full((len(noise),), level) for level in (here, there))
        latents = between(latents, roles.flow(role, latents, here_, text), here_, there_)
    return latents


def _as(values: Tensor, latents: Tensor) -> Tensor:
    return values.view(-1, *[1] * (latents.ndim - 1))
