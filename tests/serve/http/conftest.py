"""The application over a queue that nobody works on; the tests play the worker."""

import io
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from swiftwan.serve.http.app import make_app
from swiftwan.serve.jobs.job import Job
from swiftwan.serve.jobs.service import Service

BASE = "http://127.0.0.1:8000"


@pytest.fixture
def client(desk: Service) -> Iterator[TestClient]:
    with TestClient(make_app(desk, key=None), base_url=BASE, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def png() -> Any:
    """Make a picture's bytes."""

    def png(width: int = 32, height: int = 32) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (width, height), "red").save(buffer, "png")
        return buffer.getvalue()

    return png


@pytest.fixture
def error_of() -> Any:
    """Read an error as a client does: its status, field and code; nothing of ours may be in it."""

    def error_of(response: Any) -> tuple[int, str | None, str]:
        told = response.json()["error"]
        assert set(told) == {"message", "type", "param", "code"}
        assert "Traceback" not in told["message"]
        assert "/tmp" not in told["message"]
        assert "\n" not in told["message"]
        return response.status_code, told["param"], told["code"]

    return error_of


@pytest.fixture
def finish(desk: Service) -> Any:
    """Do what a worker would."""

    def finish(data: bytes = b"0123456789") -> Job:
        job = desk.store.claim("cpu")
        assert job is not None
        picture = job.request["num_frames"] == 1
        names = {"image" if picture else "video": desk.folder.result(job, ".png" if picture else ".mp4")}
        names |= {"thumbnail": desk.folder.result(job, ".thumbnail.webp")}
        for name in names.values():
            desk.folder.write(name, [data])
        record = {"sha256": "0", "seconds": {"text": 1.0}, "peak_bytes": 2**20, "step_seconds": []}
        desk.store.complete(job, names, record)
        return desk.store.get(job.id)

    return finish
