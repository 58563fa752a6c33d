import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swiftwan.serve.jobs.job import Job
from swiftwan.serve.jobs.store import (
    KeyReusedError,
    QueueFullError,
    Store,
    StoreError,
    UnknownJobError,
    WrongStateError,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "jobs.sqlite3", limit=4)
    yield store
    store.close()


@pytest.fixture
def add(store: Store, request_json: dict[str, Any]) -> Any:
    def add(**options: Any) -> Job:
        return store.add(request_json, **{"model": "pocket", "plan": "auto"} | options)[0]

    return add


def test_a_job_goes_from_queued_to_completed(store: Store, add: Any, request_json: dict[str, Any]) -> None:
    job = add(plan=["tf32"], inputs=["inputs/a.png"], work=2.5)
    assert (job.state, job.progress, job.attempt) == ("queued", 0, 0)
    assert (job.request, job.plan, job.inputs, job.work) == (request_json, ["tf32"], ["inputs/a.png"], 2.5)
    taken = store.claim("cpu")
    assert taken is not None
    assert (taken.id, taken.state, taken.attempt) == (job.id, "in_progress", 1)
    assert store.claim("cpu") is None
    store.tell(taken, "denoise", 1, 2, 3.5)
    told = store.get(job.id)
    assert (told.phase, told.step, told.steps, told.eta_s) == ("denoise", 1, 2, 3.5)
    assert 0 < told.progress < 100
    assert store.complete(taken, {"video": "results/a.mp4"}, {"sha256": "0"})
    done = store.get(job.id)
    assert (done.state, done.progress, done.files, done.record) == (
        "completed",
        100,
        {"video": "results/a.mp4"},
        {"sha256": "0"},
    )


def test_progress_never_falls_and_100_is_only_for_completed(store: Store, add: Any) -> None:
    add()
    job = store.claim("cpu")
    assert job is not None
    seen = []
    for phase, steps in (("load", 0), ("text", 1), ("denoise", 50), ("decode", 21), ("save", 0)):
        for step in range(1, steps + 1) or [0]:
            store.tell(job, phase, step, steps, None)
            seen.append(store.get(job.id).progress)
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert seen[-1] == 99


def test_jobs_run_in_their_order_which_can_be_changed(store: Store, add: Any) -> None:
    first, second, third = add(), add(), add()
    assert [store.position(job) for job in (first, second, third)] == [0, 1, 2]
    store.move(third.id, 0)
    assert [job.id for job in store.queue()] == [third.id, first.id, second.id]
    store.move(third.id, 99)
    assert [job.id for job in store.queue()] == [first.id, second.id, third.id]
    taken = store.claim("cpu")
    assert taken is not None
    assert taken.id == first.id
    with pytest.raises(WrongStateError, match="does not wait"):
        store.move(first.id, 0)


def test_a_paused_queue_starts_nothing(store: Store, add: Any) -> None:
    add()
    store.pause(paused=True)
    assert store.claim("cpu") is None
    store.pause(paused=False)
    assert store.claim("cpu") is not None


def test_the_queue_is_bounded_and_says_how_long_to_wait(store: Store, add: Any) -> None:
    for _ in range(4):
        add()
    with pytest.raises(QueueFullError, match="4 jobs of 4") as told:
        add()
    assert told.value.wait_s == 10
    running = store.claim("cpu")
    assert running is not None
    add()
    store.tell(running, "denoise", 1, 2, 42.0)
    with pytest.raises(QueueFullError) as told:
        add()
    assert told.value.wait_s == 42


def test_the_wait_is_the_work_ahead_at_the_speed_of_the_last_jobs(
    store: Store, add: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("swiftwan.serve.jobs.store.time.time", lambda: now)
    add(work=2.0)
    done = store.claim("cpu")
    assert done is not None
    now += 10
    store.complete(done, {}, {})
    ahead, behind = add(work=3.0), add(work=1.0)
    assert store.wait_s(ahead, workers=1) == 0
    assert store.wait_s(behind, workers=1) == pytest.approx(15)  # 5 s a TFLOP
    assert store.wait_s(behind, workers=3) == pytest.approx(5)


def test_before_any_measure_the_wait_is_unknown(store: Store, add: Any) -> None:
    assert store.wait_s(add(), workers=1) is None


def test_the_same_key_gives_the_same_job(store: Store, add: Any, request_json: dict[str, Any]) -> None:
    job = add(key="k", fingerprint="a")
    again, new = store.add(request_json, model="pocket", plan="auto", key="k", fingerprint="a")
    assert not new
    assert again.id == job.id
    with pytest.raises(KeyReusedError, match="another request"):
        add(key="k", fingerprint="b")
    store.delete(job.id)
    assert add(key="k", fingerprint="b").id != job.id


def test_cancel_ends_a_waiting_job_and_asks_a_running_one(store: Store, add: Any) -> None:
    waiting = add()
    assert store.cancel(waiting.id).state == "cancelled"
    add()
    job = store.claim("cpu")
    assert job is not None
    assert store.wanted(job)
    assert store.cancel(job.id).state == "in_progress"
    assert not store.wanted(job)
    assert store.stopped(job, "denoise 2 of 3")
    ended = store.get(job.id)
    assert (ended.state, ended.error_code, ended.error_message) == (
        "cancelled",
        "cancelled",
        "cancelled at denoise 2 of 3",
    )


def test_cancelling_what_has_ended_changes_nothing(store: Store, add: Any) -> None:
    add()
    job = store.claim("cpu")
    assert job is not None
    store.complete(job, {}, {})
    assert store.cancel(job.id).state == "completed"


def test_only_what_failed_or_was_cancelled_can_be_tried_again(store: Store, add: Any) -> None:
    add()
    job = store.claim("cpu")
    assert job is not None
    with pytest.raises(WrongStateError, match="in_progress"):
        store.retry(job.id)
    store.fail(job, "out_of_memory", "take fewer frames")
    again = store.retry(job.id)
    assert (again.state, again.error_code, again.crashes) == ("queued", None, 0)
    taken = store.claim("cpu")
    assert taken is not None
    assert taken.attempt == 2


def test_a_job_is_queued_again_twice_and_then_fails_with_its_reason(store: Store, add: Any) -> None:
    job = add()
    behind = add()
    for crash in (1, 2):
        taken = store.claim("cpu")
        assert taken is not None
        assert taken.id == job.id, "it keeps its place"
        (after,) = store.worker_died("cpu", "the worker died of SIGKILL")
        assert (after.state, after.crashes) == ("queued", crash)
    store.claim("cpu")
    (after,) = store.worker_died("cpu", "the worker died of SIGKILL")
    assert (after.state, after.error_code, after.error_message) == (
        "failed",
        "worker_crashed",
        "the worker died of SIGKILL",
    )
    assert after.finished_at is not None
    taken = store.claim("cpu")
    assert taken is not None
    assert taken.id == behind.id


def test_a_cancelled_job_whose_worker_dies_is_cancelled(store: Store, add: Any) -> None:
    job = add()
    store.claim("cpu")
    store.cancel(job.id)
    (after,) = store.worker_died("cpu", "died")
    assert (after.state, after.error_code) == ("cancelled", "cancelled")


def test_only_the_dead_workers_job_is_taken_from_it(store: Store, add: Any) -> None:
    add(), add()
    one, two = store.claim("cuda:0"), store.claim("cuda:1")
    assert one is not None
    assert two is not None
    assert [job.id for job in store.worker_died("cuda:1", "died")] == [two.id]
    assert store.get(one.id).state == "in_progress"


def test_a_worker_given_up_for_dead_cannot_overwrite_its_successor(store: Store, add: Any) -> None:
    add()
    late = store.claim("cpu")
    store.worker_died("cpu", "silent")
    successor = store.claim("cpu")
    assert late is not None
    assert successor is not None
    assert not store.wanted(late)
    assert not store.complete(late, {"video": "late"}, {})
    assert not store.fail(late, "x", "x")
    store.tell(late, "save", 0, 0, None)
    assert store.get(late.id).phase == "load"
    assert store.complete(successor, {"video": "right"}, {})
    assert store.get(late.id).files == {"video": "right"}


def test_a_deleted_job_is_gone_at_once_and_its_row_when_its_worker_lets_go(store: Store, add: Any) -> None:
    waiting = add()
    store.delete(waiting.id)
    with pytest.raises(UnknownJobError):
        store.get(waiting.id)
    add()
    running = store.claim("cpu")
    assert running is not None
    store.delete(running.id)
    with pytest.raises(UnknownJobError):
        store.get(running.id)
    assert not store.wanted(running)
    assert store.forget() == []
    store.stopped(running, "denoise")
    assert [job.id for job in store.forget()] == [running.id]
    assert store.page()[0] == []


def test_pages_go_both_ways(store: Store, add: Any) -> None:
    jobs = [add() for _ in range(3)]
    newest, more = store.page(limit=2)
    assert [job.id for job in newest] == [jobs[2].id, jobs[1].id]
    assert more
    rest, more = store.page(limit=2, after=jobs[1].id)
    assert [job.id for job in rest] == [jobs[0].id]
    assert not more
    oldest, _ = store.page(limit=1, order="asc", after=jobs[0].id)
    assert [job.id for job in oldest] == [jobs[1].id]
    assert [job.id for job in store.page(states=("completed",))[0]] == []
    with pytest.raises(UnknownJobError):
        store.page(after="video_none")


def test_many_threads_and_connections_lose_no_job_and_run_none_twice(
    tmp_path: Path, request_json: dict[str, Any]
) -> None:
    path = tmp_path / "many.sqlite3"
    shared = Store(path, limit=1000)
    taken: list[str] = []

    def put() -> None:
        for _ in range(20):
            shared.add(request_json, model="pocket", plan="auto")

    def take(name: str) -> None:
        own = Store(path)
        while len(taken) < 100:
            if job := own.claim(name):
                taken.append(job.id)
                own.complete(job, {}, {})
        own.close()

    threads = [threading.Thread(target=put) for _ in range(5)]
    threads += [threading.Thread(target=take, args=(f"cuda:{i}",)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(set(taken)) == len(taken) == 100
    assert shared.counts()["completed"] == 100
    shared.close()


def test_a_full_disk_leaves_the_queue_as_it_was(store: Store, add: Any, request_json: dict[str, Any]) -> None:
    add()
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(sqlite3.OperationalError, match="full") as told:
        store.add(request_json | {"prompt": "x" * 100_000}, model="pocket", plan="auto")
    assert told.value.sqlite_errorcode == sqlite3.SQLITE_FULL
    assert store.counts()["queued"] == 1
    store._db.execute("PRAGMA max_page_count=1000000")
    add()
    assert store.counts()["queued"] == 2


def test_another_versions_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite3"
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StoreError, match="schema 99"):
        Store(path)


@pytest.mark.parametrize("schema", [1, 2])
def test_a_file_of_an_earlier_schema_is_brought_up_to_date(
    tmp_path: Path, request_json: dict[str, Any], schema: int
) -> None:
    path = tmp_path / "old.sqlite3"
    store = Store(path)
    job, _ = store.add(request_json, model="pocket", plan="auto")
    store._db.executescript("UPDATE jobs SET state = 'completed', started_at = 1, finished_at = 3.5")
    older = "ALTER TABLE jobs DROP COLUMN expired;" if schema == 1 else ""
    store._db.executescript(f"DROP TRIGGER counted; DROP TABLE totals; {older} PRAGMA user_version = {schema};")
    store.close()
    store = Store(path)
    assert store.get(job.id).expired is False
    assert store.seconds_of_jobs() == (1, 2.5), "what was completed before counts"
    store.close()


def test_only_what_ended_long_ago_expires_and_its_inputs_cannot_be_tried_again(store: Store, add: Any) -> None:
    old, running, waiting = add(inputs=["inputs/a.png"]), add(), add()
    first = store.claim("cpu")
    assert first is not None
    store.fail(first, "internal", "no")
    assert store.claim("cpu") is not None
    assert store.expire(0) == []
    assert [job.id for job in store.expire(2e9)] == [old.id]
    assert store.expire(2e9) == []
    assert store.all_files() == set()
    assert [store.get(job.id).state for job in (running, waiting)] == ["in_progress", "queued"]
    with pytest.raises(WrongStateError, match="expired"):
        store.retry(old.id)


def test_records_of_what_ended_long_ago_are_pruned_and_still_count(store: Store, add: Any) -> None:
    ended = {"completed": add(key="once"), "failed": add(), "cancelled": add()}
    first, second = store.claim("cpu"), store.claim("cpu")
    assert first is not None
    assert second is not None
    store.complete(first, {}, {})
    store.fail(second, "internal", "no")
    store.cancel(ended["cancelled"].id)
    running, waiting = add(), add()
    assert store.claim("cpu") is not None
    count, seconds = store.seconds_of_jobs()
    assert count == 1
    assert store.prune(store.get(first.id).finished_at or 0) == [], "only what ended before"
    assert {job.state: job.id for job in store.prune(2e9)} == {state: job.id for state, job in ended.items()}
    for job in ended.values():
        with pytest.raises(UnknownJobError):
            store.get(job.id)
    assert [store.get(job.id).state for job in (running, waiting)] == ["in_progress", "queued"]
    assert store.seconds_of_jobs() == (1, seconds), "a counter of Prometheus must not fall"
    assert add(key="once").id != ended["completed"].id, "a key lives as long as its record"


def test_a_pruned_history_does_not_grow(store: Store, add: Any) -> None:
    pages = []
    for _ in range(40):
        add()
        job = store.claim("cpu")
        assert job is not None
        store.complete(job, {"video": "results/a.mp4"}, {"step_seconds": [1.0] * 500})
        store.prune(2e9)
        pages.append(store._db.execute("PRAGMA page_count").fetchone()[0])
    assert pages[-1] == pages[9]
    assert (store.counts()["completed"], store.seconds_of_jobs()[0]) == (0, 40)
