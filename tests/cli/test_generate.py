"""``swiftwan generate`` with a fake engine: what it writes, what it passes on, and what it repeats."""

import contextlib
import json
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swiftwan import media
from swiftwan.pipelines.request import TextToImage, TextToVideo

Call = Callable[..., tuple[int, str, str]]
SMALL = ("--width", "32", "--height", "32", "--frames", "5", "--steps", "4")
PROMPT = "a red circle moves left over a blue background"


def test_generate_writes_a_video_and_names_it(fake: types.SimpleNamespace, call: Call) -> None:
    code, out, err = call("generate", PROMPT, *SMALL, "--seed", "7")
    assert code == 0
    assert out == "a-red-circle-moves-left-over-a-blue.mp4\n"
    path = Path(out.strip())
    assert media.read_frames(path).shape == (5, 32, 32, 3)
    record = media.read_record(path)
    assert record["request"]["prompt"] == PROMPT
    assert record["request"]["seed"] == 7
    phases = ["load", "text", "denoise", "decode", "save"]
    assert [word for line in err.splitlines() if (word := line.split()[0]) in phases] == phases
    assert "4/4" in err
    assert "32x32, 5 frames, seed 7" in err
    assert call("generate", PROMPT, *SMALL)[1] == "a-red-circle-moves-left-over-a-blue-2.mp4\n"


def test_every_option_reaches_the_engine(fake: types.SimpleNamespace, call: Call) -> None:
    options = "--width 64 --height 48 --frames 9 --fps 24 --steps 3 --guidance 2.5 --guidance-2 1.5 --shift 4 "
    options += "--seed 3 --scheduler euler --negative blurry --device cpu --dtype fp32 --model pocket "
    options += "--with quantize:fp8 --with sparse-attention:keep=0.25,block=64 --out x.mp4"
    code, _, err = call("generate", "a star", *options.split())
    assert code == 0, err
    request = TextToVideo(
        "a star",
        negative_prompt="blurry",
        width=64,
        height=48,
        num_frames=9,
        fps=24,
        num_inference_steps=3,
        guidance_scale=2.5,
        guidance_scale_2=1.5,
        flow_shift=4.0,
        scheduler="euler",
        seed=3,
    )
    plan = ["quantize:fp8", "sparse-attention:keep=0.25,block=64"]
    assert fake.calls == [
        ("explain", "pocket", request, plan, "cpu", "fp32"),
        ("load", "pocket", plan, "cpu", "fp32"),
    ]


def test_a_png_is_a_picture(fake: types.SimpleNamespace, call: Call) -> None:
    code, _, err = call("generate", "a star", "--width", "32", "--height", "32", "--out", "star.png")
    assert code == 0, err
    assert media.read_frames(Path("star.png")).shape == (1, 32, 32, 3)
    assert isinstance(fake.calls[0][2], TextToImage)


def test_json_is_one_object_on_a_clean_stdout(shell: Any) -> None:
    process = shell.start("generate", PROMPT, *SMALL, "--seed", "7", "--out", "x.mp4", "--json")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    told = json.loads(out)
    assert out.count("\n") == 1
    keys = "path seconds step_seconds peak_bytes request plan model device dtype versions frames"
    assert set(told) == set(keys.split())
    assert told["frames"] == 5
    assert told["path"] == "x.mp4"
    assert "a library prints" in err
    assert os.listdir(shell.here) == ["x.mp4"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_on_a_terminal_a_line_a_phase_remains(shell: Any) -> None:
    import pty

    ours, theirs = pty.openpty()
    process = shell.start("generate", "x", *SMALL, "--out", "x.mp4", stderr=theirs, TERM="xterm", COLUMNS="80")
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while chunk := os.read(ours, 2**16):
            seen += chunk
    os.close(ours)
    assert process.communicate(timeout=30)[0] == "x.mp4\n"
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())
    for phase in ("load", "text", "denoise", "decode", "save"):
        assert re.search(rf"[✓*] {phase} +\d", text), text
    assert re.search(r"4/4 +\d+ ms/step", text)


@pytest.mark.parametrize("name", ["first.mp4", "first.png"])
def test_like_repeats_a_file(fake: types.SimpleNamespace, call: Call, name: str) -> None:
    size = SMALL if name.endswith("mp4") else ("--width", "32", "--height", "32")
    given = (
        *size,
        "--seed",
        "5",
        "--with",
        "step-cache",
        "--guidance",
        "3",
        "--dtype",
        "fp32",
        "--out",
        name,
    )
    assert call("generate", PROMPT, *given)[0] == 0
    again = name.replace("first", "again")
    code, _, err = call("generate", "--like", name, "--out", again)
    assert code == 0, err
    assert "seed 5" in err.splitlines()[0]
    assert Path(again).read_bytes() == Path(name).read_bytes()


def test_given_values_override_the_file(fake: types.SimpleNamespace, call: Call) -> None:
    call("generate", PROMPT, *SMALL, "--seed", "5", "--with", "step-cache", "--out", "first.mp4")
    code, out, err = call("generate", "a blue star", "--like", "first.mp4", "--seed", "6", "--plan", "none", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (told["request"]["prompt"], told["request"]["seed"]) == ("a blue star", 6)
    assert (told["request"]["num_inference_steps"], told["plan"]) == (4, [])
    assert told["path"] == "a-blue-star.mp4"


def test_a_picture_like_a_video(fake: types.SimpleNamespace, call: Call) -> None:
    call("generate", PROMPT, *SMALL, "--seed", "5", "--out", "first.mp4")
    assert call("generate", "--like", "first.mp4", "--out", "still.png")[0] == 0
    assert media.media_facts(Path("still.png")).num_frames == 1
    assert call("generate", "--like", "still.png", "--out", "moves.mp4", "--steps", "1")[0] == 0
    assert media.media_facts(Path("moves.mp4")).num_frames == 33
