"""Calls and their answers."""

import json
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from swiftwan.serve.jobs.service import Service

PROMPT = "a red circle moves left over a blue background"
SMALL = {"prompt": PROMPT, "num_frames": 5, "num_inference_steps": 2, "seed": 1}


# The life of a video


def test_a_video_is_created_followed_fetched_and_deleted(
    client: TestClient, desk: Service, error_of: Any, finish: Any
) -> None:
    made = client.post("/v1/videos", json=SMALL | {"size": "128x96", "model": "pocket"}).json()
    assert (made["object"], made["status"], made["progress"], made["size"]) == ("video", "queued", 0, "128x96")
    assert made["wan"]["queue_position"] == 0
    path = f"/v1/videos/{made['id']}"
    assert error_of(client.get(f"{path}/content")) == (409, None, "not_ready")
    job = finish()
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


def test_events_tell_progress_and_the_end(client: TestClient, desk: Service, error_of: Any, finish: Any) -> None:
    job_id = client.post("/v1/videos", json=SMALL).json()["id"]
    finish()
    lines = client.get(f"/v1/videos/{job_id}/events").text.splitlines()
    assert lines[0] == "event: done"
    assert json.loads(lines[1].removeprefix("data: "))["status"] == "completed"
    assert error_of(client.get("/v1/videos/video_none/events")) == (404, None, "not_found")


def test_cancelled_is_told_as_failed_with_a_code(client: TestClient, error_of: Any) -> None:
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


def test_files_expire_and_their_record_stays_as_long_again(
    client: TestClient, desk: Service, finish: Any, error_of: Any
) -> None:
    job_id = client.post("/v1/videos", json=SMALL).json()["id"]
    job = finish()
    assert client.get(f"/v1/videos/{job_id}").json()["expires_at"] is None
    object.__setattr__(desk.settings, "keep_s", 60.0)
    assert client.get(f"/v1/videos/{job_id}").json()["expires_at"] == int(job.finished_at + 60)
    assert desk.store.expire(time.time() - 60) == []
    desk.supervisor.keep_s = 60.0
    desk.store._db.execute("UPDATE jobs SET finished_at = finished_at - 90")
    desk.supervisor._tidy()
    assert not list(desk.folder.root.rglob(f"*{job_id}*"))
    assert error_of(client.get(f"/v1/videos/{job_id}/content")) == (410, None, "expired")
    after = client.get(f"/v1/videos/{job_id}").json()
    assert (after["status"], after["wan"]["seed"], after["wan"]["content_url"]) == ("completed", 1, None)
    desk.store._db.execute("UPDATE jobs SET finished_at = finished_at - 60")
    desk.supervisor._next_expiry = 0.0
    desk.supervisor._tidy()
    assert client.get(f"/v1/videos/{job_id}").status_code == 404
    assert "swiftwan_job_seconds_count 1.0" in client.get("/metrics").text


def test_a_server_of_two_models_takes_jobs_for_both(client: TestClient, desk: Service, error_of: Any) -> None:
    object.__setattr__(desk.settings, "others", ["random:wan2.1-t2v-1.3b"])
    desk.supervisor.slots[0].device = desk.supervisor.devices[0] | {"total_bytes": 10**11}
    names = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert names == ["pocket", "random:wan2.1-t2v-1.3b"]
    first = client.post("/v1/videos", json=SMALL).json()
    second = client.post("/v1/videos", json=SMALL | {"model": names[1], "size": "64x64"}).json()
    assert [first["model"], second["model"]] == names
    assert [job.model for job in desk.store.queue()] == names
    refused = client.post("/v1/videos", json=SMALL | {"model": "wan2.1-t2v-1.3b"})
    assert error_of(refused) == (400, "model", "invalid_value")
    assert "Did you mean 'random:wan2.1-t2v-1.3b'?" in refused.json()["error"]["message"]


def test_a_reload_is_told_to_the_workers(client: TestClient, desk: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(desk.supervisor, "_say", said.append)
    assert client.post("/v1/models/reload").json() == {"reloaded": True}
    assert said == ["reload"]


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
    client: TestClient, desk: Service, body: dict[str, Any], status: int, param: str | None, error_of: Any
) -> None:
    response = client.post("/v1/videos", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert error_of(response)[:2] == (status, param), response.text
    assert desk.store.counts()["queued"] == 0
    assert list((desk.folder.root / "inputs").iterdir()) == []


def test_what_will_not_fit_comes_with_something_that_does(client: TestClient, desk: Service, error_of: Any) -> None:
    refused = client.post("/v1/videos", json={"prompt": PROMPT, "size": "512x512", "num_frames": 4001})
    assert error_of(refused) == (422, None, "will_not_fit")
    words = refused.json()["error"]["message"]
    frames = int(words.partition("; ")[2].partition(" frames should fit")[0])
    assert client.post("/v1/videos", json={"prompt": PROMPT, "size": "512x512", "num_frames": frames}).is_success
    more = client.post("/v1/videos", json={"prompt": PROMPT, "size": "512x512", "num_frames": frames + 4})
    assert more.status_code == 422


@pytest.mark.parametrize("body", [b"{", b"[]", b"3", b"\xff", b'{"prompt": NaN}', b"[" * 100_000])
def test_broken_json_is_400(client: TestClient, body: bytes, error_of: Any) -> None:
    response = client.post("/v1/videos", content=body, headers={"Content-Type": "application/json"})
    assert error_of(response)[0] == 400


def test_another_media_type_is_415(client: TestClient, error_of: Any) -> None:
    assert error_of(client.post("/v1/videos", content=b"x", headers={"Content-Type": "text/plain"}))[0] == 415


def test_a_full_queue_is_429_with_the_time_to_wait(client: TestClient, error_of: Any) -> None:
    for _ in range(5):
        assert client.post("/v1/videos", json=SMALL).is_success
    full = client.post("/v1/videos", json=SMALL)
    assert error_of(full) == (429, None, "queue_full")
    assert int(full.headers["Retry-After"]) >= 1


def test_a_key_given_twice_makes_one_job(client: TestClient, desk: Service, error_of: Any) -> None:
    headers = {"Idempotency-Key": "mine"}
    first, again = (client.post("/v1/videos", json=SMALL, headers=headers).json() for _ in range(2))
    assert first["id"] == again["id"]
    assert desk.store.counts()["queued"] == 1
    other = client.post("/v1/videos", json=SMALL | {"seed": 2}, headers=headers)
    assert error_of(other) == (409, "Idempotency-Key", "idempotency_key_reused")


def test_a_stopping_or_starting_server_is_503(client: TestClient, desk: Service, error_of: Any) -> None:
    desk.admitting = False
    stopping = client.post("/v1/videos", json=SMALL)
    assert error_of(stopping) == (503, None, "not_ready")
    assert "Retry-After" in stopping.headers
    assert client.get("/health/ready").status_code == 503
    assert client.get("/health/live").status_code == 200
    desk.admitting = True
    desk.supervisor.slots[0].device = None
    assert client.post("/v1/videos", json=SMALL).status_code == 503


def test_a_full_disk_is_507(client: TestClient, desk: Service, monkeypatch: pytest.MonkeyPatch, error_of: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("swiftwan.serve.jobs.folder.RESERVE_BYTES", 2**60)
        assert error_of(client.post("/v1/videos", json=SMALL)) == (507, None, "disk_full")
    pages = desk.store._db.execute("PRAGMA page_count").fetchone()[0]
    desk.store._db.execute(f"PRAGMA max_page_count={pages}")
    long = SMALL | {"prompt": "x" * 10_000, "negative_prompt": "y" * 10_000}
    assert error_of(client.post("/v1/videos", json=long)) == (507, None, "disk_full")
    assert client.get("/v1/videos").is_success


def test_an_error_of_ours_tells_nothing_of_itself(
    client: TestClient, desk: Service, monkeypatch: pytest.MonkeyPatch, error_of: Any
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("/secret/path")

    monkeypatch.setattr(desk.store, "get", broken)
    response = client.get("/v1/videos/video_1")
    assert error_of(response) == (500, None, "internal")
    assert "secret" not in response.text


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


def test_metrics_are_prometheus(client: TestClient, desk: Service, finish: Any) -> None:
    client.post("/v1/videos", json=SMALL)
    finish()
    text = client.get("/metrics").text
    assert 'swiftwan_jobs{state="completed"} 1.0' in text
    assert "swiftwan_job_seconds_count 1.0" in text


def test_many_calls_at_once_leave_memory_flat_and_the_queue_bounded(client: TestClient, desk: Service) -> None:
    def call(number: int) -> int:
        return int(client.post("/v1/videos", json=SMALL | {"seed": number}).status_code)

    with ThreadPoolExecutor(16) as pool:
        codes = list(pool.map(call, range(50)))
        before = psutil.Process().memory_info().rss
        codes += list(pool.map(call, range(150)))
    assert sorted(set(codes)) == [200, 429]
    assert codes.count(200) == desk.store.limit
    assert psutil.Process().memory_info().rss - before < 50 * 2**20


def test_a_queue_that_cannot_be_read_is_an_error_in_words(
    client: TestClient, desk: Service, monkeypatch: pytest.MonkeyPatch, error_of: Any
) -> None:
    def locked(*_: Any, **__: Any) -> None:
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(desk.store, "page", locked)
    assert error_of(client.get("/v1/videos")) == (500, None, "internal")
