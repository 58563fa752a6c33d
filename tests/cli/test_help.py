"""Help, version, and how little their start-up loads."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import swiftwan.cli
from swiftwan import media

Call = Callable[..., tuple[int, str, str]]


def test_help_and_version(call: Call) -> None:
    for arguments in ((), ("--help",), ("generate", "-h"), ("doctor", "--help")):
        code, out, err = call(*arguments)
        assert (code, err) == (0, "")
        assert "Usage" in out
    code, out, _ = call("--version")
    assert code == 0
    assert out.startswith("swiftwan ")


def test_the_app_runs_under_typers_own_runner() -> None:
    result = CliRunner().invoke(swiftwan.cli.app, ["--help"])
    assert result.exit_code == 0
    assert all(verb in result.output for verb in ("generate", "explain", "doctor", "models", "info"))


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["info", "x.mp4"], ["models"]])
def test_start_up_leaves_torch_alone(tmp_path: Path, arguments: list[str]) -> None:
    """Importing torch takes two seconds, which help and info need not cost."""
    frames = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    media.write(tmp_path / "x.mp4", frames, fps=16, record={"request": {"prompt": "x"}})
    program = (
        "import sys\n"
        "from swiftwan.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(swiftwan.cli.__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr


def test_ctrl_c_ends_any_verb_with_a_word(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("swiftwan.cli.models.model_states", interrupted)
    assert call("models") == (130, "", "cancelled\n")


def test_a_group_of_verbs_alone_shows_its_help_and_no_empty_error(call: Call) -> None:
    code, out, err = call("train")
    assert code == 2
    assert "distill" in out
    assert "error:" not in err
