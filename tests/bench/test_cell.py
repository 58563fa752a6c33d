"""Real cells in this process, at the smallest size that is still a video."""

from dataclasses import replace
from pathlib import Path

import pytest

from swiftwan.bench.cell import Job, attempt, expanded
from swiftwan.bench.matrix import BenchPlan, Cell
from swiftwan.errors import PlanError
from swiftwan.media import read_frames, read_record

CELL = Cell(
    case="tiny",
    model="pocket",
    request_name="a",
    request={
        "task": "TextToVideo",
        "prompt": "a red circle moves left over a blue background",
        "seed": 7,
        "width": 32,
        "height": 32,
        "num_frames": 5,
        "num_inference_steps": 2,
    },
    plan=BenchPlan("plain", dtype="fp32"),
    baseline="peer",
    runs=1,
    warm_up_steps=1,
    metrics=("psnr", "ssim", "lpips"),
    device="cpu",
)


def job(folder: Path, cell: Cell = CELL, number: int = 0) -> Job:
    return Job(cell, number, folder, f"{cell.plan.name}-1", folder / "reference" / "0.safetensors")


def test_a_plan_beside_the_peer_on_the_same_weights(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SWIFTWAN_LPIPS", str(tmp_path / "none.safetensors"))
    peer = replace(CELL, plan=BenchPlan("peer", peer="diffusers", dtype="fp32"))

    baseline = attempt(job(tmp_path, peer))
    ours = attempt(job(tmp_path, CELL))

    assert (baseline["status"], ours["status"]) == ("ok", "ok"), (baseline["reason"], ours["reason"])
    assert baseline["error"] == {"missing": "it is the baseline"}
    assert ours["error"] < 1e-3, "diffusers and swiftwan paint the same video"
    assert ours["quality"]["psnr_db"] > 50
    assert "no LPIPS weights" in ours["quality"]["lpips"]["missing"]
    for row in (baseline, ours):
        (run,) = row["runs"]
        assert set(run["phase_seconds"]) == {"text", "denoise", "decode"}
        assert len(run["step_seconds"]) == 2
        assert run["throughput_frames_per_second"] * run["frame_latency_seconds"] == pytest.approx(1)
        assert row["ceiling_tflop_per_second"] > 0
        assert [phase for _, phase in row["hardware"]["phases"]] == ["text", "denoise", "decode"]
    video = tmp_path / ours["video"]
    assert read_frames(video).shape == (5, 32, 32, 3)
    assert read_record(video)["request"]["seed"] == 7


def test_later_rounds_measure_and_leave_no_video(tmp_path) -> None:
    row = attempt(job(tmp_path, number=1))
    assert row["status"] == "ok"
    assert "video" not in row
    assert not list((tmp_path / "videos").iterdir())


@pytest.mark.parametrize(
    ("changes", "status", "told"),
    [
        ({"plan": BenchPlan("x", ("attention-slcing",))}, "refused", "unknown technique 'attention-slcing'"),
        ({"plan": BenchPlan("x", ("lora:$NOT_SET_ANYWHERE",))}, "refused", "not set"),
        ({"model": "no-such-model"}, "refused", "no model"),
        ({"request": CELL.request | {"num_frames": 6}}, "refused", "4k + 1"),
    ],
)
def test_what_cannot_run_says_why(tmp_path, changes, status, told) -> None:
    row = attempt(job(tmp_path, replace(CELL, **changes)))
    assert row["status"] == status
    assert told in row["reason"]


def test_out_of_memory_and_surprises_are_told_apart(tmp_path, monkeypatch) -> None:
    import torch

    from swiftwan.bench import cell

    def fail(error):
        def load(*_):
            raise error

        monkeypatch.setattr(cell, "_loader", load)
        return attempt(job(tmp_path))

    assert fail(torch.OutOfMemoryError("tried to allocate\n9 GiB")) == {
        "status": "oom",
        "reason": "tried to allocate 9 GiB",
    }
    assert fail(KeyError("x"))["reason"] == "KeyError: 'x'"


def test_a_folder_without_room_is_no_row(tmp_path, monkeypatch) -> None:
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 0))
    row = attempt(job(tmp_path))
    assert row["status"] == "no space"
    assert "0.0 MiB free" in row["reason"]


def test_the_baselines_missing_video_is_a_reason_not_an_error(tmp_path) -> None:
    row = attempt(job(tmp_path))
    assert row["status"] == "ok"
    assert row["quality"]["psnr_db"] == {"missing": "the baseline has no video to compare with"}


def test_variables_in_a_plan(monkeypatch) -> None:
    monkeypatch.setenv("MY_LORA", "/x/y.safetensors")
    assert expanded(BenchPlan("x", ("lora:$MY_LORA=0.7",))) == ["lora:/x/y.safetensors=0.7"]
    assert expanded(BenchPlan("x", "auto")) == "auto"
    assert expanded(BenchPlan("x", "none")) == []
    with pytest.raises(PlanError):
        expanded(BenchPlan("x", ("lora:$MY_OTHER_LORA",)))


def test_a_job_survives_json(tmp_path) -> None:
    import json

    one = job(tmp_path)
    assert Job.from_json(json.loads(json.dumps(one.to_json()))) == one
