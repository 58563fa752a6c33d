"""Ctrl-C at any point: exit 130, where it was, and nothing left behind."""

import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import swiftwan.cli
from swiftwan import media

Call = Callable[..., tuple[int, str, str]]
SMALL = ("--width", "32", "--height", "32", "--frames", "5", "--steps", "4")


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
@pytest.mark.parametrize("phase", ["load", "text", "denoise", "decode"])
def test_ctrl_c_ends_the_run_and_leaves_nothing(shell: Any, phase: str) -> None:
    process = shell.start("generate", "x", "--steps", "2", FAKE_STUCK_IN=phase)
    for line in process.stderr:
        if line == f"stuck in {phase}\n":
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1].startswith(f"cancelled at {phase}")
    assert err.splitlines()[-1].endswith("; nothing was written")
    assert "Traceback" not in err
    assert os.listdir(shell.here) == []


def test_ctrl_c_while_the_file_is_written(
    fake: types.SimpleNamespace, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(os, "fsync", lambda _: signal.raise_signal(signal.SIGINT))
    try:
        code, out, err = call("generate", "x", *SMALL)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "cancelled at save; nothing was written"
    assert os.listdir() == []


def test_ctrl_c_just_after_the_file_got_its_name(
    fake: types.SimpleNamespace, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    replace = os.replace

    def replace_then_interrupt(*names: Any) -> None:
        replace(*names)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "replace", replace_then_interrupt)
    try:
        code, _, err = call("generate", "x", *SMALL)
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


def test_an_interrupt_that_was_swallowed_stops_the_next_step() -> None:
    from swiftwan.cli.progress import PlainDisplay
    from swiftwan.pipelines.result import StepEvent

    display = PlainDisplay()
    display.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        display.on_step(StepEvent("denoise", 1, 20, 0.1))
