"""The page over a queue that nobody works on; a browser's walk through it is in test_walk.py."""

import gc
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from starlette.routing import Mount
from starlette.testclient import TestClient

from swiftwan import media
from swiftwan.serve.http.app import make_app
from swiftwan.serve.jobs.service import Service

gradio = pytest.importorskip("gradio", reason="the page needs swiftwan[ui]")
pytestmark = pytest.mark.filterwarnings("ignore")  # gradio's own

from swiftwan.serve.page import reports, show  # noqa: E402
from swiftwan.serve.page.inputs import CHOSEN, FASTEST, Inputs  # noqa: E402
from swiftwan.serve.page.page import Page, mount  # noqa: E402

KEY = "a key of more than sixteen signs"
EVIL = "<img src=x onerror=alert(1)>"

SAID = Inputs(
    kind="Text to video",
    prompt="a red circle",
    negative="",
    resolution="Default",
    width=128,
    height=128,
    frames=5,
    fps=16,
    steps=2,
    guidance=4.0,
    scheduler="euler",
    seed="7",
    model="pocket",
    creativity=0.6,
    weights="",
    plan=CHOSEN,
    techniques="batched-cfg",
)


def values(inputs: Inputs) -> list[Any]:
    return list(vars(inputs).values())


@pytest.fixture
def page(desk: Service) -> Iterator[Page]:
    page = Page(desk)
    yield page
    page.hardware.__exit__()


@pytest.fixture
def served(desk: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # is set by mount, and put back here
    app = mount(make_app(desk, key=KEY), desk)
    headers = {"Authorization": f"Bearer {KEY}"}
    with TestClient(app, base_url="http://127.0.0.1:8000", headers=headers) as client:
        yield client
    del app, client
    gc.collect()  # gradio leaves event loops open: their warnings come here, where they are ignored


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "a.png"
    Image.new("RGB", (128, 128), "red").save(path)
    return str(path)


# What is asked


def test_a_click_queues_what_the_inputs_say(page: Page, desk: Service) -> None:
    job = desk.store.get(page.generate({}, *values(SAID)))
    assert job.request["seed"] == 7
    assert job.request["num_frames"] == 5
    assert job.plan == ["batched-cfg"]
    assert page.newest() == job.id


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": "x"}, "seed is"),
        ({"techniques": "quantise:fp8"}, "quantise"),
        ({"techniques": "step-cache deepcache:block-num=2"}, "both decide"),
        ({"frames": 10**9 + 1}, "will not fit"),
        ({"techniques": "lora:/etc/x"}, "names a file"),
        ({"model": "sora"}, "this server runs pocket"),
        ({"kind": "Blend", "weights": "one two"}, "weights are"),
    ],
)
def test_what_is_wrong_is_shown_before_the_click_and_refused_after_it(
    page: Page, change: dict[str, Any], words: str
) -> None:
    wrong = replace(SAID, **change)
    assert words in page.explain(*values(wrong))
    assert 'class="wrong"' in page.explain(*values(wrong))
    with pytest.raises(gradio.Error, match=words):
        page.generate({}, *values(wrong))


def test_the_estimate_is_shown_and_what_cannot_be_added(page: Page) -> None:
    told = page.explain(*values(replace(SAID, techniques="batched-cfg step-cache")))
    assert "4 passes of" in told
    assert "fits" in told
    assert "batched-cfg (exact)" in told
    assert "deepcache: " in told
    assert "cannot be added here" in told
    assert "cannot be added" not in page.explain(*values(replace(SAID, plan=FASTEST)))


@pytest.mark.parametrize(
    ("kind", "field", "count", "task"),
    [
        ("Image to video", "image", 1, "ImageToVideo"),
        ("Image to image", "image", 1, "ImageToImage"),
        ("Blend", "images", 2, "Blend"),
    ],
)
def test_images_begin_videos_and_pictures(
    page: Page, desk: Service, picture: str, kind: str, field: str, count: int, task: str
) -> None:
    asked = values(replace(SAID, kind=kind, weights="1 3" if kind == "Blend" else "", creativity=0.5))
    assert 'class="fine"' in page.explain(*asked)
    job = desk.store.get(page.generate({field: [picture] * count, "video": [picture]}, *asked))
    assert job.request["task"] == task
    assert len(job.inputs) == count
    assert job.request.get("creativity", 0.5) == 0.5
    assert (job.request["width"], job.request["height"]) == (128, 128)
    again = desk.store.get(page.again(job.id))
    desk.delete(job.id)
    assert [desk.folder.path(name).read_bytes()[:4] for name in again.inputs] == [b"\x89PNG"] * count
    assert set(again.inputs).isdisjoint(job.inputs)


def test_a_task_without_its_file_says_so(page: Page) -> None:
    with pytest.raises(gradio.Error, match="needs image"):
        page.generate({}, *values(replace(SAID, kind="Image to video")))


def test_what_is_no_image_is_refused_and_leaves_nothing(page: Page, desk: Service, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"<svg/>")
    with pytest.raises(gradio.Error, match="no PNG"):
        page.generate({"image": [str(tmp_path / "a.png")]}, *values(replace(SAID, kind="Image to image")))
    assert list((desk.folder.root / "inputs").iterdir()) == []


# Settings


def test_settings_come_back_from_a_file(page: Page, desk: Service, tmp_path: Path) -> None:
    job = desk.store.get(page.generate({}, *values(SAID)))
    record = {"model": "pocket", "request": job.request, "plan": ["batched-cfg"]}
    media.write(tmp_path / "a.mp4", torch.zeros(5, 128, 128, 3, dtype=torch.uint8), fps=16, record=record)
    back = page.settings_of_file(str(tmp_path / "a.mp4"))
    assert back == page.settings_of_job(job.id)
    assert back == replace(SAID, resolution="Own", negative="")
    made = desk.store.get(page.generate({}, *values(back)))
    assert made.request == job.request


@pytest.mark.parametrize("content", [b"", b"no video", b"\x00\x00\x00\x18ftypmp42" + bytes(200)])
def test_a_file_without_settings_is_told(page: Page, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(gradio.Error, match="no swiftwan settings"):
        page.settings_of_file(str(tmp_path / "a.mp4"))


def test_a_file_with_half_a_record_is_told(page: Page, tmp_path: Path) -> None:
    frames = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    media.write(tmp_path / "a.png", frames, fps=1, record={"request": {"task": "TextToImage", "prompt": "a"}})
    with pytest.raises(gradio.Error, match="not complete"):
        page.settings_of_file(str(tmp_path / "a.png"))


# What is done to jobs


def test_the_queue_is_ordered_and_emptied(page: Page, desk: Service) -> None:
    first, second, third = (page.generate({}, *values(SAID)) for _ in range(3))
    page.move(third, "first")
    page.move(second, "up")
    assert [job.id for job in desk.store.queue()] == [third, second, first]
    assert show.queue(desk).index(third) < show.queue(desk).index(second)
    page.pause()
    assert desk.store.paused
    page.cancel(first)
    assert desk.store.get(first).state == "cancelled"
    assert page.retry(first) == first
    with pytest.raises(gradio.Error, match="is queued"):
        page.retry(first)
    page.delete(first)
    assert page.job(first) is None


def test_an_unknown_job_shows_an_empty_stage(page: Page) -> None:
    assert "appears here" in page.refresh("video_none")[1]
    page.cancel("video_none")
    assert page.again("video_none") == ""
    assert page.settings_of_job("video_none") is None


# What is shown


def test_a_prompt_is_text_and_never_markup(page: Page, desk: Service) -> None:
    job_id = page.generate({}, *values(replace(SAID, prompt=EVIL)))
    shown = show.queue(desk)
    taken = desk.store.claim("cpu")
    assert taken is not None
    desk.folder.write(desk.folder.preview(taken), [b"jpeg"])
    shown += "".join(page.refresh(job_id))
    assert "data:image/jpeg;base64,anBlZw==" in shown
    desk.store.fail(taken, "internal", EVIL)
    failed = desk.store.get(job_id)
    shown += "".join(page.refresh(job_id)) + show.pair(failed, None, {}) + page.gallery() + show.title(failed)
    assert EVIL not in shown.replace(show.title(failed), "")
    assert "&lt;img" in shown


def test_accuracy_is_measured_beside_the_plain_run(page: Page, desk: Service, wait: Any) -> None:
    frames = torch.randint(0, 255, (5, 32, 32, 3), dtype=torch.uint8)
    ids = []
    for techniques in ("", "batched-cfg"):
        ids.append(page.generate({}, *values(replace(SAID, techniques=techniques))))
        job = desk.store.claim("cpu")
        assert job is not None
        name = desk.folder.result(job, ".mp4")
        media.write(desk.folder.path(name), frames, fps=16, record={"request": {}})
        record = {"plan": techniques.split(), "seconds": {"total": 1.0}, "step_seconds": [0.5, 0.25]}
        desk.store.complete(job, {"video": name}, record)
    plain, fast = map(desk.store.get, ids)
    assert page.reference_of(fast) == plain
    assert page.reference_of(plain) is None
    assert "Being measured" in "".join(page.refresh(fast.id))
    wait(lambda: page.accuracy.look(fast, plain) is not None)
    shown = "".join(page.refresh(fast.id))
    assert "100.0 dB" in shown  # the same frames
    assert "<dt>SSIM</dt><dd>1.0000</dd>" in shown
    assert "CLIP score" in shown
    assert "5.00 frames/s" in shown
    assert "step 2: 0.25 s" in shown
    assert "100.0 dB" in page.pair(plain.id, fast.id)


def test_a_record_of_expired_files_is_shown_without_them(page: Page, desk: Service) -> None:
    job_id = page.generate({}, *values(SAID))
    job = desk.store.claim("cpu")
    assert job is not None
    desk.store.complete(job, {"video": desk.folder.result(job, ".mp4")}, {"plan": []})
    desk.store.expire(2e9)
    assert "have expired" in page.refresh(job_id)[1]
    assert "have expired" in page.gallery()
    assert "<video" not in page.refresh(job_id)[1] + page.gallery() + page.pair(job_id, job_id)


# What is served


def test_the_page_and_its_files_need_the_key(served: TestClient) -> None:
    assets = (
        "/",
        "/config",
        "/theme.css",
        "/gradio_api/info",
        "/gradio_api/queue/join",
        "/gradio_api/upload",
        "/assets/x.js",
        "/benchmarks/a/report.html",
    )
    for path in assets:
        assert served.get(path, headers={"Authorization": ""}).status_code == 401
        assert served.post(path, headers={"Authorization": ""}).status_code == 401
    inside = served.get("/")
    assert inside.status_code == 200
    assert inside.headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'self'" in inside.headers["Content-Security-Policy"]


def test_every_route_of_the_page_needs_the_key(served: TestClient) -> None:
    walked = 0
    for mounted in [route for route in served.app.routes if isinstance(route, Mount)]:  # type: ignore[attr-defined]
        for route in mounted.app.routes:
            path = getattr(route, "path", "/").replace("{", "").replace("}", "").replace(":path", "")
            for method in getattr(route, "methods", None) or ("GET",):
                answer = served.request(method, path, headers={"Authorization": "Bearer wrong"})
                assert answer.status_code == 401, (method, path)
                walked += 1
    assert walked > 20


def test_the_http_interface_is_still_there(served: TestClient) -> None:
    assert served.get("/v1/videos").json()["object"] == "list"


def test_files_of_the_server_are_not_served(served: TestClient, desk: Service) -> None:
    (desk.folder.root / "results" / "x.mp4").write_bytes(b"x")
    for path in (desk.folder.database, desk.folder.root / "results" / "x.mp4", Path("/etc/passwd")):
        assert served.get(f"/gradio_api/file={path}").status_code in (403, 404)


def test_uploads_stay_in_the_servers_folder(served: TestClient, desk: Service) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "png")
    told = served.post("/gradio_api/upload", files={"files": ("../../x.png", buffer.getvalue())}).json()
    assert Path(told[0]).is_relative_to(desk.folder.root / "uploads")
    assert (desk.folder.root / "uploads").stat().st_mode & 0o077 == 0


def test_a_report_is_shown_and_nothing_beside_its_folder(served: TestClient, desk: Service) -> None:
    assert "No report yet" in reports.frame(None)
    folder = desk.folder.root / "benchmarks" / "pocket"
    folder.mkdir(parents=True)
    (folder / "report.html").write_text("<p>a report</p>")
    (folder / "rows.jsonl").write_text(json.dumps({}))
    (folder / "away.html").symlink_to(desk.folder.database)
    assert reports.found(desk.folder.root) == ["pocket"]
    assert 'src="/benchmarks/pocket/report.html"' in reports.frame("pocket")
    answer = served.get("/benchmarks/pocket/report.html")
    assert (answer.text, answer.headers["X-Frame-Options"]) == ("<p>a report</p>", "SAMEORIGIN")
    for path in (
        "pocket/rows.jsonl",
        "pocket/away.html",
        "..%2f/jobs.sqlite3",
        "pocket/..%2f..%2fjobs.sqlite3",
        "x/y.html",
    ):
        assert served.get(f"/benchmarks/{path}").status_code == 404
