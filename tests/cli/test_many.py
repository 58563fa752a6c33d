"""Many prompts from a file, on the embedded model: named alike each time, resumed, failures told at the end."""

import json
import os
import signal
from pathlib import Path

import pytest
from PIL import Image

import swiftwan.cli
from swiftwan import media
from swiftwan.engine import Engine

SMALL = ("--width", "32", "--height", "32", "--steps", "1", "--device", "cpu")
STILL = (*SMALL, "--frames", "1")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def loads(monkeypatch):
    """How often an engine is loaded."""
    counted = []
    load = Engine.load

    def counting(*args, **kwargs):
        counted.append(args)
        return load(*args, **kwargs)

    monkeypatch.setattr(Engine, "load", counting)
    return counted


def call(capsys, *arguments):
    code = swiftwan.cli.main(["generate", "--prompts", *arguments])
    told = capsys.readouterr()
    return code, told.out.splitlines(), told.err.splitlines()


def test_a_prompt_a_line(capsys, loads):
    Path("p.txt").write_text("# two pictures\na red circle\n\n  a blue star over a night background  \n")
    code, out, err = call(capsys, "p.txt", "--out", "many", *STILL)
    assert code == 0, err
    names = ["0001-a-red-circle.png", "0002-a-blue-star-over-a-night-background.png"]
    assert out == [f"many/{name}" for name in names]
    assert sorted(os.listdir("many")) == names
    assert media.read_record(Path("many", names[1]))["request"]["prompt"] == "a blue star over a night background"
    assert len(loads) == 1
    assert err[-1] == "2 written, 0 already there, 0 failed"


def test_it_goes_on_where_it_was(capsys, loads):
    Path("p.txt").write_text("a red circle\na blue star\n")
    call(capsys, "p.txt", "--out", "many", *STILL)
    before = {path.name: path.stat().st_mtime_ns for path in Path("many").iterdir()}
    with Path("p.txt").open("a") as file:
        file.write("a green square\n")
    code, out, err = call(capsys, "p.txt", "--out", "many", *STILL)
    assert (code, out) == (0, ["many/0003-a-green-square.png"])
    assert err[-1] == "1 written, 2 already there, 0 failed"
    assert all(Path("many", name).stat().st_mtime_ns == when for name, when in before.items())
    assert call(capsys, "p.txt", "--out", "many", *STILL)[2][-1] == "0 written, 3 already there, 0 failed"
    assert len(loads) == 2, "nothing is loaded when nothing is left to do"
    # Another request under the same names is made anew.
    assert call(capsys, "p.txt", "--out", "many", *STILL, "--guidance", "1")[2][-1].startswith("3 written")
    # So is one whose plan differs.
    with_plan = (*STILL, "--guidance", "1", "--with", "batched-cfg")
    assert call(capsys, "p.txt", "--out", "many", *with_plan)[2][-1].startswith("3 written")


def test_requests_of_every_kind_and_failures_at_the_end(capsys):
    Image.new("RGB", (32, 32), "red").save("a.png")
    lines = [
        {"prompt": "a red circle moves up", "num_frames": 5, "out": "moves.mp4"},
        {"task": "ImageToImage", "prompt": "a blue star", "image": "a.png", "creativity": 0.5, "out": "star.png"},
        {"task": "ImageToImage", "prompt": "a blue star", "image": "none.png"},
        {"task": "TextToVidoe", "prompt": "x"},
        {"prompt": "x", "out": "../x.mp4"},
        {"prompt": "x", "out": "x.gif"},
        {"prompt": "x", "num_frames": 5, "out": "moves.mp4"},
        {"prompt": "x", "num_frames": 6},
        {"task": "TextToImage", "prompt": "a green star", "seed": 4, "num_inference_steps": 2},
    ]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{broken\n")
    code, out, err = call(capsys, "p.jsonl", "--out", "many", *SMALL, "--json")
    assert code == 1
    told = json.loads(out[0])
    assert told["written"] == ["many/moves.mp4", "many/star.png", "many/0009-a-green-star.png"]
    reasons = {failure["line"]: failure["error"] for failure in told["failed"]}
    assert list(reasons) == [3, 4, 5, 6, 7, 8, 10]
    for line, words in {
        3: "'none.png' does not exist",
        4: "Did you mean 'TextToVideo'",
        5: "out is '../x.mp4'; it must be the name of a .mp4 file",
        6: "out is 'x.gif'",
        7: "the name of an earlier line too",
        8: "5 or 9",
        10: "no JSON object",
    }.items():
        assert words in reasons[line]
    assert [line for line in err if line.startswith("line ")] == [f"line {n}: {why}" for n, why in reasons.items()]
    assert sorted(os.listdir("many")) == ["0009-a-green-star.png", "moves.mp4", "star.png"]
    record = media.read_record(Path("many/0009-a-green-star.png"))["request"]
    assert (record["seed"], record["num_inference_steps"], record["width"]) == (4, 2, 32)
    Image.new("RGB", (32, 32), "blue").save("a.png")  # what was made from the old image is made anew
    assert json.loads(call(capsys, "p.jsonl", "--out", "many", *SMALL, "--json")[1][0])["written"] == ["many/star.png"]


def test_a_foreign_file_is_left_alone(capsys):
    Path("many").mkdir()
    Path("p.txt").write_text("a red circle\n")
    Path("many/0001-a-red-circle.png").write_text("mine")
    code, _, err = call(capsys, "p.txt", "--out", "many", *STILL)
    assert code == 1
    assert err[-2].startswith("line 1: 'many/0001-a-red-circle.png' is neither an mp4 nor a PNG")
    assert Path("many/0001-a-red-circle.png").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("none.txt", "--out", "many"), "'none.txt' cannot be read"),
        (("empty.txt", "--out", "many"), "has no prompts"),
        (("latin.txt", "--out", "many"), "no UTF-8"),
        (("p.txt",), "give a folder for them with --out"),
        (("p.txt", "a prompt", "--out", "many"), "both given"),
        (("p.txt", "--out", "p.txt"), "cannot be made"),
        (("p.txt", "--out", "many", "--model", "pockte"), "Did you mean 'pocket'"),
        (("p.txt", "--out", "many", "--model", ""), "There is no model ''"),
        (("p.txt", "--out", "many", "--with", "nonsense"), "unknown technique 'nonsense'"),
    ],
    ids=str,
)
def test_what_fails_every_line_is_one_error(capsys, arguments, words):
    Path("p.txt").write_text("a red circle\n")
    Path("empty.txt").write_text("# nothing\n\n")
    Path("latin.txt").write_bytes("été".encode("latin-1"))
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, [])
    assert words in err[-1]
    assert err[-1].startswith("error: ")
    assert not Path("many").exists()


def test_a_line_that_cannot_fit_fails_alone(capsys):
    Path("p.jsonl").write_text('{"prompt": "a red circle", "num_frames": 1000001}\n')
    code, _, err = call(capsys, "p.jsonl", "--out", "many")
    assert code == 1
    assert "line 1: will not fit: 128x128, 1000001 frames take about" in err[-2]


def test_ctrl_c_keeps_what_is_done(capsys, monkeypatch):
    Path("p.txt").write_text("a red circle\na blue star\n")
    before, run = signal.getsignal(signal.SIGINT), Engine.run

    def interrupted(self, request, **options):
        if "star" in request.prompt:
            signal.raise_signal(signal.SIGINT)
        return run(self, request, **options)

    monkeypatch.setattr(Engine, "run", interrupted)
    try:
        code, _, err = call(capsys, "p.txt", "--out", "many", *STILL)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130
    assert err[-1] == "cancelled at text; 1 written, 0 already there, 0 failed; run the same again for the rest"
    assert os.listdir("many") == ["0001-a-red-circle.png"]


def test_explain_takes_one_request(capsys):
    Path("p.txt").write_text("a red circle\n")
    assert swiftwan.cli.main(["explain", "--prompts", "p.txt"]) == 2
    assert "--prompts is for generate" in capsys.readouterr().err
