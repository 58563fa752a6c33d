"""What docs/plans.md says is what techniques say, and what was run."""

import importlib.util
import itertools
from pathlib import Path

import pytest

from swiftwan.models.config import POCKET
from swiftwan.plan import parse
from swiftwan.recipes import RECIPES

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pairs():
    """benchmarks/pocket_pairs.py, which makes the page's tables."""
    spec = importlib.util.spec_from_file_location("pocket_pairs", ROOT / "benchmarks" / "pocket_pairs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_as_it_is_made(pairs):
    text = pairs.PAGE.read_text()
    assert text == pairs.page_of(text, pairs.ROWS), "run python benchmarks/pocket_pairs.py --write"


def test_the_page_shows_every_recipe(pairs):
    text = pairs.PAGE.read_text()
    for name, recipe in RECIPES.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        assert f"{recipe.width}x{recipe.height}x{recipe.num_frames}" in line
        assert " ".join(recipe.specs) in line


def test_every_pair_that_was_accepted_ran_and_is_accepted_still(pairs):
    found = pairs.best_rows(pairs.ROWS)
    for one, other in itertools.combinations(pairs.specs(), 2):
        row = found[frozenset((one, other))]
        first, second = parse(one), parse(other)
        why = first.conflict(second) or first.unfit_for(POCKET) or second.unfit_for(POCKET)
        assert row["status"] != "failed", row
        if row["status"] == "ok":
            assert not why, row
        if row["status"] == "refused":
            assert why, row
            assert why in row["reason"]
