"""A whole LoRA run on the pocket model: learning, stopping anywhere, where the log goes."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tests.train.conftest import SMALL, rows, same

from swiftwan.engine import Engine
from swiftwan.errors import OutputError, SwiftwanError, UnavailableError
from swiftwan.train.checkpoint import KEPT, Checkpoints
from swiftwan.train.lora import trackers, train

ARGUMENTS = [
    "--steps",
    "6",
    "--rank",
    "2",
    "--targets",
    "self,ffn-out",
    "--frames",
    "9",
    "--learning-rate",
    "3e-3",
    "--warmup",
    "1",
    "--held-out",
    "0.2",
    "--ema",
    "0.9",
    "--validate-every",
    "3",
    "--checkpoint-every",
    "2",
    "--device",
    "cpu",
    "--dtype",
    "fp32",
]


def without_times(out):
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows(out)]


def test_a_run_s_folder(whole):
    assert {path.name for path in whole.iterdir()} >= {
        "run.json",
        "data.txt",
        "log.jsonl",
        "loss.svg",
        "lora.safetensors",
    }
    assert "4 items of" in (whole / "data.txt").read_text()
    assert [row["step"] for row in rows(whole)] == [0, 3, 6, 6]
    losses = [row["held_out"] for row in rows(whole) if "held_out" in row]
    assert losses[0] != losses[-1]
    assert len(Checkpoints(whole / "checkpoints").paths()) == KEPT
    assert (whole / "loss.svg").read_text().count("<polyline") == 2


def test_training_lowers_the_loss_on_what_it_sees(clips, tmp_path, engine):
    settings = replace(SMALL, steps=30, held_out=0.0, drop_caption=0.0, accumulate=2, rank=8, targets=("all",))
    engine.parts.transformer.proj_out.bias += 0.3  # a fault that the adapter can mend
    train(engine, str(clips), tmp_path, settings)
    losses = [row["loss"] for row in rows(tmp_path) if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]


# Stopping


@pytest.mark.parametrize("step", [1, 5])
def test_a_run_that_was_killed_goes_on_to_the_bit(clips, tmp_path, whole, step):
    command = [sys.executable, "-c", "from swiftwan.cli import main; raise SystemExit(main())"]
    killer = (
        "import os, signal; from swiftwan.train.run import Run; update = Run.update\n"
        "def killed(run):\n"
        f"    if run.step == {step}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    update(run)\n"
        "Run.update = killed\n"
    )
    command[2] = killer + command[2]
    arguments = ["train", "lora", str(clips), "--out", str(tmp_path), *ARGUMENTS]
    # Warnings of a child are not this test's.
    ended = subprocess.run([*command, *arguments], env={**os.environ, "PYTHONWARNINGS": "ignore"}, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert not (tmp_path / "lora.safetensors").exists()
    train(Engine.load("pocket", plan=[], device="cpu", dtype="fp32"), str(clips), tmp_path, SMALL)
    assert same(tmp_path, whole)
    resumed = [row for row in without_times(tmp_path) if "held_out" in row]
    assert resumed == [row for row in without_times(whole) if "held_out" in row]


def test_a_checkpoint_is_the_whole_state_with_eight_bit_adam_too(clips, tmp_path):
    settings = replace(SMALL, optimizer="adamw8bit", rank=32, targets=("ffn",))
    for out, stops in (("whole", (6,)), ("parts", (4, 6))):
        for steps in stops:
            engine = Engine.load("pocket", plan=[], device="cpu", dtype="fp32")
            stopped = replace(settings, steps=6)
            if steps < 6:
                with pytest.raises(KeyboardInterrupt):
                    train(engine, str(clips), tmp_path / out, stopped, on_step=interrupt_at(steps))
            else:
                train(engine, str(clips), tmp_path / out, stopped)
    assert same(tmp_path / "whole", tmp_path / "parts")


def interrupt_at(step):
    def on_step(phase, done, of):
        if (phase, done) == ("train", step + 1):
            raise KeyboardInterrupt

    return on_step


def test_a_full_disk_keeps_the_last_good_checkpoint(clips, tmp_path, engine, monkeypatch):
    from swiftwan.weights import write

    save_file = write.save_file

    def full(tensors, path, **options):
        if "step-00000004" in path.name:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, **options)

    monkeypatch.setattr(write, "save_file", full)
    with pytest.raises(OutputError, match=r"step-00000004.* cannot be written: No space.*step-00000002.*same command"):
        train(engine, str(clips), tmp_path, SMALL)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002.safetensors"]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(whole, tmp_path, caplog):
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    newest = checkpoints.paths()[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    assert checkpoints.latest().step == 4
    assert "is damaged and not used" in caplog.text


def test_a_save_takes_away_the_halves_of_a_run_that_was_killed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for half in (".step-00000002.safetensors.1a2b3c4d.tmp", ".tmpAEepkF"):  # ours, and safetensors' own
        (tmp_path / half).write_bytes(b"half")
    checkpoints.save(2, {"a": torch.ones(2)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002.safetensors"]
    assert checkpoints.latest().step == 2


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(clips, tmp_path, engine, monkeypatch):
    from swiftwan.train import flow

    real, calls = flow.loss, []

    def broken(*arguments):
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(flow, "loss", broken)
    settings = replace(SMALL, held_out=0.0)
    with pytest.raises(SwiftwanError, match=r"not finite from step 4 on.*last good checkpoint is .*step-00000002"):
        train(engine, str(clips), tmp_path, settings)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002.safetensors"]
    assert not (tmp_path / "lora.safetensors").exists()


# Where the log goes


def test_tensorboard_gets_every_row(tmp_path):
    pytest.importorskip("tensorboard")
    (tracker,) = trackers(["tensorboard"], tmp_path / "run")
    tracker.log({"loss": 0.5}, step=3)
    tracker.finish()
    (events,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    assert b"loss" in events.read_bytes()


def test_a_tracker_without_its_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(UnavailableError, match="logging to wandb needs its package: pip install wandb"):
        trackers(["wandb"], tmp_path)
