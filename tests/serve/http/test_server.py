"""The whole program: `swiftwan serve` with the pocket model, called by OpenAI's own client."""

import base64
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from PIL import Image

from swiftwan.cli import main
from swiftwan.errors import RequestError
from swiftwan.serve.http.server import check_safe
from swiftwan.serve.jobs.store import Store

KEY = "a-key-for-these-tests"
PROMPT = "a red circle moves left over a blue background"
SMALL: dict[str, Any] = {"num_frames": 5, "num_inference_steps": 2, "guidance_scale": 1.0, "seed": 3}


class Served:
    """A server process and a client of it."""

    def __init__(self, folder: Path) -> None:
        import openai

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = folder / "log"
        self.data = folder / "data"
        environment = os.environ | {"SWIFTWAN_API_KEY": KEY, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "swiftwan", "serve", "--port", str(port), "--data", str(self.data)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen([*command, "--device", "cpu"], env=environment, stderr=log)
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=8, timeout=60)
        self.models()

    def models(self) -> None:
        import openai

        for _ in range(300):
            try:
                self.client.with_options(max_retries=0).models.list()
                return
            except openai.APIConnectionError:
                assert self.process.poll() is None, self.log.read_text()
                time.sleep(0.2)
        raise AssertionError(self.log.read_text())

    def ended(self, video: Any) -> Any:
        for _ in range(600):
            video = self.client.videos.retrieve(video.id)
            if video.status in ("completed", "failed"):
                return video
            time.sleep(0.1)
        raise AssertionError(f"{video}\n{self.log.read_text()}")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("served"))
    yield made
    made.process.kill()
    made.process.wait()


@pytest.fixture(autouse=True)
def _the_client_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Sora API", DeprecationWarning)
        yield


def test_openais_client_makes_a_video(served: Served) -> None:
    made = served.client.videos.create(prompt=PROMPT, size="128x128", extra_body=SMALL)
    assert (made.object, made.status, made.model, made.size) == ("video", "queued", "pocket", "128x128")
    done = served.ended(made)
    assert (done.status, done.progress, done.error) == ("completed", 100, None)
    assert done.completed_at >= done.created_at
    content = served.client.videos.download_content(made.id).read()
    assert content[4:8] == b"ftyp"
    assert hashlib.sha256(content).hexdigest() == done.wan["sha256"]
    assert served.client.videos.download_content(made.id, variant="thumbnail").read()[8:12] == b"WEBP"
    assert served.client.videos.download_content(made.id, variant="spritesheet").read()[:2] == b"\xff\xd8"
    assert made.id in [video.id for video in served.client.videos.list(limit=1)]
    assert served.client.videos.delete(made.id).deleted


def test_openais_client_makes_pictures(served: Served) -> None:
    told = served.client.images.generate(
        prompt=PROMPT, n=2, size="128x128", extra_body={"num_inference_steps": 1, "seed": 5}
    )
    pictures = [base64.b64decode(picture.b64_json) for picture in told.data]
    assert [picture[:4] for picture in pictures] == [b"\x89PNG"] * 2
    assert pictures[0] != pictures[1]


def test_openais_client_edits_a_picture(served: Served) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (128, 128), "red").save(buffer, "png")
    told = served.client.images.edit(
        image=("../../a.png", buffer.getvalue()),
        prompt=PROMPT,
        extra_body={"creativity": 0.5, "num_inference_steps": 2},
    )
    picture = Image.open(io.BytesIO(base64.b64decode(told.data[0].b64_json)))
    assert picture.size == (128, 128)
    assert str(served.data) not in str(picture.info)


def test_openais_client_understands_refusals(served: Served) -> None:
    import openai

    with pytest.raises(openai.BadRequestError) as wrong:
        served.client.videos.create(prompt=PROMPT, size="100x128")
    assert wrong.value.param == "width"
    with pytest.raises(openai.UnprocessableEntityError):
        served.client.videos.create(prompt=PROMPT, size="90000x90000")
    with pytest.raises(openai.NotFoundError):
        served.client.videos.retrieve("video_none")
    with pytest.raises(openai.AuthenticationError):
        served.client.with_options(api_key="wrong").videos.list()


def test_a_listener_sees_progress_rise_and_the_end(served: Served) -> None:
    made = served.client.videos.create(prompt=PROMPT, size="128x128", extra_body=SMALL | {"num_inference_steps": 6})
    seen = []
    url = f"{served.client.base_url}videos/{made.id}/events"
    with urlopen(Request(url, headers={"Authorization": f"Bearer {KEY}"}), timeout=60) as lines:
        for line in lines:
            if line.startswith(b"data: "):
                seen.append(json.loads(line.removeprefix(b"data: ")))
    progress = [event["progress"] for event in seen]
    assert progress == sorted(progress)
    assert progress[-1] == 100
    assert {event["status"] for event in seen} >= {"in_progress", "completed"}


def test_cancel_ends_a_running_video_soon(served: Served) -> None:
    made = served.client.videos.create(prompt=PROMPT, extra_body={"num_inference_steps": 500})
    while served.client.videos.retrieve(made.id).status == "queued":
        time.sleep(0.05)
    served.client.post(f"/videos/{made.id}/cancel", cast_to=object)
    began = time.monotonic()
    ended = served.ended(made)
    assert (ended.status, ended.error.code) == ("failed", "cancelled")
    assert time.monotonic() - began < 20  # a step and two seconds, on a machine that others use too


def test_sigterm_lets_the_running_job_end_and_exits_0(served: Served) -> None:
    running, waiting = (
        served.client.videos.create(prompt=PROMPT, size="128x128", extra_body=SMALL | {"num_inference_steps": 8})
        for _ in range(2)
    )
    while served.client.videos.retrieve(running.id).status == "queued":
        time.sleep(0.02)
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(60) == 0, served.log.read_text()
    store = Store(served.data / "jobs.sqlite3")
    assert store.get(running.id).state == "completed"
    assert store.get(waiting.id).state == "queued"
    store.close()
    assert KEY not in served.log.read_text()
    assert PROMPT not in served.log.read_text()


# What is refused before anything starts


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org"])
def test_others_are_not_served_without_a_key(host: str) -> None:
    with pytest.raises(RequestError, match="no key"):
        check_safe(host, None)
    check_safe(host, "x" * 16)


def test_a_port_that_is_taken_is_told_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "--device", "cpu", "--data", str(tmp_path / "data"), "--port", str(port)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"error: port {port} of '127.0.0.1' cannot be had: Address already in use; choose another --port."
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("key", ["", "short", "x" * 15, "sixteen signs äöü", "line\nbreak and more"])
def test_a_weak_key_is_refused(key: str) -> None:
    with pytest.raises(RequestError, match="16 or more"):
        check_safe("127.0.0.1", key)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "no key"),
        (["--key-file", "/no/such/file"], "cannot be read"),
        (["--model", "pokcet"], "pokcet"),
        (["--model", "pocket", "--model", "pokcet"], "pokcet"),
        (["--keep", "0"], "--keep"),
        (["--with", "quantise:fp8"], "quantise"),
        (["--plan", "auot"], "Did you mean 'auto'?"),
        (["--dtype", "bf61"], "Did you mean 'bf16'?"),
        (["--device", "cpu", "--device", "cpu:1"], "there is one cpu here"),
        (["--device", "cdua"], "Did you mean 'cuda'?"),
    ],
)
def test_the_command_line_says_what_is_wrong(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SWIFTWAN_API_KEY", raising=False)
    assert main(["serve", "--data", str(tmp_path / "data"), *arguments]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told
    assert not (tmp_path / "data").exists()
