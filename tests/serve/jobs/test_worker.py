"""The worker with the pocket model, in this process."""

import errno
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from swiftwan import media
from swiftwan.errors import MemoryLimitError, PlanError, WeightsError
from swiftwan.memory import WillNotFitError
from swiftwan.serve.jobs import worker as worker_module
from swiftwan.serve.jobs.folder import Folder
from swiftwan.serve.jobs.job import Job
from swiftwan.serve.jobs.worker import PutBack, Watch, Worker, WorkerSettings


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    root = tmp_path_factory.mktemp("data")
    Folder(root).make()
    made = Worker(WorkerSettings("cpu", str(root), "pocket", [], device="cpu"), lambda message: None)
    made.engine_for("pocket", [])
    yield made
    made.store.close()


@pytest.fixture
def run(loaded: Worker, request_json: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Queue a request, let the worker run it, and return the job as it ended."""

    def run(model: str = "pocket", **changes: Any) -> Job:
        job, _ = loaded.store.add(request_json | {"num_inference_steps": 2} | changes, model=model, plan=[])
        taken = loaded.store.claim("cpu")
        assert taken is not None
        assert taken.id == job.id
        loaded.work(taken)
        return loaded.store.get(job.id)

    return run


def files_of(worker: Worker, job: Job) -> list[Path]:
    return list((worker.folder.root / "results").glob(f"*{job.id}*"))


def test_a_video_comes_with_its_thumbnail_sheet_and_record(loaded: Worker, run: Any) -> None:
    job = run()
    assert job.state == "completed", job.error_message
    paths = {variant: loaded.folder.path(name) for variant, name in job.files.items()}
    assert set(paths) == {"video", "thumbnail", "spritesheet"}
    facts = media.media_facts(paths["video"])
    assert (facts.width, facts.height, facts.num_frames) == (128, 128, 5)
    assert job.record["sha256"] == hashlib.sha256(paths["video"].read_bytes()).hexdigest()
    assert job.record["seconds"]["denoise"] > 0
    assert len(job.record["step_seconds"]) == 2
    assert paths["thumbnail"].read_bytes()[8:12] == b"WEBP"
    assert paths["spritesheet"].read_bytes()[:3] == b"\xff\xd8\xff"


def test_a_picture_is_a_png(run: Any) -> None:
    assert run(task="TextToImage", num_frames=1).files["image"].endswith(".png")


def test_the_same_request_gives_the_same_file(run: Any) -> None:
    assert run().record["sha256"] == run().record["sha256"]


def test_out_of_memory_fails_that_job_with_advice_and_the_next_passes(
    loaded: Worker, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def no_memory(*_: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        patch.setattr(loaded._engine.parts.vae, "stream_frames", no_memory)
        failed = run(num_frames=9)
    assert (failed.state, failed.error_code) == ("failed", "out_of_memory")
    assert "frames" in str(failed.error_message)
    assert run().state == "completed"


def test_a_full_disk_fails_the_job_leaves_no_file_and_the_next_passes(
    loaded: Worker, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        failed = run()
    assert (failed.state, failed.error_code) == ("failed", "disk_full")
    assert str(loaded.folder.root) not in str(failed.error_message)
    assert files_of(loaded, failed) == []
    assert run().state == "completed"


def test_too_little_room_is_told_before_the_work(loaded: Worker, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swiftwan.serve.jobs.folder.RESERVE_BYTES", 2**60)
    failed = run()
    assert failed.error_code == "disk_full"
    assert failed.record == {}


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (MemoryLimitError("take 5 frames"), "out_of_memory", "take 5 frames"),
        (WillNotFitError("5 frames should fit"), "out_of_memory", "5 frames should fit"),
        (MemoryError(), "out_of_memory", "fewer frames"),
        (PlanError("unknown technique"), "invalid_request", "unknown technique"),
        (WeightsError("/secret/model is damaged"), "model_unavailable", "its log"),
        (KeyError("/secret/path"), "internal", "KeyError"),
    ],
)
def test_every_failure_has_a_code_and_words_without_paths(
    loaded: Worker, run: Any, monkeypatch: pytest.MonkeyPatch, raised: Exception, code: str, words: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(type(loaded._engine), "run", fail)
    failed = run()
    assert (failed.state, failed.error_code) == ("failed", code)
    assert words in str(failed.error_message)
    assert "secret" not in str(failed.error_message)


def test_cancel_stops_between_two_steps(loaded: Worker, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    step = Watch.on_step

    def cancel_at_two(watch: Watch, event: Any) -> None:
        steps.append((event.phase, event.step))
        if steps[-1] == ("denoise", 2):
            loaded.store.cancel(watch.job.id)
        step(watch, event)

    monkeypatch.setattr(Watch, "on_step", cancel_at_two)
    job = run(num_inference_steps=50)
    assert (job.state, job.error_message) == ("cancelled", "cancelled at denoise 2 of 50")
    assert steps[-1] == ("denoise", 2)
    monkeypatch.undo()
    assert run().state == "completed"


def test_a_stopping_server_gets_the_job_back(loaded: Worker, run: Any) -> None:
    loaded.stopping.set()
    try:
        job = run()
    finally:
        loaded.stopping.clear()
    assert (job.state, job.attempt, job.crashes) == ("queued", 1, 0)
    loaded.store.cancel(job.id)


def test_a_preview_shows_while_it_runs(loaded: Worker, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watch, "PREVIEW_S", 0.0)
    job = run(num_inference_steps=3)
    assert loaded.folder.path(loaded.folder.preview(job)).read_bytes()[:3] == b"\xff\xd8\xff"


def test_progress_that_cannot_be_written_does_not_stop_the_job(
    loaded: Worker, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqlite3

    def full(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(loaded.store, "tell", full)
    assert run().state == "completed"


def test_the_end_of_a_job_is_written_once_there_is_room(
    loaded: Worker, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqlite3

    complete, failures = loaded.store.complete, [1, 1]

    def full_at_first(*arguments: Any) -> bool:
        if failures:
            failures.pop()
            raise sqlite3.OperationalError("database or disk is full")
        return complete(*arguments)

    monkeypatch.setattr(loaded.store, "complete", full_at_first)
    monkeypatch.setattr(loaded.stopping, "wait", lambda seconds: False)
    assert run().state == "completed"


def test_a_sick_device_ends_the_process_and_keeps_the_job_for_its_successor(
    loaded: Worker, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Left(BaseException):
        pass

    def leave(code: int) -> None:
        assert code == worker_module.SICK
        raise Left

    monkeypatch.setattr(worker_module, "_answers", lambda kind: False)
    monkeypatch.setattr(worker_module.os, "_exit", leave)
    with pytest.raises(Left):
        run()
    (job,) = loaded.store.running()
    loaded.store.worker_died("cpu", "sick")
    assert loaded.store.get(job.id).state == "queued"
    loaded.store.cancel(job.id)


def test_a_reload_loads_the_model_anew_once(loaded: Worker, run: Any) -> None:
    before = loaded._engine
    loaded.stale.set()
    assert run().record["load_seconds"] > 0
    after = loaded._engine
    assert after is not before
    run()
    assert loaded._engine is after


def test_put_back_is_no_error_of_the_request() -> None:
    assert not issubclass(PutBack, ValueError)
