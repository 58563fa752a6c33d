"""What docs/plans.md says is what techniques say, and what was run."""

import importlib.util
import re
from pathlib import Path

import pytest

from swiftwan.models.config import POCKET
from swiftwan.ops.attention import KERNELS
from swiftwan.plan import parse
from swiftwan.recipes import RECIPES
from swiftwan.techniques import offload, prompts, quantize, vae

ROOT = Path(__file__).parents[1]
VALUES = {
    "attention": [kernel.name for kernel in KERNELS],
    "offload": offload.KINDS,
    "prompt-cache": prompts.PLACES,
    "quantize": quantize.FORMATS,
    "text-encoder": prompts.HOMES,
    "vae": vae._BY_WORD,
}
"""What stands behind a technique's name, where each is another way of running."""


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


@pytest.fixture(scope="module")
def h200_page():
    """benchmarks/h200_techniques_page.py, which makes the page's tables of an H200's rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        spec = importlib.util.spec_from_file_location(
            "h200_techniques_page", ROOT / "benchmarks" / "h200_techniques_page.py"
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def test_the_tables_of_an_h200_are_those_of_its_rows(h200_page):
    text = h200_page.PAGE.read_text()
    made = h200_page.page_of(text, h200_page.ROWS.read_text().splitlines())
    assert text == made, "run python benchmarks/h200_techniques_page.py"


def told_techniques():
    """Specs of the table of all techniques in docs/techniques.md, a value each; the first of a line has the name."""
    _, _, rest = (ROOT / "docs" / "techniques.md").read_text().partition("## All of them")
    specs = set()
    for line in rest.partition("\n## ")[0].splitlines():
        # A value ends where options, or the name of a file, begin.
        heads = [
            re.match(r"([a-z\d-]+)(?::([a-z\d-]+)(?=\[|=[A-Z]|$))?", word).groups()
            for word in (re.findall("`(.+?)`", line.split("|")[1]) if line.startswith("| `") else ())
        ]
        specs |= {":".join(filter(None, heads[0])) for _ in heads[:1]}
        specs |= {f"{heads[0][0]}:{value}" for value, _ in heads[1:]}
    return specs


def test_every_technique_is_told_and_has_a_row_of_its_own_or_a_reason(h200_page):
    told = told_techniques()
    assert {f"{name}:{value}" for name, values in VALUES.items() for value in values} <= told
    rows = h200_page.last_good(h200_page.ROWS.read_text().splitlines())
    ran = {case.removeprefix("alone ") for case, row in rows.items() if row["status"] == "ok"}
    without = {spec for spec in told if not any(f"{case}:".startswith(f"{spec}:") for case in ran)}
    assert without == h200_page.NO_ROW.keys()
