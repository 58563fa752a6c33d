"""A service without workers, one whose workers only pretend, and one with the pocket model."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from swiftwan.serve.jobs.job import Job
from swiftwan.serve.jobs.service import Service, ServiceSettings

REQUEST = {
    "task": "TextToVideo",
    "prompt": "a red circle moves left over a blue background",
    "negative_prompt": "",
    "width": 128,
    "height": 128,
    "num_frames": 5,
    "fps": 16,
    "num_inference_steps": 3,
    "guidance_scale": 1.0,
    "flow_shift": 3.0,
    "scheduler": "euler",
    "seed": 7,
}

DEVICE: dict[str, Any] = {
    "torch_device": "cpu",
    "name": "a CPU of 8 GB",
    "total_bytes": 8 * 10**9,
    "free_bytes": 7 * 10**9,
    "capability": None,
    "cores": 2,
    "dtype": "float32",
    "dtype_reason": "it is a test",
}

PRETENDING = (sys.executable, str(Path(__file__).parent / "pretending_worker.py"))


@pytest.fixture
def request_json() -> dict[str, Any]:
    return dict(REQUEST)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Service]:
    """A service that takes jobs and has nobody to run them; a test can claim them itself."""
    service = Service(ServiceSettings(tmp_path / "data", queue_limit=5))
    service.supervisor.slots[0].device = DEVICE
    service.admitting = True
    yield service
    service.close()


@pytest.fixture
def make_service(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Start services on one folder; those still running are stopped at the end."""
    made: list[Service] = []

    def make(**settings: Any) -> Service:
        service = Service(ServiceSettings(tmp_path / "data", **{"command": PRETENDING, "grace_s": 10.0} | settings))
        made.append(service)
        service.start()
        until(lambda: bool(service.supervisor.devices))
        return service

    yield make
    for service in made:
        if service.admitting:
            service.drain()
            service.close()


def until(true: Callable[[], bool], *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture
def wait() -> Callable[..., None]:
    return until


@pytest.fixture(scope="session", name="until")
def _until() -> Callable[..., None]:
    return until


@pytest.fixture(scope="session")
def pretending() -> tuple[str, ...]:
    """The command of a worker that only pretends."""
    return PRETENDING


@pytest.fixture
def add_to() -> Callable[..., Job]:
    """Queue the request of these tests, with changes."""

    def add(service: Service, **changes: Any) -> Job:
        job, new = service.store.add(REQUEST | changes, model="pocket", plan="auto")
        assert new
        return job

    return add
