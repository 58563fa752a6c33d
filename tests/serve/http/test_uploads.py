"""Images that clients bring."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from starlette.testclient import TestClient

from swiftwan.serve.http.app import make_app
from swiftwan.serve.http.guard import Limits
from swiftwan.serve.jobs.service import Service

BASE = "http://127.0.0.1:8000"
PROMPT = "a red circle moves left over a blue background"
PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00 \x00\x00\x00 "
SMALL = {"prompt": PROMPT, "num_frames": 5, "num_inference_steps": 2, "seed": 1}


def test_an_image_begins_a_video_under_a_name_of_ours(client: TestClient, desk: Service, png: Any) -> None:
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


def test_edits_take_one_image_or_blend_several(client: TestClient, desk: Service, finish: Any, png: Any) -> None:
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
            finish(b"picture")
            (told,) = answer.result(timeout=10).json()["data"]
            assert base64.b64decode(told["b64_json"]) == b"picture"


@pytest.mark.parametrize(
    "content",
    [b"", b"<svg/>", b"GIF89a....", PNG[:20], b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\x00\x00", b"RIFF....WEBPVP8 "],
    ids=["empty", "svg", "gif", "cut png", "cut jpeg", "looping jpeg", "cut webp"],
)
def test_what_is_no_image_is_400(client: TestClient, desk: Service, content: bytes, error_of: Any) -> None:
    files = {"input_reference": ("a.png", content, "image/png")}
    assert error_of(client.post("/v1/videos", data={"prompt": PROMPT}, files=files))[:2] == (400, "input_reference")
    assert list((desk.folder.root / "inputs").iterdir()) == []


def test_a_huge_image_is_refused_by_its_header(client: TestClient, error_of: Any, png: Any) -> None:
    bomb = png()[:16] + (60_000).to_bytes(4, "big") * 2 + png()[24:]
    response = client.post("/v1/videos", data={"prompt": PROMPT}, files={"input_reference": ("a.png", bomb)})
    assert error_of(response)[:2] == (400, "input_reference")
    assert "60000x60000" in response.text


def test_edits_without_an_image_are_400(client: TestClient, error_of: Any) -> None:
    assert error_of(client.post("/v1/images/edits", data={"prompt": PROMPT}))[:2] == (400, "image")


@pytest.mark.parametrize("said", [True, False])
def test_a_large_body_is_413_whatever_length_it_claims(desk: Service, said: bool, error_of: Any) -> None:
    app = make_app(desk, key=None, limits=Limits(json_bytes=1000, form_bytes=1000))
    with TestClient(app, base_url=BASE, raise_server_exceptions=False) as client:
        body = json.dumps(SMALL | {"prompt": "x" * 2000}).encode()
        content = body if said else iter([body[:500], body[500:]])
        response = client.post("/v1/videos", content=content, headers={"Content-Type": "application/json"})
        assert error_of(response) == (413, None, "too_large")
