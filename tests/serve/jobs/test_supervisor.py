"""Real processes that only pretend to run a model."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swiftwan.errors import OutputError
from swiftwan.serve.jobs.service import Service, ServiceSettings
from swiftwan.serve.jobs.store import Store
from swiftwan.serve.jobs.supervisor import Patience

Make = Callable[..., Service]


def expected(prompt: str) -> str:
    return hashlib.sha256(prompt.encode() * 10_000).hexdigest()


def check_results(service: Service) -> None:
    """Every visible file is whole, and every completed job has one."""
    for path in (service.folder.root / "results").glob("video_*"):
        job_id = path.name.partition(".")[0]
        prompt = service.store.get(job_id).request["prompt"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == expected(prompt)
    for job in service.store.page(limit=1000)[0]:
        if job.state == "completed":
            assert service.folder.path(job.files["video"]).exists()


def test_jobs_run_and_survive_a_restart_of_the_server(make_service: Make, add_to: Any, wait: Any) -> None:
    service = make_service()
    done = add_to(service)
    wait(lambda: service.store.get(done.id).ended)
    assert service.store.get(done.id).state == "completed"
    service.store.pause(paused=True)
    waiting = add_to(service)
    service.drain()
    service.close()

    service = make_service()
    assert service.store.get(done.id).record["sha256"] == expected(done.request["prompt"])
    assert service.store.get(waiting.id).state == "queued"
    service.store.pause(paused=False)
    wait(lambda: service.store.get(waiting.id).ended)
    check_results(service)


def test_one_folder_has_one_server(make_service: Make) -> None:
    service = make_service()
    with pytest.raises(OutputError, match="another server uses"):
        Service(ServiceSettings(service.settings.folder))


def test_a_queue_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite3").mkdir()
    with pytest.raises(OutputError, match=r"the queue in '.*' cannot be written"):
        Service(ServiceSettings(tmp_path))


def test_a_cancelled_job_stops_within_a_step_and_the_next_one_runs(make_service: Make, add_to: Any, wait: Any) -> None:
    service = make_service()
    long, short = add_to(service, num_inference_steps=100_000), add_to(service)
    wait(lambda: service.store.get(long.id).step > 0)
    service.store.cancel(long.id)
    wait(lambda: service.store.get(long.id).ended, seconds=5)
    ended = service.store.get(long.id)
    assert (ended.state, ended.error_code) == ("cancelled", "cancelled")
    assert "denoise" in str(ended.error_message)
    wait(lambda: service.store.get(short.id).state == "completed")
    assert service.supervisor.slots[0].restarts == 0


def test_a_deleted_running_job_stops_and_leaves_no_file(make_service: Make, add_to: Any, wait: Any) -> None:
    service = make_service()
    job = add_to(service, num_inference_steps=100_000)
    wait(lambda: service.store.get(job.id).step > 0)
    service.delete(job.id)
    wait(lambda: not service.store.running())
    wait(lambda: not list(service.folder.root.rglob(f"*{job.id}*")))


def test_a_job_that_kills_its_worker_three_times_fails_and_the_next_one_runs(
    make_service: Make, add_to: Any, wait: Any
) -> None:
    service = make_service()
    poison, good = add_to(service, num_inference_steps=100_000), add_to(service)
    slot = service.supervisor.slots[0]
    for attempt in (1, 2, 3):
        wait(lambda attempt=attempt: (job := service.store.get(poison.id)).attempt == attempt and job.step > 0)
        assert slot.process is not None
        slot.process.kill()
    wait(lambda: service.store.get(good.id).ended)
    failed = service.store.get(poison.id)
    assert (failed.state, failed.error_code) == ("failed", "worker_crashed")
    assert "SIGKILL" in str(failed.error_message)
    assert service.store.get(good.id).state == "completed"


def test_a_worker_that_hangs_is_replaced(make_service: Make, add_to: Any, wait: Any) -> None:
    service = make_service(patience=Patience(silent_s=3.0))
    job = add_to(service, num_inference_steps=300)
    wait(lambda: service.store.get(job.id).step > 0)
    slot = service.supervisor.slots[0]
    assert slot.process is not None
    os.kill(slot.process.pid, signal.SIGSTOP)
    wait(lambda: service.store.get(job.id).state == "completed")
    assert service.store.get(job.id).attempt == 2


def test_a_worker_that_cannot_start_makes_the_service_defunct(tmp_path: Path, wait: Any) -> None:
    command = (sys.executable, "-c", "raise SystemExit(3)")
    service = Service(ServiceSettings(tmp_path, command=command, patience=Patience(back_off_s=0.1)))
    service.start()
    wait(lambda: service.readiness == "DEFUNCT")
    service.drain()
    service.close()


def test_a_drain_lets_the_running_job_end(make_service: Make, add_to: Any, wait: Any) -> None:
    service = make_service()
    running, waiting = add_to(service, num_inference_steps=100), add_to(service)
    wait(lambda: service.store.get(running.id).step > 0)
    service.drain()
    assert service.store.get(running.id).state == "completed"
    assert service.store.get(waiting.id).state == "queued"
    service.close()


def test_a_drain_out_of_time_puts_the_job_back_without_blame(make_service: Make, add_to: Any, wait: Any) -> None:
    service = make_service(grace_s=0.2)
    job = add_to(service, num_inference_steps=100_000)
    wait(lambda: service.store.get(job.id).step > 0)
    service.drain()
    after = service.store.get(job.id)
    assert (after.state, after.crashes, after.step) == ("queued", 0, 0)
    service.close()


# kill -9 at random points

KILLS = [pytest.param(50, id="50", marks=pytest.mark.slow), pytest.param(500, id="500", marks=pytest.mark.long)]
"""Of each kind; the two kinds make a hundred in every run of the tests."""


@pytest.mark.parametrize("kills", KILLS)
def test_kill_9_of_the_worker_at_random_points_loses_nothing(
    make_service: Make, add_to: Any, wait: Any, kills: int
) -> None:
    service = make_service(patience=Patience(back_off_s=0.01), queue_limit=kills)
    jobs = [add_to(service, prompt=f"job {i}", num_inference_steps=12).id for i in range(kills)]
    slot = service.supervisor.slots[0]
    draw = random.Random(7)
    killed = 0
    for _ in range(kills):
        wait(lambda killed=killed: slot.process is not None and slot.process.pid != killed)
        time.sleep(draw.uniform(0, 0.3))  # while it starts, waits, works or writes
        assert slot.process is not None
        killed = slot.process.pid
        slot.process.kill()
    wait(lambda: all(service.store.get(job).ended for job in jobs), seconds=200)
    assert slot.restarts >= kills
    check_every_job_ended(service, jobs)


ZYGOTE = """
import os, sys
from pathlib import Path
from swiftwan.serve.jobs.service import Service, ServiceSettings
from swiftwan.serve.jobs.store import Store
from swiftwan.serve.jobs.supervisor import Patience
for line in sys.stdin:
    child = os.fork()
    os.setpgid(child, child)  # by both, so that it is done when either goes on
    if child == 0:
        service = Service(ServiceSettings(Path(sys.argv[1]), command=sys.argv[2:], patience=Patience(back_off_s=0.01)))
        service.start()
        import time
        time.sleep(600)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""
"""Starts servers, one after the other, each a process of its own; the imports, two seconds of a core, are made once."""


@pytest.mark.parametrize("kills", KILLS)
def test_kill_9_of_the_whole_server_at_random_points_loses_nothing(
    make_service: Make, add_to: Any, wait: Any, kills: int
) -> None:
    service = make_service(queue_limit=kills)
    service.drain()
    jobs = [add_to(service, prompt=f"job {i}", num_inference_steps=12).id for i in range(kills)]
    command, folder = service.settings.command, service.settings.folder
    service.close()
    draw = random.Random(8)
    zygote = subprocess.Popen(
        [sys.executable, "-c", ZYGOTE, str(folder), *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert zygote.stdin is not None
    assert zygote.stdout is not None
    store = Store(folder / "jobs.sqlite3")
    for number in range(kills):
        zygote.stdin.write("start\n")
        zygote.stdin.flush()
        server = int(zygote.stdout.readline())
        if number % 3:  # every third is killed while it starts
            wait(lambda: store.running() or not store.queue())
        time.sleep(draw.uniform(0, 0.25))
        if number % 2:
            os.kill(server, signal.SIGKILL)
        else:
            os.killpg(server, signal.SIGKILL)  # its worker with it
        assert zygote.stdout.readline() == "gone\n"
    store.close()
    zygote.stdin.close()
    assert zygote.wait(10) == 0
    zygote.stdout.close()
    service = make_service(patience=Patience(back_off_s=0.01))
    wait(lambda: all(service.store.get(job).ended for job in jobs), seconds=200)
    check_every_job_ended(service, jobs)
    assert not list(service.folder.root.rglob("*.tmp"))


def check_every_job_ended(service: Service, jobs: list[str]) -> None:
    ended = [service.store.get(job) for job in jobs]
    assert sum(job.state == "completed" for job in ended) > len(jobs) / 4
    for job in ended:
        assert job.state == "completed" or (job.state, job.error_code, job.crashes) == ("failed", "worker_crashed", 3)
    check_results(service)
