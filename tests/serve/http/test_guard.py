"""Who may call, and from where."""

import base64

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from swiftwan.serve.http.app import make_app
from swiftwan.serve.http.guard import OPEN_PATH
from swiftwan.serve.jobs.service import Service

KEY = "a key of more than sixteen signs"
BASE = "http://127.0.0.1:8000"
PROMPT = "a red circle moves left over a blue background"
SMALL = {"prompt": PROMPT, "num_frames": 5, "num_inference_steps": 2, "seed": 1}


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
