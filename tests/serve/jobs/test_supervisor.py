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


def kill_at_random(service: Service, jobs: list[str], kills: int, wait: Any) -> None:
    """Kill the worker at random moments until it was done ``kills`` times or nothing is left to do."""
    draw = random.Random(7)
    slot = service.supervisor.slots[0]
    for _ in range(kills):
        wait(lambda: slot.state in ("ready", "busy") and slot.process is not None)
        time.sleep(draw.uniform(0, 0.3))
        if slot.process is not None:
            slot.process.kill()
        if all(service.store.get(job).ended for job in jobs):
            break
    wait(lambda: all(service.store.get(job).ended for job in jobs), seconds=120)


@pytest.mark.parametrize("kills", [pytest.param(10, id="10"), pytest.param(100, id="100", marks=pytest.mark.slow)])
def test_kill_9_of_the_worker_at_random_points_loses_nothing(
    make_service: Make, add_to: Any, wait: Any, kills: int
) -> None:
    service = make_service(patience=Patience(back_off_s=0.3))
    jobs = [add_to(service, prompt=f"job {i}", num_inference_steps=20).id for i in range(kills)]
    kill_at_random(service, jobs, kills, wait)
    states = {service.store.get(job).state for job in jobs}
    assert states <= {"completed", "failed"}
    for job in map(service.store.get, jobs):
        assert job.state == "completed" or (job.error_code == "worker_crashed" and job.error_message)
    check_results(service)


SERVER = """
import sys, time
from pathlib import Path
from swiftwan.serve.jobs.service import Service, ServiceSettings
service = Service(ServiceSettings(Path(sys.argv[1]), command=sys.argv[2:]))
service.start()
time.sleep(600)
"""


@pytest.mark.parametrize("kills", [pytest.param(10, id="10"), pytest.param(100, id="100", marks=pytest.mark.slow)])
def test_kill_9_of_the_whole_server_at_random_points_loses_nothing(
    tmp_path: Path, make_service: Make, add_to: Any, wait: Any, kills: int
) -> None:
    from swiftwan.serve.jobs.store import Store

    service = make_service()
    service.drain()
    jobs = [add_to(service, prompt=f"job {i}", num_inference_steps=30).id for i in range(kills)]
    command, folder = service.settings.command, service.settings.folder
    service.close()
    draw = random.Random(8)
    for _ in range(kills):
        server = subprocess.Popen([sys.executable, "-c", SERVER, str(folder), *command])
        store = Store(folder / "jobs.sqlite3")
        wait(lambda server=server, store=store: server.poll() is not None or store.running() or not store.queue())
        time.sleep(draw.uniform(0, 0.5))
        server.kill()
        server.wait()
        store.close()
    service = make_service(patience=Patience(back_off_s=0.3))
    wait(lambda: all(service.store.get(job).ended for job in jobs), seconds=120)
    check_results(service)
    assert not list(service.folder.root.rglob("*.tmp"))
