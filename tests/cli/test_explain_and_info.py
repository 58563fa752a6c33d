"""``swiftwan explain`` and ``swiftwan info``."""

import json
import os
import types
from collections.abc import Callable
from pathlib import Path

from swiftwan import media

Call = Callable[..., tuple[int, str, str]]
SMALL = ("--width", "32", "--height", "32", "--frames", "5", "--steps", "4")
PROMPT = "a red circle moves left over a blue background"


def test_explain_loads_and_writes_nothing(fake: types.SimpleNamespace, call: Call) -> None:
    code, out, _ = call("explain", "a star", "--with", "compile", "--out", "x.png")
    assert (code, out) == (0, "pocket runs TextToImage\nplan: ['compile']\n")
    code, out, _ = call("explain", "a star", "--json")
    assert code == 0
    assert json.loads(out)["request"] == {"task": "TextToVideo", "prompt": "a star"}
    assert os.listdir() == []
    assert {name for name, *_ in fake.calls} == {"explain"}


def test_info(fake: types.SimpleNamespace, call: Call) -> None:
    call("generate", PROMPT, *SMALL, "--seed", "7", "--out", "x.mp4")
    code, out, _ = call("info", "x.mp4")
    assert code == 0
    rows = dict(line.split(maxsplit=1) for line in out.splitlines() if len(line.split()) > 1)
    assert rows["request.seed"] == "7"
    assert rows["media.codec"] == "h264"
    code, out, _ = call("info", "x.mp4", "--json")
    told = json.loads(out)
    assert told["record"] == media.read_record(Path("x.mp4"))
    assert told["media"]["num_frames"] == 5
