"""The command line with a fake engine: in this process, and as a process of its own."""

import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import swiftwan.cli

FAKE = Path(__file__).with_name("fake_engine.py").read_text()


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line; return its exit code, standard output and standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = swiftwan.cli.main(arguments)
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> types.SimpleNamespace:
    """The fake engine in this process, and an empty current folder."""
    for name in ("swiftwan.engine", "swiftwan.plan"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["fake"] = types.ModuleType("fake")
    exec(compile(FAKE, "fake", "exec"), vars(sys.modules["fake"]))
    members = vars(sys.modules.pop("fake"))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return types.SimpleNamespace(calls=members["CALLS"], here=here)


@pytest.fixture
def shell(tmp_path: Path) -> Any:
    """Start ``python -m swiftwan`` as a process of its own, with the fake engine, in an empty folder."""
    plug_in = tmp_path / "plug-in"
    plug_in.mkdir()
    (plug_in / "sitecustomize.py").write_text(FAKE)
    here = tmp_path / "here"
    here.mkdir()
    source = Path(swiftwan.cli.__file__).parents[2]

    def start(*arguments: str, stderr: int = subprocess.PIPE, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "swiftwan", *arguments],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=here,
            env=os.environ | {"PYTHONPATH": f"{plug_in}:{source}"} | environment,
        )

    return types.SimpleNamespace(start=start, here=here)
