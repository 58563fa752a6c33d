from dataclasses import dataclass

import pytest

from swiftwan.errors import PlanError
from swiftwan.techniques.base import ByValue, Slot, Technique


@dataclass(frozen=True)
class Walls(Technique):
    value: str = "brick"
    max_height: float = 3.0

    name = "walls"
    kind = "exact"
    reason = "they stand"
    slot = Slot.BLOCKS
    claims = ("blocks.*",)
    makes = frozenset({"solid"})


@dataclass(frozen=True)
class Ghost(Technique):
    name = "ghost"
    kind = "exact"
    reason = "it floats"
    slot = Slot.GUIDANCE
    refuses = {"solid": "it must pass through; drop the walls"}


@dataclass(frozen=True)
class Door(Walls):
    name = "door"
    claims = ("blocks.1",)


@dataclass(frozen=True)
class Paint(Walls):
    name = "paint"
    claims = ()


@dataclass(frozen=True)
class Window(Walls):
    name = "window"
    reason = ByValue("one sees through", {"stained": "one sees colours"})


def test_a_value_may_have_a_reason_of_its_own():
    assert Window.reason == Window("clear").reason == "one sees through"
    assert Window("stained").reason == "one sees colours"
    assert Window("stained") == Window("stained") != Window("clear")


def test_options_are_read_and_written_with_hyphens():
    walls = Walls.read("stone:max-height=2.5")
    assert walls == Walls("stone", 2.5)
    assert walls.spec == "walls:stone:max-height=2.5"
    assert Walls.read("") == Walls()
    assert Walls().spec == "walls"


def test_a_fact_is_refused_with_its_reason_whichever_is_listed_first():
    told = "ghost cannot run beside walls: it must pass through; drop the walls"
    assert Ghost().conflict(Walls()) == told
    assert Walls().conflict(Ghost()) == told


def test_overlapping_claims_of_a_slot_conflict_and_an_empty_claim_does_not():
    assert "both decide blocks of blocks.* and blocks.1" in Walls().conflict(Door())
    assert Walls().conflict(Paint()) == ""
    assert Paint().conflict(Paint()) == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stone:hieght=2", "has no option 'hieght'"),
        ("stone:max-height=tall", "max-height is 'tall'; it must be a number"),
        ("stone:max-height=1,max-height=2", "has max-height twice"),
    ],
)
def test_bad_options_say_which(text, words):
    with pytest.raises(PlanError, match=words):
        Walls.read(text)
