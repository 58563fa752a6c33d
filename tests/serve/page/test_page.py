"""The page over a queue that nobody works on. A browser's walk through it is not part of these tests."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from swiftwan.serve.http.app import make_app
from swiftwan.serve.jobs.service import Service

gradio = pytest.importorskip("gradio", reason="the page needs swiftwan[ui]")
pytestmark = pytest.mark.filterwarnings("ignore")  # gradio's own

from swiftwan.serve.page import show  # noqa: E402
from swiftwan.serve.page.page import Page, mount  # noqa: E402

KEY = "a key of more than sixteen signs"
EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(autouse=True)
def _what_gradio_leaves_open() -> Iterator[None]:
    """Its event loops are collected here, where their warnings are ignored, and not in another test."""
    yield
    gc.collect()


@pytest.fixture
def page(desk: Service) -> Page:
    return Page(desk)


@pytest.fixture
def inputs() -> list[Any]:
    return ["Text to video", "a red circle", "", "model", 5, 16, 2, 4.0, "7", "euler", 0.6, ["batched-cfg"], ""]


@pytest.fixture
def served(desk: Service) -> Iterator[TestClient]:
    app = mount(make_app(desk, key=KEY), desk)
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        yield client


def test_a_click_queues_what_the_inputs_say(page: Page, desk: Service, inputs: list[Any]) -> None:
    job = desk.store.get(page.generate(None, *inputs))
    assert job.request["seed"] == 7
    assert job.request["num_frames"] == 5
    assert job.plan == ["batched-cfg"]
    assert page.newest() == job.id


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (8, "x", "seed is"),
        (12, "quantise:fp8", "quantise"),
        (4, 10**9 + 1, "will not fit"),
        (12, "lora:/etc/x", "names a file"),
    ],
)
def test_what_is_wrong_is_shown_before_the_click_and_refused_after_it(
    page: Page, inputs: list[Any], at: int, value: Any, words: str
) -> None:
    inputs[at] = value
    assert words in page.explain(*inputs)
    assert 'class="wrong"' in page.explain(*inputs)
    with pytest.raises(gradio.Error, match=words):
        page.generate(None, *inputs)


def test_the_estimate_is_shown(page: Page, inputs: list[Any]) -> None:
    told = page.explain(*inputs)
    assert "forwards of" in told
    assert "fits" in told
    assert "batched-cfg (" in told


def test_a_prompt_is_text_and_never_markup(page: Page, desk: Service, inputs: list[Any]) -> None:
    inputs[1] = EVIL
    job_id = page.generate(None, *inputs)
    taken = desk.store.claim("cpu")
    assert taken is not None
    desk.folder.write(desk.folder.preview(taken), [b"jpeg"])
    shown = "".join(part for part in page.refresh(job_id) if isinstance(part, str))
    desk.store.fail(taken, "internal", EVIL)
    shown += show.stage(desk, desk.store.get(job_id)) + show.pair(desk.store.get(job_id), None)
    assert EVIL not in shown
    assert "&lt;img" in shown


def test_an_unknown_job_shows_an_empty_stage(page: Page) -> None:
    assert "appears here" in page.refresh("video_none")[0]
    page.cancel("video_none")
    assert page.again("video_none") == ""


def test_the_page_and_its_files_need_the_key(served: TestClient) -> None:
    assets = (
        "/",
        "/config",
        "/theme.css",
        "/gradio_api/info",
        "/gradio_api/queue/join",
        "/gradio_api/upload",
        "/assets/x.js",
    )
    for path in assets:
        assert served.get(path).status_code == 401
        assert served.post(path).status_code == 401
    inside = served.get("/", headers={"Authorization": f"Bearer {KEY}"})
    assert inside.status_code == 200
    assert inside.headers["X-Content-Type-Options"] == "nosniff"


def test_the_http_interface_is_still_there(served: TestClient) -> None:
    assert served.get("/v1/videos", headers={"Authorization": f"Bearer {KEY}"}).json()["object"] == "list"


def test_files_of_the_server_are_not_served(served: TestClient, desk: Service) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    for path in (desk.folder.database, Path("/etc/passwd")):
        assert served.get(f"/gradio_api/file={path}", headers=headers).status_code in (403, 404)
