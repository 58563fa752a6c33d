"""The application over a queue that nobody works on; the tests play the worker."""

import base64
import io
import json
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

from swiftwan.pipelines.request import TASKS
from swiftwan.serve.http.app import make_app
from swiftwan.serve.http.guard import OPEN_PATH, Limits
from swiftwan.serve.jobs.job import Job
from swiftwan.serve.jobs.service import Service

KEY = "a key of more than sixteen signs"
PROMPT = "a red circle moves left over a blue background"
SMALL = {"prompt": PROMPT, "num_frames": 5, "num_inference_steps": 2, "seed": 1}
BASE = "http://127.0.0.1:8000"


@pytest.fixture
def client(desk: Service) -> Iterator[TestClient]:
    with TestClient(make_app(desk, key=None), base_url=BASE, raise_server_exceptions=False) as client:
        yield client


def png(width: int = 32, height: int = 32) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "png")
    return buffer.getvalue()


def error_of(response: Any) -> tuple[int, str | None, str]:
    told = response.json()["error"]
    assert set(told) == {"message", "type", "param", "code"}
    assert "Traceback" not in told["message"]
    assert "/tmp" not in told["message"]
    assert "\n" not in told["message"]
    return response.status_code, told["param"], told["code"]


def finish(desk: Service, data: bytes = b"0123456789") -> Job:
    """Do what a worker would."""
    job = desk.store.claim("cpu")
    assert job is not None
    picture = job.request["num_frames"] == 1
    names = {"image" if picture else "video": desk.folder.result(job, ".png" if picture else ".mp4")}
    names |= {"thumbnail": desk.folder.result(job, ".thumbnail.webp")}
    for name in names.values():
        desk.folder.write(name, [data])
    desk.store.complete(job, names, {"sha256": "0", "seconds": {"text": 1.0}, "peak_bytes": 2**20, "step_seconds": []})
    return desk.store.get(job.id)


# The life of a video


def test_a_video_is_created_followed_fetched_and_deleted(client: TestClient, desk: Service) -> None:
    made = client.post("/v1/videos", json=SMALL | {"size": "128x96", "model": "pocket"}).json()
    assert (made["object"], made["status"], made["progress"], made["size"]) == ("video", "queued", 0, "128x96")
    assert made["wan"]["queue_position"] == 0
    path = f"/v1/videos/{made['id']}"
    assert error_of(client.get(f"{path}/content")) == (409, None, "not_ready")
    job = finish(desk)
    done = client.get(path).json()
    assert (done["status"], done["progress"], done["wan"]["peak_memory_mb"]) == ("completed", 100, 1.0)
    assert done["completed_at"] >= done["created_at"]
    whole = client.get(f"{path}/content")
    assert (whole.content, whole.headers["content-type"]) == (b"0123456789", "video/mp4")
    assert "attachment" in whole.headers["content-disposition"]
    part = client.get(f"{path}/content", headers={"Range": "bytes=2-4"})
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, b"234", "bytes 2-4/10")
    assert client.get(f"{path}/content", headers={"Range": "bytes=90-"}).status_code == 416
    assert client.get(f"{path}/content?variant=thumbnail").headers["content-type"] == "image/webp"
    assert error_of(client.get(f"{path}/content?variant=gif")) == (400, "variant", "invalid_value")
    assert [video["id"] for video in client.get("/v1/videos").json()["data"]] == [job.id]
    assert client.delete(path).json() == {"id": job.id, "deleted": True, "object": "video.deleted"}
    assert error_of(client.get(path)) == (404, None, "not_found")
    assert not list(desk.folder.root.rglob(f"*{job.id}*"))


def test_events_tell_progress_and_the_end(client: TestClient, desk: Service) -> None:
    job_id = client.post("/v1/videos", json=SMALL).json()["id"]
    finish(desk)
    lines = client.get(f"/v1/videos/{job_id}/events").text.splitlines()
    assert lines[0] == "event: done"
    assert json.loads(lines[1].removeprefix("data: "))["status"] == "completed"
    assert error_of(client.get("/v1/videos/video_none/events")) == (404, None, "not_found")


def test_cancelled_is_told_as_failed_with_a_code(client: TestClient) -> None:
    job_id = client.post("/v1/videos", json=SMALL).json()["id"]
    told = client.post(f"/v1/videos/{job_id}/cancel").json()
    assert (told["status"], told["error"]["code"], told["wan"]["state"]) == ("failed", "cancelled", "cancelled")
    assert client.post(f"/v1/videos/{job_id}/retry").json()["status"] == "queued"
    assert error_of(client.post(f"/v1/videos/{job_id}/retry")) == (409, None, "wrong_state")


def test_the_queue_can_be_ordered_and_paused(client: TestClient, desk: Service) -> None:
    first, second = (client.post("/v1/videos", json=SMALL).json()["id"] for _ in range(2))
    client.post(f"/v1/videos/{second}/move", json={"position": 0})
    client.post("/v1/queue/pause")
    queue = client.get("/v1/queue").json()
    assert queue["paused"]
    assert [job["id"] for job in queue["waiting"]] == [second, first]
    assert desk.store.claim("cpu") is None
    assert not client.post("/v1/queue/resume").json()["paused"]


def test_a_form_says_the_same_as_json(client: TestClient) -> None:
    fields = {"prompt": PROMPT, "num_frames": "5", "guidance_scale": "1.5", "size": "64x64", "plan": '["batched-cfg"]'}
    made = client.post("/v1/videos", data=fields, files={"none": ("", b"")}).json()
    assert "id" in made, made
    wan = made["wan"]
    assert (wan["num_frames"], wan["guidance_scale"], made["size"]) == (5, 1.5, "64x64")


def test_seconds_become_frames(client: TestClient) -> None:
    made = client.post("/v1/videos", json={"prompt": PROMPT, "seconds": "1", "size": "64x64"}).json()
    assert made["wan"]["num_frames"] == 17
    assert made["seconds"] == "1.0625"


def test_explain_queues_nothing(client: TestClient, desk: Service) -> None:
    told = client.post("/v1/videos/explain", json=SMALL | {"plan": ["batched-cfg"]}).json()
    assert told["fits"]
    assert [technique["spec"] for technique in told["plan"]] == ["batched-cfg"]
    assert desk.store.counts()["queued"] == 0


def test_the_model_is_listed(client: TestClient) -> None:
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["pocket"]


# Refusals


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "prompt"),
        ({"prompt": "  "}, 400, "prompt"),
        ({"prompt": 3}, 400, "prompt"),
        ({"prompt": "x" * 10_001}, 400, "prompt"),
        ({"prompt": "a\ud800"}, 400, "prompt"),
        ({"prompt": PROMPT, "nope": 1}, 400, "nope"),
        ({"prompt": PROMPT, "output_path": "/etc/x"}, 400, "output_path"),
        ({"prompt": PROMPT, "num_frames": 6}, 400, "num_frames"),
        ({"prompt": PROMPT, "num_frames": True}, 400, "num_frames"),
        ({"prompt": PROMPT, "num_frames": 10**40}, 400, "num_frames"),
        ({"prompt": PROMPT, "width": "wide"}, 400, "width"),
        ({"prompt": PROMPT, "size": "128"}, 400, "size"),
        ({"prompt": PROMPT, "size": "128x128", "width": 128}, 400, "size"),
        ({"prompt": PROMPT, "seconds": "soon"}, 400, "seconds"),
        ({"prompt": PROMPT, "seconds": "4", "num_frames": 5}, 400, "seconds"),
        ({"prompt": PROMPT, "seed": -1}, 400, "seed"),
        ({"prompt": PROMPT, "scheduler": "eulr"}, 400, "scheduler"),
        ({"prompt": PROMPT, "model": "sora-2"}, 400, "model"),
        ({"prompt": PROMPT, "task": "Sing"}, 400, "task"),
        ({"prompt": PROMPT, "plan": ["lora:/etc/passwd"]}, 400, "plan"),
        ({"prompt": PROMPT, "plan": ["no-such"]}, 400, "plan"),
        ({"prompt": PROMPT, "plan": 3}, 400, "plan"),
        ({"prompt": PROMPT, "input_reference": {"image_url": "http://169.254.169.254/"}}, 400, "input_reference"),
        ({"prompt": PROMPT, "input_reference": {"image_url": "data:image/png;base64,?"}}, 400, "input_reference"),
        ({"prompt": PROMPT, "input_reference": {"file_id": "file-1"}}, 400, "input_reference"),
        ({"prompt": PROMPT, "image": "inputs/other.png"}, 400, "image"),
        ({"prompt": PROMPT, "size": "16000x16000"}, 422, None),
    ],
)
def test_what_is_wrong_is_told_with_its_field(
    client: TestClient, desk: Service, body: dict[str, Any], status: int, param: str | None
) -> None:
    response = client.post("/v1/videos", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert error_of(response)[:2] == (status, param), response.text
    assert desk.store.counts()["queued"] == 0
    assert list((desk.folder.root / "inputs").iterdir()) == []


def test_what_will_not_fit_comes_with_something_that_does(client: TestClient, desk: Service) -> None:
    refused = client.post("/v1/videos", json={"prompt": PROMPT, "size": "512x512", "num_frames": 4001})
    assert error_of(refused) == (422, None, "will_not_fit")
    words = refused.json()["error"]["message"]
    frames = int(words.partition("try ")[2].partition(" frames")[0])
    assert client.post("/v1/videos", json={"prompt": PROMPT, "size": "512x512", "num_frames": frames}).is_success
    more = client.post("/v1/videos", json={"prompt": PROMPT, "size": "512x512", "num_frames": frames + 4})
    assert more.status_code == 422


@pytest.mark.parametrize("body", [b"{", b"[]", b"3", b"\xff", b'{"prompt": NaN}', b"[" * 100_000])
def test_broken_json_is_400(client: TestClient, body: bytes) -> None:
    response = client.post("/v1/videos", content=body, headers={"Content-Type": "application/json"})
    assert error_of(response)[0] == 400


def test_another_media_type_is_415(client: TestClient) -> None:
    assert error_of(client.post("/v1/videos", content=b"x", headers={"Content-Type": "text/plain"}))[0] == 415


def test_a_full_queue_is_429_with_the_time_to_wait(client: TestClient) -> None:
    for _ in range(5):
        assert client.post("/v1/videos", json=SMALL).is_success
    full = client.post("/v1/videos", json=SMALL)
    assert error_of(full) == (429, None, "queue_full")
    assert int(full.headers["Retry-After"]) >= 1


def test_a_key_given_twice_makes_one_job(client: TestClient, desk: Service) -> None:
    headers = {"Idempotency-Key": "mine"}
    first, again = (client.post("/v1/videos", json=SMALL, headers=headers).json() for _ in range(2))
    assert first["id"] == again["id"]
    assert desk.store.counts()["queued"] == 1
    other = client.post("/v1/videos", json=SMALL | {"seed": 2}, headers=headers)
    assert error_of(other) == (409, "Idempotency-Key", "idempotency_key_reused")


def test_a_stopping_or_starting_server_is_503(client: TestClient, desk: Service) -> None:
    desk.admitting = False
    stopping = client.post("/v1/videos", json=SMALL)
    assert error_of(stopping) == (503, None, "not_ready")
    assert "Retry-After" in stopping.headers
    assert client.get("/health/ready").status_code == 503
    assert client.get("/health/live").status_code == 200
    desk.admitting = True
    desk.supervisor.slots[0].device = None
    assert client.post("/v1/videos", json=SMALL).status_code == 503


def test_a_full_disk_is_507(client: TestClient, desk: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("swiftwan.serve.jobs.folder.RESERVE_BYTES", 2**60)
        assert error_of(client.post("/v1/videos", json=SMALL)) == (507, None, "disk_full")
    pages = desk.store._db.execute("PRAGMA page_count").fetchone()[0]
    desk.store._db.execute(f"PRAGMA max_page_count={pages}")
    long = SMALL | {"prompt": "x" * 10_000, "negative_prompt": "y" * 10_000}
    assert error_of(client.post("/v1/videos", json=long)) == (507, None, "disk_full")
    assert client.get("/v1/videos").is_success


def test_an_error_of_ours_tells_nothing_of_itself(
    client: TestClient, desk: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("/secret/path")

    monkeypatch.setattr(desk.store, "get", broken)
    response = client.get("/v1/videos/video_1")
    assert error_of(response) == (500, None, "internal")
    assert "secret" not in response.text


# Uploads


@pytest.mark.skipif("ImageToVideo" not in TASKS, reason="this version has no tasks that take images")
def test_an_image_begins_a_video_under_a_name_of_ours(client: TestClient, desk: Service) -> None:
    files = {"input_reference": ("../../../evil.png", png(128, 128), "text/html")}
    response = client.post("/v1/videos", data={"prompt": PROMPT, "num_frames": "5"}, files=files)
    if response.status_code == 400:  # the pocket model may not begin with an image
        assert "image" in response.json()["error"]["message"]
        return
    (job,) = desk.store.queue()
    assert job.request["task"] == "ImageToVideo"
    assert job.inputs == [job.request["image"]]
    assert desk.folder.path(job.inputs[0]).read_bytes() == png(128, 128)
    assert "inputs" not in response.text
    client.delete(f"/v1/videos/{job.id}")
    assert list((desk.folder.root / "inputs").iterdir()) == []


@pytest.mark.skipif("ImageToImage" not in TASKS, reason="this version has no tasks that take images")
def test_edits_take_one_image_or_blend_several(client: TestClient, desk: Service) -> None:
    with ThreadPoolExecutor() as pool:
        for count, task in ((1, "ImageToImage"), (2, "Blend")):
            files = [("image[]", ("a.png", png(128, 128), "image/png"))] * count
            fields = {"prompt": PROMPT, "size": "128x128", "creativity": "0.5"}
            answer = pool.submit(client.post, "/v1/images/edits", data=fields, files=files)
            while not (waiting := desk.store.queue()) and not answer.done():
                pass
            assert waiting, answer.result().text
            assert waiting[0].request["task"] == task
            assert waiting[0].request["creativity"] == 0.5
            finish(desk, b"picture")
            (told,) = answer.result(timeout=10).json()["data"]
            assert base64.b64decode(told["b64_json"]) == b"picture"


@pytest.mark.parametrize(
    "content",
    [b"", b"<svg/>", b"GIF89a....", png()[:20], b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\x00\x00", b"RIFF....WEBPVP8 "],
    ids=["empty", "svg", "gif", "cut png", "cut jpeg", "looping jpeg", "cut webp"],
)
def test_what_is_no_image_is_400(client: TestClient, desk: Service, content: bytes) -> None:
    files = {"input_reference": ("a.png", content, "image/png")}
    assert error_of(client.post("/v1/videos", data={"prompt": PROMPT}, files=files))[:2] == (400, "input_reference")
    assert list((desk.folder.root / "inputs").iterdir()) == []


def test_a_huge_image_is_refused_by_its_header(client: TestClient) -> None:
    bomb = png()[:16] + (60_000).to_bytes(4, "big") * 2 + png()[24:]
    response = client.post("/v1/videos", data={"prompt": PROMPT}, files={"input_reference": ("a.png", bomb)})
    assert error_of(response)[:2] == (400, "input_reference")
    assert "60000x60000" in response.text


def test_edits_without_an_image_are_400(client: TestClient) -> None:
    assert error_of(client.post("/v1/images/edits", data={"prompt": PROMPT}))[:2] == (400, "image")


@pytest.mark.parametrize("said", [True, False])
def test_a_large_body_is_413_whatever_length_it_claims(desk: Service, said: bool) -> None:
    app = make_app(desk, key=None, limits=Limits(json_bytes=1000, form_bytes=1000))
    with TestClient(app, base_url=BASE, raise_server_exceptions=False) as client:
        body = json.dumps(SMALL | {"prompt": "x" * 2000}).encode()
        content = body if said else iter([body[:500], body[500:]])
        response = client.post("/v1/videos", content=content, headers={"Content-Type": "application/json"})
        assert error_of(response) == (413, None, "too_large")


# Who may call


def routes(app: FastAPI) -> list[tuple[str, str]]:
    found = [(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods]
    assert len(found) > 15
    return [
        *found,
        ("GET", "/openapi.json"),
        ("GET", "/docs"),
        ("GET", "/"),
        ("GET", "/no/such"),
        ("PUT", "/v1/videos"),
    ]


def test_every_route_but_one_needs_the_key(desk: Service) -> None:
    app = make_app(desk, key=KEY)
    wrong = [{}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": "Bearer "}, {"Authorization": "Basic !"}]
    wrong += [{"Authorization": f"Basic {base64.b64encode(b'user:wrong').decode()}"}, {"Authorization": KEY}]
    with TestClient(app, base_url=BASE) as client:
        for method, path in routes(app):
            place = path.replace("{job_id}", "video_1")
            for headers in wrong:
                response = client.request(method, place, headers=headers)
                assert response.status_code == (200 if path == OPEN_PATH else 401), (method, path)
        assert client.get("/health/live/").status_code == 401
        assert client.get("//health/live").status_code == 401


@pytest.mark.parametrize(
    "authorization", [f"Bearer {KEY}", f"bearer {KEY}", f"Basic {base64.b64encode(f'me:{KEY}'.encode()).decode()}"]
)
def test_the_key_opens(desk: Service, authorization: str) -> None:
    with TestClient(make_app(desk, key=KEY), base_url="http://anywhere.example") as client:
        assert client.get("/v1/videos", headers={"Authorization": authorization}).status_code == 200


def test_a_websocket_needs_the_key_too(desk: Service) -> None:
    from starlette.websockets import WebSocketDisconnect

    with (
        TestClient(make_app(desk, key=KEY), base_url=BASE) as client,
        pytest.raises(WebSocketDisconnect) as closed,
        client.websocket_connect("/anything"),
    ):
        pass
    assert closed.value.code == 1008


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example"},
    ],
)
def test_other_web_pages_are_refused(client: TestClient, desk: Service, headers: dict[str, str]) -> None:
    assert client.post("/v1/videos", json=SMALL, headers=headers).status_code == 403
    assert desk.store.counts()["queued"] == 0


def test_a_page_of_its_own_may_call(client: TestClient) -> None:
    assert client.post("/v1/videos", json=SMALL, headers={"Origin": BASE}).is_success


def test_answers_are_not_sniffed_framed_or_kept(client: TestClient) -> None:
    for path in ("/v1/videos", "/health/live", "/no/such"):
        headers = client.get(path).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
    assert client.get("/v1/videos").headers["Cache-Control"] == "no-store"


# Whatever comes


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(
        ["prompt", "size", "seconds", "plan", "task", "num_frames", "seed", "fps", "weights", "n", "image"]
    )
    | st.text(max_size=20),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
)
def test_no_body_makes_an_error_of_ours(client: TestClient, desk: Service, name: str, value: Any) -> None:
    body = json.dumps({"prompt": PROMPT, "size": "64x64"} | {name: value}).encode()
    response = client.post("/v1/videos", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400, 422), response.text
    for job in desk.store.queue():
        desk.delete(job.id)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(min_size=1, max_size=60))
def test_no_id_leads_anywhere(client: TestClient, name: str) -> None:
    from urllib.parse import quote

    for tail in ("", "/content", "/preview", "/events"):
        response = client.get(f"/v1/videos/{quote(name, safe='')}{tail}")
        assert response.status_code in (200, 404, 405), response.text
        if response.status_code == 200:  # the list itself
            assert response.json()["object"] == "list"


def test_metrics_are_prometheus(client: TestClient, desk: Service) -> None:
    client.post("/v1/videos", json=SMALL)
    finish(desk)
    text = client.get("/metrics").text
    assert 'swiftwan_jobs{state="completed"} 1.0' in text
    assert "swiftwan_job_seconds_count 1.0" in text


@pytest.mark.parametrize("calls", [pytest.param(150, id="150"), pytest.param(1000, id="1000", marks=pytest.mark.slow)])
def test_many_calls_at_once_leave_memory_flat_and_the_queue_bounded(
    client: TestClient, desk: Service, calls: int
) -> None:
    def call(number: int) -> int:
        return int(client.post("/v1/videos", json=SMALL | {"seed": number}).status_code)

    with ThreadPoolExecutor(16) as pool:
        codes = list(pool.map(call, range(50)))
        before = psutil.Process().memory_info().rss
        codes += list(pool.map(call, range(calls)))
    assert sorted(set(codes)) == [200, 429]
    assert codes.count(200) == desk.store.limit
    assert psutil.Process().memory_info().rss - before < 50 * 2**20


def test_a_queue_that_cannot_be_read_is_an_error_in_words(
    client: TestClient, desk: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(*_: Any, **__: Any) -> None:
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(desk.store, "page", locked)
    assert error_of(client.get("/v1/videos")) == (500, None, "internal")
