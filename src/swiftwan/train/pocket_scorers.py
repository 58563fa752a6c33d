"""Train the pocket world's scorers (``pocket/scorers.py``): pictures and words by contrast, distances by order.

    swiftwan train pocket-scorers --out runs/scorers

A frame must lie nearer to its own prompt than to those of the batch and to prompts with one word changed or two words
traded (arXiv 2103.00020, with hard negatives). Distances learn from pairs whose order is known: of two distortions
of one kind the stronger one is farther, and a changed word is farther than a mild distortion. Only the weights of
the distance learn from these, so what is compared stays what recognition needs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftwan.pocket.scenes import BACKGROUNDS, COLOURS, RADII, SHAPES, Scene, sample_scenes
from swiftwan.pocket.scorers import PocketScorers, words_of
from swiftwan.pocket.world import draw
from swiftwan.train.loop import Run, Schedule, seed_of

MOMENTS = 3
"""Frames kept of each clip."""
WRONG = 8
"""Wrong prompts kept of each scene; a step looks at half of them."""
GROUP = 16
"""Pictures of a step that are distorted in one way."""
GROUPS = 4
MILD = 0.25
"""A distortion up to this degree is less than a changed word."""
LOG_EVERY = 50
SAVE_EVERY = 1000

# Wrong prompts

CHANGES = ("colour", "shape", "size", "background", "traded")


def changed(scene: Scene, what: str, chance: random.Random) -> Scene | None:
    """The scene with one word changed, or two things' words traded; None where that is no change that a frame shows."""
    index = chance.randrange(len(scene.things))
    thing = scene.things[index]
    match what:
        case "background":
            return replace(scene, background=_other(BACKGROUNDS, scene.background, chance))
        case "traded":
            if len(scene.things) < 2 or scene.things[0].shape == scene.things[1].shape:
                return None
            one, two = scene.things
            return replace(scene, things=(replace(one, shape=two.shape), replace(two, shape=one.shape)))
        case "colour":
            taken = {thing.colour for thing in scene.things}
            new = replace(thing, colour=chance.choice([word for word in COLOURS if word not in taken]))
        case "shape":
            new = replace(thing, shape=_other(SHAPES, thing.shape, chance))
        case _:
            if thing.motion in ("grows", "shrinks"):
                return None
            new = replace(thing, size=_other(RADII, thing.size, chance))
    things = list(scene.things)
    things[index] = new
    return replace(scene, things=tuple(things))


def _other(words: object, word: str, chance: random.Random) -> str:
    return chance.choice([each for each in words if each != word])  # type: ignore[attr-defined]


def wrong_scenes(scene: Scene, count: int, chance: random.Random) -> list[Scene]:
    """So many changes of a scene, of all kinds that apply to it."""
    found: list[Scene] = []
    while len(found) < count:
        if (other := changed(scene, chance.choice(CHANGES), chance)) is not None:
            found.append(other)
    return found


# Distortions


def blurred(pictures: Tensor, sigma: float) -> Tensor:
    """By a Gaussian of so many pixels."""
    reach = max(1, math.ceil(3 * sigma))
    at = torch.arange(-reach, reach + 1, device=pictures.device, dtype=pictures.dtype)
    line = torch.exp(-at.square() / (2 * sigma**2))
    line = (line / line.sum()).view(1, 1, 1, -1).expand(3, 1, 1, -1)
    padded = F.pad(pictures, (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, line, groups=3), line.transpose(2, 3), groups=3)


def _noisy(x: Tensor, degree: float, generator: torch.Generator) -> Tensor:
    return x + 0.4 * degree * torch.randn(x.shape, generator=generator, device=x.device)


def _shifted(x: Tensor, degree: float, generator: torch.Generator) -> Tensor:
    angle = 2 * math.pi * torch.rand((), generator=generator, device=x.device).item()
    move = torch.tensor([[1, 0, math.cos(angle)], [0, 1, math.sin(angle)]], device=x.device)
    move[:, 2] *= 2 * degree * 10 / 128  # up to 10 of 128 pixels; the grid's own unit is half a picture
    grid = F.affine_grid(move.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _tinted(x: Tensor, degree: float, generator: torch.Generator) -> Tensor:
    tint = torch.randn(1, 3, 1, 1, generator=generator, device=x.device)
    return x + 0.6 * degree * tint / tint.norm()


def _coarse(x: Tensor, degree: float, generator: torch.Generator) -> Tensor:
    size = [round(side / (1 + 7 * degree)) for side in x.shape[2:]]
    small = F.interpolate(x, size, mode="bilinear", antialias=True)
    return F.interpolate(small, x.shape[2:], mode="bilinear")


DISTORTIONS: dict[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "blur": lambda x, degree, _: blurred(x, 0.3 + 4 * degree),
    "noise": _noisy,
    "shift": _shifted,
    "fade": lambda x, degree, _: x + degree * (x.mean((2, 3), keepdim=True) - x),
    "tint": _tinted,
    "coarse": _coarse,
}
"""What can happen to a picture, to a degree from 0 (nothing) to 1."""


# Data


@dataclass(frozen=True)
class Pool:
    """Scenes, drawn once, on the device.

    Attributes:
        pictures: uint8 (N, MOMENTS, 3, 128, 128); ``others`` the same with one word of each scene changed.
        words: (N, words of a prompt); ``wrong`` (N, WRONG, words) has its changes.
        look: (N,) equal where a frame of both scenes may look the same.
    """

    pictures: Tensor
    others: Tensor
    words: Tensor
    wrong: Tensor
    look: Tensor


def make_pool(clips: int, seed: int, device: torch.device, *, batch: int = 64) -> Pool:
    """Draw training scenes and their changes; a change is drawn at the same place and time as its scene."""
    scenes = sample_scenes(clips, seed)
    chance = random.Random(f"scorers {seed}")
    wrong = [wrong_scenes(scene, WRONG, chance) for scene in scenes]
    looks: dict[str, int] = {}
    pictures = torch.empty(2, clips, MOMENTS, 3, 128, 128, dtype=torch.uint8, device=device)
    for kind, those in enumerate((scenes, [some[0] for some in wrong])):
        for at in range(0, clips, batch):
            drawn = draw(those[at : at + batch], seed_of(seed, at), num_frames=MOMENTS, device=device)
            pictures[kind, at : at + batch] = ((drawn + 1) * 127.5).round().transpose(1, 2).to(torch.uint8)
    return Pool(
        pictures=pictures[0],
        others=pictures[1],
        words=words_of(scenes).to(device),
        wrong=torch.stack([words_of(some) for some in wrong]).to(device),
        look=torch.tensor([looks.setdefault(_look(scene), len(looks)) for scene in scenes], device=device),
    )


def _look(scene: Scene) -> str:
    things = sorted(f"{thing.size} {thing.colour} {thing.shape}" for thing in scene.things)
    return " ".join((*things, scene.background))


# Training


def train(
    folder: Path,
    pool: Pool,
    *,
    steps: int,
    batch: int,
    device: torch.device,
    seed: int,
    learning_rate: float,
    stop_at: int | None = None,
) -> PocketScorers:
    """Train, or go on training, to ``stop_at`` or the schedule's end; return the averaged weights, their unit set."""
    torch.manual_seed(seed)
    model = PocketScorers().to(device)
    run = Run(folder, model, Schedule(steps, learning_rate, warmup=200), ema_decay=0.998)
    on_gpu = device.type == "cuda"
    last = min(steps, stop_at or steps)
    while run.step < last:
        generator = torch.Generator(device).manual_seed(seed_of(seed, run.step))
        chance = random.Random(seed_of(seed, run.step))
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            matched, right = contrast(model, pool, batch, generator, chance)
            ordered, told = order(model, pool, generator, chance)
        norm = run.update(matched + ordered)
        if run.step % LOG_EVERY == 0:
            run.log(
                contrast=matched.item(),
                right=right.item(),
                order=ordered.item(),
                ordered=told.item(),
                gradient_norm=norm.item(),
            )
        if run.step % SAVE_EVERY == 0 or run.step == last:
            run.save()
    run.deliver()
    return in_units(model.eval(), pool)


def contrast(
    model: PocketScorers, pool: Pool, batch: int, generator: torch.Generator, chance: random.Random
) -> tuple[Tensor, Tensor]:
    """The contrastive loss of a batch, and the share of frames nearest to their own prompt."""
    device = pool.words.device
    chosen = torch.randint(len(pool.words), (batch,), generator=generator, device=device)
    moment = torch.randint(MOMENTS, (batch,), generator=generator, device=device)
    pictures = seen(pool.pictures[chosen, moment], generator, chance)
    some = torch.randperm(WRONG, generator=generator, device=device)[: WRONG // 2]
    pictures = model.embed_pictures(pictures).float()
    texts = model.embed_texts(pool.words[chosen]).float()
    wrong = model.embed_texts(pool.wrong[chosen][:, some].flatten(0, 1)).float().unflatten(0, (batch, -1))
    sharp = model.log_sharpness.clamp(max=4.6).exp()
    own = torch.eye(batch, dtype=torch.bool, device=device)
    look = pool.look[chosen]
    # Another scene of the batch that looks the same is no wrong answer.
    near = (sharp * pictures @ texts.T).masked_fill((look[:, None] == look) & ~own, -1e4)
    hard = sharp * torch.einsum("nd,nwd->nw", pictures, wrong)
    target = torch.arange(batch, device=device)
    answers = torch.cat((near, hard), dim=1)
    loss = F.cross_entropy(answers, target) + 0.5 * F.cross_entropy(near.T, target)
    return loss, (answers.argmax(1) == target).float().mean()


def seen(pictures: Tensor, generator: torch.Generator, chance: random.Random) -> Tensor:
    """Pictures (N, 3, H, W) uint8 as a generator may paint them: soft, noisy, a little off in tone."""
    x = pictures.float() / 127.5 - 1
    if chance.random() < 0.7:
        x = blurred(x, chance.uniform(0.3, 1.6))
    tone = 0.05 * torch.randn(len(x), 3, 1, 1, generator=generator, device=x.device)
    level = 0.1 * torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device)
    return x + tone + level * torch.randn(x.shape, generator=generator, device=x.device)


def order(model: PocketScorers, pool: Pool, generator: torch.Generator, chance: random.Random) -> tuple[Tensor, Tensor]:
    """The loss of distances in the wrong order, and the share in the right one."""
    device = pool.words.device
    chosen = torch.randint(len(pool.words), (GROUP * GROUPS,), generator=generator, device=device)
    moment = torch.randint(MOMENTS, chosen.shape, generator=generator, device=device)
    clean = pool.pictures[chosen, moment].float() / 127.5 - 1
    other = pool.others[chosen, moment].float() / 127.5 - 1
    weak, strong, mild = [], [], []
    for group in clean.split(GROUP):
        distort = DISTORTIONS[chance.choice(list(DISTORTIONS))]
        low = chance.uniform(0.02, 0.8)
        weak.append(distort(group, low, generator))
        strong.append(distort(group, chance.uniform(low + 0.1, 1.0), generator))
        mild.append(DISTORTIONS[chance.choice(list(DISTORTIONS))](group, MILD * chance.random(), generator))
    with torch.no_grad():
        together = torch.cat((clean, *weak, *strong, *mild, other))
        features = [each.chunk(5) for each in model.features(together)]
    x, less, more, mildly, word = ([each[i] for each in features] for i in range(5))
    with torch.autocast(device.type, enabled=False):
        near = torch.cat((model.distances(x, less), model.distances(x, mildly)))
        far = torch.cat((model.distances(x, more), model.distances(x, word)))
        behind = (near + 1e-6).log() - (far + 1e-6).log()
    return F.softplus(4 * (behind + 0.1)).mean(), (behind < 0).float().mean()


@torch.no_grad()
def in_units(model: PocketScorers, pool: Pool, *, pairs: int = 256) -> PocketScorers:
    """Scale the distance so that frames of two unrelated scenes are 1 apart on average."""
    pairs = min(pairs, len(pool.words) // 2)
    first, others = pool.pictures[:pairs, 0], pool.pictures[pairs : 2 * pairs, 0]
    apart = [
        model.distances(model.features(x.float() / 127.5 - 1), model.features(y.float() / 127.5 - 1))
        for x, y in zip(first.split(GROUP), others.split(GROUP), strict=True)
    ]
    mean = torch.cat(apart).mean()
    for weight in model.weights:
        weight.div_(mean.sqrt())
    return model
