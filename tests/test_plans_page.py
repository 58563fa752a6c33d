"""What docs/plans.md says is what techniques say, and what was run."""

import importlib.util
import re
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


def test_every_pair_that_ran_is_accepted_still(pairs):
    rows = pairs.best_rows(pairs.ROWS)
    assert sum(row["status"] == "ok" for row in rows.values()) > 150
    for pair, row in rows.items():
        one, other = map(parse, (*pair, *pair)[:2])
        why = "" if one == other else one.conflict(other)
        assert row["status"] != "failed", row
        if row["status"] == "ok":
            assert not why, row
            one.fit(POCKET)
            other.fit(POCKET)


def test_every_pair_of_techniques_is_in_the_table(pairs):
    text = pairs.PAGE.read_text()
    lines = [line for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [re.search("`(.+?)`", line)[1] for line in lines] == pairs.specs()
    for number, line in enumerate(lines, 1):
        cells = [cell.strip() for cell in line.split("|")[4:-1]]
        assert all(cells[:number])
        assert not any(cells[number:])
