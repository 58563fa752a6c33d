"""``download`` against a small server that speaks the hub's routes, in a process of its own."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "c0ffee" * 6 + "c0ff"
REPO = "someone/Wan-Tiny-Diffusers"
LARGE = 24_000_000  # the hub's library reads chunks of 10 MB, and takes up after a whole one

FILES = {
    "model_index.json": b"{}",
    "README.md": b"words",
    "vae/config.json": b'{"a": 1}',
    "vae/diffusion_pytorch_model.safetensors": os.urandom(LARGE),
    "vae/diffusion_pytorch_model.fp16.safetensors": os.urandom(50),
    "text_encoder/model-00001-of-00001.safetensors": os.urandom(1000),
    "text_encoder/pytorch_model.bin": os.urandom(10),
    "text_encoder/onnx/model.safetensors": os.urandom(10),
    "tokenizer/spiece.model": os.urandom(100),
    "scheduler/scheduler_config.json": b'{"flow_shift": 3}',
    "assets/comic.png": os.urandom(10),
    "loose.safetensors": os.urandom(10),
}
WANTED = {
    "model_index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model-00001-of-00001.safetensors",
    "tokenizer/spiece.model",
    "scheduler/scheduler_config.json",
}


class Hub(ThreadingHTTPServer):
    """One repository. ``broken`` files stop once in the middle; ``lying`` ones come damaged ``n`` times."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(FILES)
        self.broken: set[str] = set()
        self.lying: dict[str, int] = {}
        self.refusal: tuple[int, str] | None = None
        self.sent: list[tuple[str, str | None]] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.server.refusal and REPO in path:
            self.reply(self.server.refusal[0], b"{}", {"X-Error-Code": self.server.refusal[1]})
        elif path == f"/api/models/{REPO}/tree/{COMMIT}":
            self.json([{"type": "file", "path": n, **self.facts(n, "oid")} for n in self.server.files])
        elif path in (f"/api/models/{REPO}", f"/api/models/{REPO}/revision/main"):
            siblings = [{"rfilename": n, **self.facts(n, "sha256")} for n in self.server.files]
            self.json({"id": REPO, "sha": COMMIT, "siblings": siblings})
        elif match := re.fullmatch(f"/{REPO}/resolve/(?:{COMMIT}|main)/(.*)", path):
            self.file(match[1])
        else:
            code = "RevisionNotFound" if f"/{REPO}/" in path else "RepoNotFound"
            self.reply(404, b"{}", {"X-Error-Code": code})

    def facts(self, name: str, key: str) -> dict:
        content = self.server.files[name]
        facts = {"size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if not name.endswith((".json", ".md")):
            digest = hashlib.sha256(content).hexdigest()
            facts["lfs"] = {key: digest, "size": len(content), "pointerSize": 130}
        return facts

    def file(self, name: str) -> None:
        content = self.server.files[name]
        facts = self.facts(name, "oid")
        etag = facts["lfs"]["oid"] if "lfs" in facts else facts["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            self.reply(200, content, headers)
            return
        wanted = self.headers.get("Range")
        self.server.sent.append((name, wanted))
        if self.server.lying.get(name, 0) > 0:
            self.server.lying[name] -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        if name in self.server.broken:
            self.server.broken.remove(name)
            self.reply(206 if wanted else 200, body, headers, stop_at=len(body) // 2)
        else:
            self.reply(206 if wanted else 200, body, headers)

    def json(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, body: bytes, headers: dict[str, str], stop_at: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:stop_at])
        self.close_connection = True


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


_SCRIPT = """
import os, sys
from types import SimpleNamespace
from swiftwan.errors import SwiftwanError
from swiftwan.weights import download as module
if len(sys.argv) > 3:
    module.shutil.disk_usage = lambda folder: SimpleNamespace(free=int(sys.argv[3]))
try:
    components = os.environ.get("COMPONENTS", "").split()
    print("OK", module.download(sys.argv[1], sys.argv[2] or None, components=components))
except SwiftwanError as error:
    print(type(error).__name__.lstrip("_"), error)
"""


@pytest.fixture
def run(hub: Hub, tmp_path: Path):
    def run(repo: str = REPO, revision: str = "", *free: int, **env: str) -> tuple[str, str]:
        process = subprocess.run(
            [sys.executable, "-c", _SCRIPT, repo, revision, *map(str, free)],
            env=os.environ
            | {
                "HF_ENDPOINT": hub.endpoint,
                "HF_HOME": str(tmp_path / "hf"),
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            }
            | env,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert process.returncode == 0, process.stderr
        lines = process.stdout.splitlines()
        assert len(lines) == 1, process.stdout
        kind, _, text = lines[0].partition(" ")
        return kind, text

    return run


def names(folder: str) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file()}


def test_only_what_is_needed_then_offline(hub: Hub, run) -> None:
    kind, folder = run()
    assert (kind, names(folder)) == ("OK", WANTED)
    assert {name for name, _ in hub.sent} == WANTED
    for name in WANTED:
        assert (Path(folder) / name).read_bytes() == FILES[name]
    hub.refusal = (500, "")
    assert run() == ("OK", folder)
    assert run(HF_HUB_OFFLINE="1") == ("OK", folder)
    assert len(hub.sent) == len(WANTED)


def test_some_components_alone(hub: Hub, run) -> None:
    some = {"COMPONENTS": "tokenizer scheduler"}
    wanted = {"model_index.json", "tokenizer/spiece.model", "scheduler/scheduler_config.json"}
    kind, folder = run(**some)
    assert (kind, names(folder), {name for name, _ in hub.sent}) == ("OK", wanted, wanted)
    assert run(HF_HUB_OFFLINE="1", **some) == ("OK", folder)
    assert run() == ("OK", folder)
    assert names(folder) == WANTED
    hub.sent.clear()
    assert run(COMPONENTS="vae") == ("OK", folder)  # the whole model is here
    assert hub.sent == []


def test_broken_connection_is_taken_up_where_it_broke(hub: Hub, run) -> None:
    large = "vae/diffusion_pytorch_model.safetensors"
    hub.broken = {large}
    kind, folder = run()
    assert kind == "OK"
    assert (Path(folder) / large).read_bytes() == FILES[large]
    assert [wanted for name, wanted in hub.sent if name == large] == [None, f"bytes={10 * 2**20}-"]


def test_damaged_file_is_fetched_again_it_alone(hub: Hub, run) -> None:
    large = "vae/diffusion_pytorch_model.safetensors"
    hub.lying = {large: 1}
    kind, folder = run()
    assert kind == "OK"
    assert (Path(folder) / large).read_bytes() == FILES[large]
    assert sorted(name for name, _ in hub.sent) == sorted([*WANTED, large])


def test_damage_that_stays_is_an_error_and_damage_at_rest_is_mended(hub: Hub, run) -> None:
    large = "vae/diffusion_pytorch_model.safetensors"
    hub.lying = {large: 2}
    kind, text = run()
    assert kind == "WeightsError"
    assert f"1 damaged (SHA-256 differs) ({large})" in text
    kind, folder = run()
    assert kind == "OK"
    blob = (Path(folder) / large).resolve()
    blob.write_bytes(bytes(LARGE))
    assert run() == ("OK", folder)
    assert (Path(folder) / large).read_bytes() == FILES[large]


def test_disk_too_small_before_the_first_byte(hub: Hub, run) -> None:
    kind, text = run(REPO, "", 10_000_000)
    assert kind == "OutputError"
    assert re.search(r"needs 0.0 GB more, and .* has 0.0 GB free; .*HF_HOME", text)
    assert hub.sent == []
    hub.broken = set()
    run()
    assert run(REPO, "main", 10)[0] == "OK"  # all there: nothing more is needed


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        ((403, "GatedRepo"), f"{REPO} asks for an agreement: accept it at"),
        ((401, "RepoNotFound"), "the hub has no model"),
        ((404, "RevisionNotFound"), "has no revision 'v9'"),
        ((418, ""), "the hub answered 418"),
    ],
)
def test_refusals_in_one_line(hub: Hub, run, refusal: tuple[int, str], words: str) -> None:
    hub.refusal = refusal
    kind, text = run(REPO, "v9")
    assert kind == "WeightsError"
    assert words in text


def test_not_in_diffusers_layout(hub: Hub, run) -> None:
    del hub.files["model_index.json"]
    kind, text = run()
    assert (kind, hub.sent) == ("WeightsError", [])
    assert "not in diffusers layout" in text


def test_no_network(run) -> None:
    kind, text = run(HF_ENDPOINT="http://127.0.0.1:9")
    assert kind == "UnreachableError"
    assert "http://127.0.0.1:9 cannot be reached" in text
    kind, text = run(HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in text


def test_snapshot_of_another_tool_serves_offline(hub: Hub, run, tmp_path: Path) -> None:
    _, folder = run()
    moved = str(tmp_path / "elsewhere")  # without our record of what is complete
    assert run(HF_HUB_OFFLINE="1", XDG_CACHE_HOME=moved) == ("OK", folder)
    blob = (Path(folder) / "vae/diffusion_pytorch_model.safetensors").resolve()
    blob.write_bytes(bytes(LARGE))
    kind, text = run(HF_HUB_OFFLINE="1", XDG_CACHE_HOME=moved)
    assert kind == "WeightsError"
    assert "1 damaged" in text
