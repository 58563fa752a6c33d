"""The command line: exit codes, one line an error, clean standard output, and nothing left by Ctrl-C."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import swiftwan.cli
from swiftwan import media
from swiftwan.cli.models import ModelState
from swiftwan.pipelines.request import TextToImage, TextToVideo

FAKE = '''
"""Stands in for the engine and the plan: the real words, no model. Subprocesses load it as sitecustomize."""

import os
import sys
import time
import types
from dataclasses import dataclass, field, fields

from swiftwan.errors import RequestError, did_you_mean
from swiftwan.models.config import KNOWN_MODELS, POCKET_DEFAULTS

STEP_SECONDS = float(os.environ.get("FAKE_STEP_SECONDS", "0"))
CALLS = []


@dataclass
class Explanation:
    model: str
    request: object
    plan: object
    asked: object

    def lines(self):
        return [f"{self.model} runs {type(self.request).__name__}", f"plan: {self.plan}"]

    def to_json(self):
        return {"model": self.model, "request": self.asked.to_json(), "plan": self.plan}


def explain(model, request, *, plan, device, dtype):
    if model != "pocket" and model not in KNOWN_MODELS:
        raise RequestError(f"model is '{model}'." + did_you_mean(model, ["pocket", *KNOWN_MODELS]))
    schedulers = ("unipc", "euler", "heun", "dpm++", "lcm")
    if request.scheduler not in (None, *schedulers):
        hint = did_you_mean(request.scheduler, schedulers)
        raise RequestError(f"scheduler is '{request.scheduler}'." + hint)
    CALLS.append(("explain", model, request, plan, device, dtype))
    defaults = KNOWN_MODELS[model].defaults if model in KNOWN_MODELS else POCKET_DEFAULTS
    return Explanation(model, request.completed(defaults), plan, request)


class Engine:
    def __init__(self, model, plan, device, dtype):
        self.model_name, self.plan, self.device, self.dtype = model, plan, device, dtype

    @classmethod
    def load(cls, model, *, plan="auto", device=None, dtype=None, request=None):
        print("a library prints while loading")
        CALLS.append(("load", model, plan, device, dtype))
        if os.environ.get("FAKE_FAILURE"):
            raise TypeError("two\\nlines")
        time.sleep(STEP_SECONDS)
        return cls(model, plan, device, dtype)

    def run(self, request, on_step=None, out=None, quality=8):
        import torch

        from swiftwan.pipelines.result import Result, StepEvent

        request = request.completed(POCKET_DEFAULTS)
        began = time.perf_counter()
        for phase, steps in (("text", 1), ("denoise", request.num_inference_steps), ("decode", 3)):
            for step in range(1, steps + 1):
                time.sleep(STEP_SECONDS)
                on_step(StepEvent(phase, step, steps, time.perf_counter() - began))
        shape = request.num_frames, request.height, request.width, 3
        generator = torch.Generator().manual_seed(request.seed)
        result = Result(
            frames=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
            latents=torch.zeros(1, 16, 9, 16, 16),
            seconds={"text": 0.1, "denoise": 1.0, "decode": 0.2, "total": 1.3},
            step_seconds=(0.05,) * request.num_inference_steps,
            peak_bytes=123456789,
            request=request,
            plan=() if self.plan == "auto" else tuple(self.plan),
            model=self.model_name,
            device=self.device or "cpu",
            dtype=self.dtype or "float32",
            versions={"swiftwan": "0.1.0"},
        )
        result.save(out, quality=quality)
        return result


for name, members in {"swiftwan.engine": {"Engine": Engine}, "swiftwan.plan": {"explain": explain}}.items():
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(members)
'''

SMALL = ("--width", "32", "--height", "32", "--frames", "5", "--steps", "4")
PROMPT = "a red circle moves left over a blue background"


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


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = swiftwan.cli.main(arguments)
    told = capsys.readouterr()
    return code, told.out, told.err


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


# generate


def test_generate_writes_a_video_and_names_it(fake: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "generate", PROMPT, *SMALL, "--seed", "7")
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
    assert call(capsys, "generate", PROMPT, *SMALL)[1] == "a-red-circle-moves-left-over-a-blue-2.mp4\n"


def test_every_option_reaches_the_engine(fake: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--width 64 --height 48 --frames 9 --fps 24 --steps 3 --guidance 2.5 --guidance-2 1.5 --shift 4 "
    options += "--seed 3 --scheduler euler --negative blurry --device cpu --dtype fp32 --model pocket "
    options += "--with quantize:fp8 --with sparse-attention:keep=0.25,block=64 --out x.mp4"
    code, _, err = call(capsys, "generate", "a star", *options.split())
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


def test_a_png_is_a_picture(fake: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "generate", "a star", "--width", "32", "--height", "32", "--out", "star.png")
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


# --like


@pytest.mark.parametrize("name", ["first.mp4", "first.png"])
def test_like_repeats_a_file(fake: types.SimpleNamespace, capsys: pytest.CaptureFixture[str], name: str) -> None:
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
    assert call(capsys, "generate", PROMPT, *given)[0] == 0
    again = name.replace("first", "again")
    code, _, err = call(capsys, "generate", "--like", name, "--out", again)
    assert code == 0, err
    assert "seed 5" in err.splitlines()[0]
    assert Path(again).read_bytes() == Path(name).read_bytes()


def test_given_values_override_the_file(fake: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "generate", PROMPT, *SMALL, "--seed", "5", "--with", "step-cache", "--out", "first.mp4")
    code, out, err = call(
        capsys, "generate", "a blue star", "--like", "first.mp4", "--seed", "6", "--plan", "none", "--json"
    )
    assert code == 0, err
    told = json.loads(out)
    assert (told["request"]["prompt"], told["request"]["seed"]) == ("a blue star", 6)
    assert (told["request"]["num_inference_steps"], told["plan"]) == (4, [])
    assert told["path"] == "a-blue-star.mp4"


def test_a_picture_like_a_video(fake: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "generate", PROMPT, *SMALL, "--seed", "5", "--out", "first.mp4")
    assert call(capsys, "generate", "--like", "first.mp4", "--out", "still.png")[0] == 0
    assert media.media_facts(Path("still.png")).num_frames == 1
    assert call(capsys, "generate", "--like", "still.png", "--out", "moves.mp4", "--steps", "1")[0] == 0
    assert media.media_facts(Path("moves.mp4")).num_frames == 33


# What a user can get wrong: exit 2, one line, nothing written


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
    ("generate x --out o.gif", "'o.gif' ends in '.gif'"),
    ("generate x --out o", "Known: .mp4, .png"),
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
def test_a_wrong_request(
    clutter: types.SimpleNamespace, capsys: pytest.CaptureFixture[str], line: str, words: str
) -> None:
    if not Path("/proc/self").exists() and "/proc" in line:
        pytest.skip("needs /proc, where root may not write either")
    code, out, err = call(capsys, *line.split())
    told = [row for row in err.splitlines() if not row.startswith("like ")]
    assert code == 2
    assert out == ""
    assert len(told) == 1, err
    assert told[0].startswith("error: ")
    assert words in told[0]
    assert sorted(os.listdir()) == ["folder.mp4", "plain.png", "text.mp4"]
    assert not any(name == "load" for name, *_ in clutter.calls)


def test_cuda_where_there_is_none(
    fake: types.SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    code, out, err = call(capsys, "generate", "x", "--device", "cuda")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "built without CUDA" in err
    assert "--device cpu" in err
    assert os.listdir() == []


def test_a_disk_too_small(
    fake: types.SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=2**21))
    code, _, err = call(capsys, "generate", "x", "--model", "wan2.1-t2v-14b")
    assert (code, err.count("\n")) == (2, 1)
    assert "has 2.0 MiB free, and 'x.mp4' may need 72.2 MiB" in err
    assert call(capsys, "generate", "x", *SMALL)[0] == 0  # the same disk takes a small one


def test_our_own_mistake_is_one_line(
    fake: types.SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAILURE", "1")
    code, out, err = call(capsys, "generate", "x")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == (
        "error: unexpected TypeError: two lines; please report; run again with SWIFTWAN_TRACEBACK=1 for the traceback"
    )
    assert "Traceback" not in err
    monkeypatch.setenv("SWIFTWAN_TRACEBACK", "1")
    assert "Traceback" in call(capsys, "generate", "x")[2]
    assert os.listdir() == []


# Ctrl-C


def interrupted(process: subprocess.Popen[str], after: str) -> tuple[int, str, str]:
    """Send Ctrl-C once a line on stderr begins with ``after``."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if line.startswith(after):
            break
    time.sleep(0.35)  # into the phase that follows
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, "".join(seen) + err


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
@pytest.mark.parametrize(("after", "where"), [("load", "text"), ("text", "denoise"), ("denoise", "decode")])
def test_ctrl_c_ends_the_run_and_leaves_nothing(shell: Any, after: str, where: str) -> None:
    steps, seconds = ("60", "0.25") if where == "denoise" else ("2", "0.6")
    process = shell.start("generate", "x", "--steps", steps, FAKE_STEP_SECONDS=seconds)
    began = time.monotonic()
    code, out, err = interrupted(process, after)
    assert code == 130
    assert out == ""
    assert err.splitlines()[-1].startswith(f"cancelled at {where}")
    assert err.splitlines()[-1].endswith("; nothing was written")
    assert "Traceback" not in err
    assert os.listdir(shell.here) == []
    assert time.monotonic() - began < 20


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_ctrl_c_while_loading(shell: Any) -> None:
    process = shell.start("generate", "x", FAKE_STEP_SECONDS="30")
    code, _, err = interrupted(process, "a library prints")
    assert code == 130
    assert err.splitlines()[-1] == "cancelled at load; nothing was written"
    assert os.listdir(shell.here) == []


def test_ctrl_c_while_the_file_is_written(
    fake: types.SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(os, "fsync", lambda _: signal.raise_signal(signal.SIGINT))
    try:
        code, out, err = call(capsys, "generate", "x", *SMALL)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "cancelled at save; nothing was written"
    assert os.listdir() == []


def test_ctrl_c_just_after_the_file_got_its_name(
    fake: types.SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    replace = os.replace

    def replace_then_interrupt(*names: Any) -> None:
        replace(*names)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "replace", replace_then_interrupt)
    try:
        code, _, err = call(capsys, "generate", "x", *SMALL)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130
    assert err.splitlines()[-1] == "cancelled, but 'x.mp4' was already written, whole"
    assert media.read_frames(Path("x.mp4")).shape == (5, 32, 32, 3)


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_a_second_ctrl_c_does_not_wait(shell: Any) -> None:
    """The first is swallowed, as a library may; the second must end the process all the same."""
    program = (
        "import signal, sys, time\n"
        "from swiftwan.cli.progress import PlainDisplay, cancellable\n"
        "with cancellable(PlainDisplay()):\n"
        "    while True:\n"
        "        try:\n"
        "            print('ready', flush=True)\n"
        "            time.sleep(60)\n"
        "        except KeyboardInterrupt:\n"
        "            pass\n"
    )
    source = Path(swiftwan.cli.__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(source)},
    )
    assert process.stdout is not None
    with process.stdout:
        for _ in range(2):
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130


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


def test_an_interrupt_that_was_swallowed_stops_the_next_step() -> None:
    from swiftwan.cli.progress import PlainDisplay
    from swiftwan.pipelines.result import StepEvent

    display = PlainDisplay()
    display.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        display.on_step(StepEvent("denoise", 1, 20, 0.1))


# The other verbs


def test_explain_loads_and_writes_nothing(fake: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "explain", "a star", "--with", "compile", "--out", "x.png")
    assert (code, out) == (0, "pocket runs TextToImage\nplan: ['compile']\n")
    code, out, _ = call(capsys, "explain", "a star", "--json")
    assert code == 0
    assert json.loads(out)["request"] == {"task": "TextToVideo", "prompt": "a star"}
    assert os.listdir() == []
    assert {name for name, *_ in fake.calls} == {"explain"}


def test_info(fake: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "generate", PROMPT, *SMALL, "--seed", "7", "--out", "x.mp4")
    code, out, _ = call(capsys, "info", "x.mp4")
    assert code == 0
    rows = dict(line.split(maxsplit=1) for line in out.splitlines() if len(line.split()) > 1)
    assert rows["request.seed"] == "7"
    assert rows["media.codec"] == "h264"
    code, out, _ = call(capsys, "info", "x.mp4", "--json")
    told = json.loads(out)
    assert told["record"] == media.read_record(Path("x.mp4"))
    assert told["media"]["num_frames"] == 5


def test_models_tells_what_is_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from huggingface_hub import constants

    def snapshot(name: str) -> Path:
        folder = tmp_path / f"models--Wan-AI--{name}"
        (folder / "snapshots" / "abc").mkdir(parents=True)
        (folder / "snapshots" / "abc" / "model_index.json").touch()
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("abc")
        return folder

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    snapshot("Wan2.1-T2V-1.3B-Diffusers")
    partly = snapshot("Wan2.2-TI2V-5B-Diffusers")
    (partly / "blobs").mkdir()
    (partly / "blobs" / "0123.incomplete").touch()
    code, out, _ = call(capsys, "models", "--json")
    assert code == 0
    states = {row["name"]: row["state"] for row in json.loads(out)["models"]}
    assert states["wan2.1-t2v-1.3b"] == "in the hub cache"
    assert states["wan2.2-ti2v-5b"] == "partly here"
    assert states["wan2.1-t2v-14b"] == "not here"
    code, out, _ = call(capsys, "models")
    assert code == 0
    assert all(name in out for name in states)


def test_models_download(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module = types.ModuleType("swiftwan.weights.download")
    asked = []
    vars(module)["download"] = lambda hub_id: asked.append(hub_id) or Path("/cache/model")
    monkeypatch.setitem(sys.modules, "swiftwan.weights.download", module)
    assert call(capsys, "models", "--download", "wan2.1-t2v-1.3b") == (0, "/cache/model\n", "")
    code, out, _ = call(capsys, "models", "--download", "someone/a-wan", "--json")
    assert json.loads(out) == {"name": "someone/a-wan", "folder": "/cache/model"}
    assert asked == ["Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "someone/a-wan"]


@pytest.mark.parametrize(("state", "code"), [("embedded", 0), ("missing: reinstall swiftwan", 1)])
def test_doctor_says_whether_generate_can_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], state: str, code: int
) -> None:
    monkeypatch.setattr("swiftwan.cli.models.model_states", lambda: [ModelState("pocket", None, state, None)])
    told = call(capsys, "doctor", "--json")
    findings = {finding["name"]: finding["state"] for finding in json.loads(told[1])["findings"]}
    assert told[0] == code
    assert json.loads(told[1])["ready"] is (code == 0)
    assert set(findings) == {"versions", "torch", "gpu", "cpu", "memory", "disk", "video", "pocket", "models"}
    assert findings["torch"] == findings["video"] == "ok"
    assert call(capsys, "doctor")[0] == code


def test_doctor_survives_what_is_broken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> str:
        raise OSError("libcuda.so.1: cannot open\nshared object file")

    monkeypatch.setattr("swiftwan.device.cuda_problem", broken)
    code, out, _ = call(capsys, "doctor", "--json")
    assert code == 1
    gpu = next(finding for finding in json.loads(out)["findings"] if finding["name"] == "gpu")
    assert gpu["state"] == "fail"
    assert gpu["told"] == "OSError: libcuda.so.1: cannot open shared object file"


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ((), ("--help",), ("generate", "-h"), ("doctor", "--help")):
        code, out, err = call(capsys, *arguments)
        assert (code, err) == (0, "")
        assert "Usage" in out
    code, out, _ = call(capsys, "--version")
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
