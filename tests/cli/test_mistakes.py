"""What a user can get wrong: exit 2, one line, nothing loaded and nothing written."""

import os
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from swiftwan import media

Call = Callable[..., tuple[int, str, str]]
SMALL = ("--width", "32", "--height", "32", "--frames", "5", "--steps", "4")


WRONG = [
    ("generate x --model pockte --out o.mp4", "model is 'pockte'. Did you mean 'pocket'?"),
    ("generate x --scheduler eulr --out o.mp4", "scheduler is 'eulr'. Did you mean 'euler'?"),
    ("generate x --dtype bf61 --out o.mp4", "dtype is 'bf61'. Did you mean 'bf16'?"),
    ("generate x --device cdua --out o.mp4", "device is 'cdua'. Did you mean 'cuda'?"),
    ("generate x --stesp 3 --out o.mp4", "--steps"),
    ("generate x --steps three --out o.mp4", "--steps"),
    ("generate x --file-quality 11 --out o.mp4", "--file-quality"),
    ("genrate x", "Did you mean 'generate'?"),
    ("generate", "there is no prompt"),
    ("generate x y", "unexpected extra argument"),
    ("generate x --plan fast --with compile --out o.mp4", "both given; give one"),
    ("generate x --out o.png --frames 9", "'o.png' is a picture; name it .mp4"),
    (
        "generate x --frames 9001 --out o.mp4",
        "an abacus has 1.0 GB; 1097 frames should fit",
    ),
    ("generate x --out o.gif", "'o.gif' ends in '.gif'"),
    ("generate x --out o", "'o' has no ending; name it .mp4"),
    ("generate x --out .", "'.' is a folder"),
    ("generate x --plan auto --quality best --out o.mp4", "--quality is 'best'. Known: exact, fast, near."),
    ("generate x --out folder.mp4", "'folder.mp4' is a folder"),
    ("generate x --out missing/o.mp4", "'missing' does not exist"),
    ("generate x --out /proc/o.mp4", "'/proc' is not writable"),
    ("generate --like text.mp4", "neither an mp4 nor a PNG"),
    ("generate --like plain.png", "carries no swiftwan record"),
    ("generate --like none.mp4", "'none.mp4' does not exist"),
    ("info plain.png", "carries no swiftwan record"),
    ("info none.mp4", "'none.mp4' does not exist"),
    ("info", "Missing argument"),
    ("models --download wan2.1-t2v-1.3", "Did you mean 'wan2.1-t2v-1.3b'?"),
    ("models --download pocket", "embedded"),
]


@pytest.fixture
def clutter(fake: types.SimpleNamespace) -> types.SimpleNamespace:
    """A folder, a text file and a foreign picture beside the user."""
    (fake.here / "folder.mp4").mkdir()
    (fake.here / "text.mp4").write_text("text")
    Image.new("RGB", (8, 8)).save(fake.here / "plain.png")
    return fake


@pytest.mark.parametrize(("line", "words"), WRONG)
def test_a_wrong_request(clutter: types.SimpleNamespace, call: Call, line: str, words: str) -> None:
    if not Path("/proc/self").exists() and "/proc" in line:
        pytest.skip("needs /proc, where root may not write either")
    code, out, err = call(*line.split())
    told = [row for row in err.splitlines() if not row.startswith("like ")]
    assert code == 2
    assert out == ""
    assert len(told) == 1, err
    assert told[0].startswith("error: ")
    assert words in told[0]
    assert sorted(os.listdir()) == ["folder.mp4", "plain.png", "text.mp4"]
    assert not any(name == "load" for name, *_ in clutter.calls)


def test_cuda_where_there_is_none(fake: types.SimpleNamespace, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    code, out, err = call("generate", "x", "--device", "cuda")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "built without CUDA" in err
    assert "--device cpu" in err
    assert os.listdir() == []


def test_a_disk_too_small(fake: types.SimpleNamespace, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=2**21))
    code, _, err = call("generate", "x", "--model", "wan2.1-t2v-14b")
    assert (code, err.count("\n")) == (2, 1)
    assert "has 2.0 MiB free, and 'x.mp4' may need 72.2 MiB" in err
    assert call("generate", "x", *SMALL)[0] == 0  # the same disk takes a small one


def test_our_own_mistake_is_one_line(fake: types.SimpleNamespace, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAILURE", "1")
    code, out, err = call("generate", "x")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == (
        "error: unexpected TypeError: two lines; please report; run again with SWIFTWAN_TRACEBACK=1 for the traceback"
    )
    assert "Traceback" not in err
    monkeypatch.setenv("SWIFTWAN_TRACEBACK", "1")
    assert "Traceback" in call("generate", "x")[2]
    assert os.listdir() == []
