"""The scripts in benchmarks/ mostly need a GPU; that they still fit the package they import is checked here."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch.compile imports torch.jit
@pytest.mark.parametrize("script", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_every_script_imports_and_says_what_it_measures(script, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    assert importlib.import_module(script).__doc__
