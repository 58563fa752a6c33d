"""What the pocket world can show, in words: the grammar of its prompts, and scenes chosen by chance::

    a [small|large] COLOUR SHAPE MOTION over a BACKGROUND background

and two things joined by ``and``. ``pocket/world.py`` draws them, ``pocket/judge.py`` reads them back from a clip.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from itertools import product

from swiftwan.errors import RequestError, did_you_mean

COLOURS = {
    "red": (214, 28, 44),
    "green": (12, 132, 58),
    "blue": (28, 92, 246),
    "yellow": (255, 230, 36),
    "purple": (150, 36, 214),
    "orange": (255, 128, 0),
    "white": (255, 255, 255),
    "black": (10, 10, 12),
}
"""RGB of a thing. Any two are at least 100 apart, and at least 85 from every pixel of every background."""

BACKGROUNDS = {
    "blue": ((108, 164, 218), (136, 184, 226), (166, 204, 234)),
    "green": ((176, 212, 150), (148, 198, 132), (122, 182, 118)),
    "gray": ((184, 187, 192), (166, 169, 175), (140, 143, 150)),
    "pink": ((241, 174, 194), (238, 160, 184), (226, 140, 170)),
    "night": ((38, 38, 98), (52, 49, 116), (76, 70, 146)),
    "sunset": ((92, 74, 126), (196, 112, 138), (244, 172, 122)),
}
"""Control points, in RGB, of the quadratic Bezier curve that each background follows from top to bottom."""

SHAPES = ("circle", "square", "triangle", "star")
MOTIONS = (
    "moves left",
    "moves right",
    "moves up",
    "moves down",
    "bounces",
    "spins",
    "grows",
    "shrinks",
    "stays still",
)
RADII = {"small": 11.0, "medium": 16.0, "large": 23.0}
"""Radius of a circle in units; the other shapes are drawn to look as big. A growing thing has it half way."""
PAIR_SCALE = 0.75
"""Things are smaller where two share the picture, so that they rarely touch."""
SPLITS = ("train", "held-out", "all")


@dataclass(frozen=True)
class Thing:
    colour: str
    shape: str
    motion: str
    size: str = "medium"

    def __post_init__(self) -> None:
        _check("colour", self.colour, COLOURS)
        _check("shape", self.shape, SHAPES)
        _check("motion", self.motion, MOTIONS)
        _check("size", self.size, RADII)

    @property
    def phrase(self) -> str:
        words = f"{'' if self.size == 'medium' else self.size + ' '}{self.colour} {self.shape} {self.motion}"
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Scene:
    """One or two things over a background. Raises RequestError for a word outside the grammar."""

    things: tuple[Thing, ...]
    background: str

    def __post_init__(self) -> None:
        if len(self.things) not in (1, 2):
            raise RequestError(f"a scene of {len(self.things)} things; the world shows one or two.")
        _check("background", self.background, BACKGROUNDS)

    @property
    def prompt(self) -> str:
        return f"{' and '.join(thing.phrase for thing in self.things)} over a {self.background} background"


def parse_prompt(text: str) -> Scene | None:
    """Read a prompt of the grammar; None for other text. Case, spacing, a/an and gray/grey do not matter."""
    words = " ".join(text.lower().split()).replace("grey", "gray").rstrip(" .")
    match = _prompt_pattern().fullmatch(words)
    if match is None:
        return None
    size, colour, shape, motion, size_2, colour_2, shape_2, motion_2, background = match.groups()
    things = [Thing(colour, shape, motion, size or "medium")]
    if colour_2:
        things.append(Thing(colour_2, shape_2, motion_2, size_2 or "medium"))
    return Scene(tuple(things), background)


@cache
def _prompt_pattern() -> re.Pattern[str]:
    size, colour, shape, motion, background = (
        "|".join(words) for words in (RADII, COLOURS, SHAPES, MOTIONS, BACKGROUNDS)
    )
    thing = rf"an? (?:({size}) )?({colour}) ({shape}) ({motion})"
    return re.compile(rf"{thing}(?: and {thing})? over an? ({background}) background")


Combination = tuple[str, str, str]


@cache
def held_out_combinations() -> frozenset[Combination]:
    """The 29 of 288 (colour, shape, motion) never shown in training.

    No two of them share two words, so each pair of words (a red circle, a spinning star) is still trained on
    in nearly all its forms: what is held out is the combination, not a part of it.
    """
    everything = list(product(COLOURS, SHAPES, MOTIONS))
    random.Random(2026).shuffle(everything)
    held_out: list[Combination] = []
    for combination in everything:
        if all(sum(a == b for a, b in zip(combination, other, strict=True)) < 2 for other in held_out):
            held_out.append(combination)
    return frozenset(held_out[: round(0.1 * len(everything))])


def sample_scenes(n: int, seed: int, split: str = "train") -> list[Scene]:
    """Choose ``n`` random scenes; 35 % have two things, of two colours. The first do not depend on ``n``.

    ``train`` has no held-out combination, each scene of ``held-out`` at least one; ``all`` does not look.
    Raises RequestError for a negative ``n`` and an unknown split.
    """
    if n < 0:
        raise RequestError(f"{n} scenes asked for; ask for 0 or more.")
    _check("split", split, SPLITS)
    held_out = held_out_combinations()
    everything = list(product(COLOURS, SHAPES, MOTIONS))
    allowed = [c for c in everything if c not in held_out] if split == "train" else everything
    first_from = sorted(held_out) if split == "held-out" else allowed
    chance = random.Random(f"swiftwan {split} {seed}")
    return [_sample_scene(chance, first_from, allowed) for _ in range(n)]


def _sample_scene(chance: random.Random, first_from: list[Combination], allowed: list[Combination]) -> Scene:
    combinations = [chance.choice(first_from)]
    if chance.random() < 0.35:
        second = chance.choice(allowed)
        while second[0] == combinations[0][0]:
            second = chance.choice(allowed)
        combinations.insert(chance.randrange(2), second)
    sizes = list(RADII)
    things = tuple(Thing(*combination, size=chance.choice(sizes)) for combination in combinations)
    return Scene(things, chance.choice(list(BACKGROUNDS)))


def _check(what: str, word: str, known: Collection[str]) -> None:
    if word not in known:
        raise RequestError(f"unknown {what} '{word}'.{did_you_mean(word, known)}")
