"""Teach the pocket model's text encoder which words belong together, before the transformer learns to read it.

    swiftwan train pocket-text --out runs/text

T5 knows the order of words only by a bias on its attention scores. That begins near zero and moves by at most the
learning rate a step, so an encoder trained together with the transformer stayed a bag of words: after 14,000 steps,
trading the shapes of two things in a prompt moved no word's embedding by more than 2 % (LOG.md). So here each word
of a prompt has to name its thing's other words, and the biases learn thirty times as fast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftwan.pocket.scenes import BACKGROUNDS, COLOURS, MOTIONS, RADII, SHAPES, Scene, sample_scenes
from swiftwan.train.pocket_dit import Pocket, tokenize
from swiftwan.train.pocket_tokenizer import build

BIAS_RATE = 30
NOISE = 0.3
"""Of the embeddings' own deviation, added in training: what is told apart must lie well apart."""
WORDS = tuple(tuple(words) for words in (RADII, COLOURS, SHAPES, MOTIONS, BACKGROUNDS))
EXAMPLES = 40_000
LOG_EVERY = 50


def labels(scene: Scene) -> list[list[int]]:
    """For each token of the scene's prompt, its end included: size, colour, shape and motion of the thing it is
    part of (-100: none) and the background, as indices into WORDS. A word is a token."""
    background = WORDS[-1].index(scene.background)
    rows: list[list[int]] = []
    for thing in scene.things:
        words = (thing.size, thing.colour, thing.shape, thing.motion)
        own = [known.index(word) for known, word in zip(WORDS, words, strict=False)]
        joined_by = 1 if rows else 0  # the "and" before a second thing
        rows += [[*own, background]] * (len(thing.phrase.split()) + joined_by)
    return rows + [[-100] * 4 + [background]] * (len(f"over a {scene.background} background".split()) + 1)


class Reader(nn.Module):
    """One linear layer that reads a word's thing off its embedding; thrown away after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read = nn.Linear(width, sum(map(len, WORDS)))

    def forward(self, embeddings: Tensor) -> Sequence[Tensor]:
        """(B, S, D) to one tensor (B, S, words) for each kind of word."""
        return self.read(embeddings).split([len(words) for words in WORDS], dim=-1)


def examples(count: int, seed: int, tokenizer, split: str = "train") -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """Token ids (count, S) and labels (count, S, 5) of random scenes, three in four with two things."""
    pool = sample_scenes(4 * count, seed, split)
    pairs = [scene for scene in pool if len(scene.things) == 2][: 3 * count // 4]
    scenes = pairs + [scene for scene in pool if len(scene.things) == 1][: count - len(pairs)]
    tokens = tokenize([scene.prompt for scene in scenes], tokenizer)
    targets = torch.full((*tokens.shape, len(WORDS)), -100)
    for row, scene in zip(targets, scenes, strict=True):
        own = torch.tensor(labels(scene))
        row[: len(own)] = own
    return tokens, targets


def train(
    model: Pocket, *, steps: int, batch: int, seed: int, learning_rate: float, device: torch.device
) -> list[dict[str, float]]:
    """Train the text encoder of ``model`` in place; returns the log."""
    torch.manual_seed(seed)
    tokenizer = build()
    reader = Reader(model.text.config.d_model).to(device)
    biases = [p for name, p in model.text.named_parameters() if "relative_attention_bias" in name]
    others = [p for name, p in model.text.named_parameters() if "relative_attention_bias" not in name]
    rates = [learning_rate, BIAS_RATE * learning_rate]
    members = ([*others, *reader.parameters()], biases)
    groups = [{"params": each, "lr": rate} for each, rate in zip(members, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)
    fall = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.1, cycle_momentum=False)
    every = [part.to(device) for part in examples(EXAMPLES, seed, tokenizer)]
    log: list[dict[str, float]] = []
    for step in range(steps):
        chosen = torch.randint(EXAMPLES, (batch,), generator=torch.Generator(device).manual_seed(step), device=device)
        tokens, targets = (part[chosen] for part in every)
        embeddings = model.embed(tokens)
        noisy = embeddings + NOISE * embeddings.detach().std() * torch.randn_like(embeddings)
        answers = reader(noisy)
        loss = torch.stack([F.cross_entropy(a.flatten(0, 1), targets[..., i].flatten()) for i, a in enumerate(answers)])
        loss.sum().backward()
        nn.utils.clip_grad_norm_(model.text.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        fall.step()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            log.append({"step": step + 1, "loss": round(loss.sum().item(), 4), **right(answers, targets)})
    return log


def right(answers: Sequence[Tensor], targets: Tensor) -> dict[str, float]:
    """Share of words whose size, colour, shape, motion and background was told, each."""
    asked = targets != -100
    hits = (torch.stack([answer.argmax(-1) for answer in answers], dim=-1) == targets) & asked
    shares = hits.sum((0, 1)) / asked.sum((0, 1))
    return dict(zip(("size", "colour", "shape", "motion", "background"), shares.tolist(), strict=True))


@torch.no_grad()
def binding(model: Pocket, *, count: int = 64, seed: int = 5) -> float:
    """How far the embedding of a thing's colour moves, relative to its length, when two things trade their shapes
    and motions: 0 for a bag of words. Mean over ``count`` held-out scenes of two things."""
    tokenizer = build()
    device = next(model.parameters()).device
    moved: list[float] = []
    for scene in sample_scenes(8 * count, seed, "held-out"):
        if len(scene.things) == 2 and len(moved) < count:
            one, two = scene.things
            traded = Scene(
                (
                    type(one)(one.colour, two.shape, two.motion, one.size),
                    type(two)(two.colour, one.shape, one.motion, two.size),
                ),
                scene.background,
            )
            tokens = tokenize([scene.prompt, traded.prompt], tokenizer).to(device)
            before, after = model.embed(tokens)
            colour = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(one.colour))[0]
            here, there = (int((row == colour).nonzero()[0]) for row in tokens)
            moved.append(((before[here] - after[there]).norm() / before[here].norm()).item())
    return round(sum(moved) / len(moved), 4)
