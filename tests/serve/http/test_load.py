"""A thousand calls at once, over real sockets, to a real server process."""

import asyncio
import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

SERVER = """
import sys
from pathlib import Path
from swiftwan.serve.http.app import make_app
from swiftwan.serve.http.server import serve, take_port
from swiftwan.serve.jobs.service import Service, ServiceSettings
service = Service(ServiceSettings(Path(sys.argv[1]), command=sys.argv[3:], queue_limit=20))
service.store.pause(paused=True)
service.start()
with take_port("127.0.0.1", int(sys.argv[2])) as port:
    serve(make_app(service, key=None), service, port)
service.close()
"""


@pytest.fixture
def server(tmp_path: Path, pretending: tuple[str, ...]) -> Iterator[tuple[int, psutil.Process]]:
    """Port and process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    if wanted < 2500:
        pytest.skip(f"a process may open {hard} files here, and a thousand calls need 2500")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", SERVER, str(tmp_path / "data"), str(port), *pretending]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stderr=log)
    for _ in range(300):
        try:
            if asyncio.run(call(port, "GET", "/health/ready"))[0] == 200:
                break
        except OSError:
            assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.1)
    yield port, psutil.Process(process.pid)
    process.terminate()
    assert process.wait(30) == 0
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def call(port: int, method: str, path: str, body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    lines, _, content = answer.partition(b"\r\n\r\n")
    first, *rest = lines.decode().splitlines()
    return int(first.split()[1]), dict(line.lower().split(": ", 1) for line in rest), content


async def at_once(port: int, calls: int) -> list[tuple[int, dict[str, str], bytes]]:
    body = json.dumps({"prompt": "a red circle", "num_inference_steps": 1, "negative_prompt": "x" * 5000}).encode()
    return list(await asyncio.gather(*(call(port, "POST", "/v1/videos", body) for _ in range(calls))))


@pytest.mark.slow
def test_a_thousand_calls_at_once_are_answered_and_memory_stays_flat(server: tuple[int, psutil.Process]) -> None:
    port, process = server
    first = asyncio.run(at_once(port, 200))
    before = process.memory_info().rss
    answers = asyncio.run(at_once(port, 1000))
    grown = process.memory_info().rss - before
    assert grown < 50 * 2**20, f"{grown / 2**20:.0f} MiB"
    assert len(answers) == 1000
    codes = [code for code, _, _ in first + answers]
    assert codes.count(200) == 20  # what the queue holds
    assert codes.count(429) == 1180
    refused = [headers for code, headers, _ in answers if code == 429]
    assert all(int(headers["retry-after"]) >= 1 for headers in refused)
    assert asyncio.run(call(port, "GET", "/health/live"))[0] == 200
