"""A browser walks the page of a real server with the pocket model: generate, watch, cancel, compare, come back.

    SWIFTWAN_PICTURES=docs/pictures python -m pytest tests/serve/page/test_walk.py

also takes the pictures that the docs show.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from swiftwan.serve.page import techniques

pytest.importorskip("gradio", reason="the page needs swiftwan[ui]")
playwright = pytest.importorskip("playwright.sync_api", reason="the walk needs playwright, of swiftwan[dev]")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; on Debian: apt-get install chromium"),
    pytest.mark.filterwarnings("ignore"),
]

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PROMPT = "a large yellow star spins over a night background"
PATIENCE_MS = 120_000
expect = playwright.expect  # waits until it is true: the page follows the queue, and a busy machine follows late
expect.set_options(timeout=PATIENCE_MS)
TABS = ("Generate", "Queue", "Gallery", "Compare", "Benchmark")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address and folder of `swiftwan ui`."""
    folder = tmp_path_factory.mktemp("ui")
    report = folder / "data" / "benchmarks" / "pocket" / "report.html"
    report.parent.mkdir(parents=True)
    report.write_text("<!doctype html><html lang='en'><title>a report</title><main><h1>A report</h1></main></html>")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("SWIFTWAN_API_KEY", None)
    command = [sys.executable, "-m", "swiftwan", "ui", "--port", str(port), "--data", str(folder / "data")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, "--device", "cpu", "--grace", "1"], env=environment, stderr=log)
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{address}/health/ready", timeout=5).close()
            break
        except OSError:
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.2)
    yield address, folder
    process.terminate()
    assert process.wait(60) == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


Open = Callable[..., Any]


@pytest.fixture
def open_page(served: tuple[str, Path], browser: Any) -> Iterator[Open]:
    """Open the page in a browser of its own; at the end it must have loaded nothing from outside and told no error."""
    address, _ = served
    contexts, problems = [], []

    def open_page(width: int = 1440, height: int = 1000) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, reduced_motion="reduce")
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda asked: None if is_ours(asked.url) else problems.append(f"asked for {asked.url}"))
        page.goto(address)
        page.locator("#explained .fine").wait_for()
        return page

    def is_ours(url: str) -> bool:
        return url.startswith((address, "data:", "blob:"))

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def picture(tmp_path: Path) -> Callable[..., None]:
    folder = Path(os.environ.get("SWIFTWAN_PICTURES") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)

    def picture(page: Any, name: str) -> None:
        page.evaluate("scrollTo(0, 0)")
        page.mouse.move(2, 2)  # a button under the pointer looks chosen
        page.wait_for_timeout(400)
        page.screenshot(path=folder / f"{name}.jpg", type="jpeg", quality=88)
        assert (folder / f"{name}.jpg").stat().st_size > 10_000

    return picture


def ask(page: Any, prompt: str = PROMPT, *, steps: int = 10, frames: int = 17, seed: str = "7") -> None:
    """Fill in the inputs, and press the button by the keyboard."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("number input for Frames").fill(str(frames))
    page.get_by_label("number input for Steps").fill(str(steps))
    page.get_by_label("Seed", exact=True).fill(seed)
    page.get_by_label("Seed", exact=True).press("Tab")
    page.locator("#explained").get_by_text(f"{frames} frames").wait_for()
    page.locator("#run").focus()
    page.keyboard.press("Enter")


def finished(page: Any, seed: str) -> None:
    page.locator("#result .told").get_by_text(f"seed {seed}", exact=True).wait_for()
    page.locator("#result .state.completed").wait_for()


def test_generate_watch_and_see_it_in_another_browser(open_page: Open, picture: Any) -> None:
    page = open_page()
    ask(page, steps=40, frames=33, seed="11")
    page.locator("#result .stage img.preview").wait_for()
    page.locator("#result .told").get_by_text("left").wait_for()
    expect(page.get_by_role("progressbar")).to_have_attribute("aria-valuenow", re.compile("[4-9][0-9]"))
    picture(page, "page-running")
    page.context.close()  # nothing is lost with it

    page = open_page()
    page.locator("#result .told").get_by_text("seed 11").wait_for()
    finished(page, "11")
    expect(page.locator("#result .stage video")).to_have_js_property("videoWidth", 128)
    page.get_by_role("button", name="Accuracy").click()
    page.locator("#metrics").get_by_text("Prompt, by the judge").wait_for()
    page.locator("#metrics .facts dd").get_by_text("frames/s").wait_for()
    expect(page.locator("#metrics rect.column")).to_have_count(40)
    expect(page.locator("#result button:visible")).to_have_text(["Generate", "Cancel", "Again", "Delete"])
    picture(page, "page")


def test_cancel_stops_it_and_the_queue_can_be_ordered(open_page: Open, picture: Any) -> None:
    page = open_page()
    ask(page, steps=100, frames=33, seed="21")
    page.locator("#result .state.in_progress").wait_for()
    ask(page, "a red circle moves left over a blue background", seed="22")
    page.locator("#result").get_by_text("Next in the queue").wait_for()
    ask(page, "a green square bounces over a pink background", seed="23")
    page.get_by_role("tab", name="Queue").click()
    waiting = page.locator(".rows li")
    waiting.nth(2).wait_for()
    picture(page, "page-queue")
    waiting.nth(2).get_by_role("button", name="First: a green").click()
    page.locator(".rows li:nth-child(2)", has_text="green").wait_for()
    waiting.nth(0).get_by_role("button", name="Cancel").click()
    page.locator(".rows li:nth-child(1)", has_text="yellow").wait_for(state="detached")
    page.get_by_text("Nothing runs and nothing waits.").wait_for()
    page.get_by_role("tab", name="Gallery").click()
    page.locator(".cards li", has_text="cancelled at denoise").wait_for()
    page.locator(".cards li", has_text="completed").nth(1).wait_for()


def test_conflicts_are_shown_before_the_click(open_page: Open, picture: Any) -> None:
    page = open_page()
    page.get_by_role("radio", name="My own").check()
    page.get_by_label("step-cache").check()
    page.locator("#explained").get_by_text("cannot be added here").click()
    page.get_by_label("batched-cfg").check()
    page.locator("#explained").get_by_text("2 techniques").wait_for()
    page.get_by_label("With their options").fill("step-cache:threshold=0.2 tf32")
    expect(page.get_by_role("checkbox", name="batched-cfg")).not_to_be_checked()
    page.get_by_label("cfg-skip").check()
    page.get_by_label("deepcache").check()
    page.locator("#explained .wrong").get_by_text("both decide").wait_for()
    expect(page.get_by_label("With their options")).to_have_value(re.compile(r"^step-cache:threshold=0\.2 tf32\b"))
    page.set_viewport_size({"width": 1440, "height": 1720})
    picture(page, "page-techniques")


def test_ticks_add_and_remove_and_what_was_typed_stays(open_page: Open) -> None:
    page = open_page()

    def line_of(line: str, *groups: list[str]) -> Any:
        return page.evaluate(f"given => ({techniques.script('lineOf')})(...given)", [line, *groups])

    assert line_of("", ["fused"], []) == ["fused"]
    assert line_of("quantize:fp8:keep=2", [], ["quantize:fp8", "fused"]) == ["quantize:fp8:keep=2 fused"]
    assert line_of("quantize:fp8:keep=2  lora:x=0.5", [], []) == ["lora:x=0.5"]
    assert line_of("", [], ["step-cache"]) == ["step-cache:threshold=0.1"]

    ticked = page.evaluate(f"line => ({techniques.script('ticksOf')})(line)", "fused tf32 lora:x ")
    assert dict(zip((kind for kind, _ in techniques.by_kind()), ticked, strict=True)) == {
        "exact": ["fused"],
        "near": ["tf32"],
        "approximate": [],
        "retrained": [],
    }


def test_boxes_ticked_faster_than_a_server_answers_stay_ticked(open_page: Open) -> None:
    page = open_page()
    page.get_by_role("radio", name="My own").check()
    names = ("fused", "tf32", "vae:tiling", "cfg-skip", "batched-cfg")
    page.get_by_role("checkbox", name="fused").wait_for()
    page.evaluate(
        "names => names.forEach(name => document.querySelector(`input[type=checkbox][name='${name}']`).click())", names
    )
    line = page.get_by_label("With their options")
    for name in names:
        expect(page.get_by_role("checkbox", name=name)).to_be_checked()
        expect(line).to_have_value(re.compile(rf"(^| ){name}\b"))


def test_two_results_play_in_step_and_settings_come_back(
    open_page: Open, served: tuple[str, Path], picture: Any
) -> None:
    page = open_page()
    for plan in ("Plain", "My own"):
        page.get_by_role("radio", name=plan).check()
        if plan == "My own":
            page.get_by_label("step-cache").check()
            page.locator("#explained").get_by_text("1 technique", exact=True).wait_for()
        ask(page, steps=8, frames=33, seed="36")
        page.locator("#result .state:not(.completed)").wait_for()
        finished(page, "36")
    page.get_by_role("tab", name="Compare").click()
    videos = page.locator(".pair video")
    expect(videos).to_have_count(2)
    expect(page.locator(".pair figcaption").nth(0)).to_have_text(re.compile("seed 36 · plain$"))
    expect(page.locator(".pair figcaption").nth(1)).to_have_text(re.compile("seed 36 · step-cache"))
    page.get_by_text("PSNR, right to left").wait_for(timeout=2 * PATIENCE_MS)  # by a process that waits for others
    page.get_by_role("button", name="Play", exact=True).click()
    page.wait_for_timeout(1200)
    one, other = (videos.nth(i).evaluate("v => [v.currentTime, v.paused]") for i in range(2))
    assert one[1] is other[1] is False
    assert min(abs(one[0] - other[0]), 2 - abs(one[0] - other[0])) < 0.5  # the clip loops after two seconds
    picture(page, "page-compare")
    page.get_by_role("button", name="Pause").click()

    page.get_by_role("tab", name="Generate").click()
    newest = max((served[1] / "data" / "results").glob("*.mp4"), key=lambda path: path.stat().st_mtime)
    page.get_by_label("Prompt", exact=True).fill("")
    page.get_by_label("Seed", exact=True).fill("")
    page.get_by_role("button", name="Settings from a file").click()
    page.locator("input[type=file]").last.set_input_files(newest)
    page.wait_for_function("[...document.querySelectorAll('textarea')].some(one => one.value.includes('star'))")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("36")
    expect(page.get_by_label("number input for Steps")).to_have_value("8")
    expect(page.get_by_label("With their options")).to_have_value(re.compile("^step-cache"))


def test_an_image_begins_a_video(open_page: Open, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (128, 128), (108, 164, 218)).save(tmp_path / "first.png")
    page = open_page()
    page.get_by_role("radio", name="Image to image").check()
    # Not any input for files: that of settings is there before the server has turned the page to the task.
    image = page.locator(".drop", has=page.get_by_text("Image", exact=True))
    image.locator("input[type=file]").set_input_files(tmp_path / "first.png")
    image.get_by_role("link").wait_for()  # to the file, once it is uploaded; its whole name is there only meanwhile
    page.get_by_label("Prompt", exact=True).fill("a red circle over a blue background")
    page.get_by_label("number input for Steps").fill("12")
    page.get_by_label("Seed", exact=True).fill("41")
    page.locator("#run").click()
    finished(page, "41")
    page.locator("#result .stage img").wait_for()


def test_the_gallery_shows_repeats_and_deletes(open_page: Open, picture: Any) -> None:
    page = open_page()
    ask(page, seed="52")
    finished(page, "52")
    page.get_by_role("tab", name="Gallery").click()
    card = page.locator(".cards li", has_text="seed 52").first
    card.wait_for()
    page.wait_for_timeout(500)
    picture(page, "page-gallery")
    card.get_by_role("button", name="Settings").click()
    page.get_by_role("tab", name="Generate", selected=True).wait_for()
    expect(page.get_by_label("Seed", exact=True)).to_have_value("52")
    page.get_by_role("tab", name="Gallery").click()
    card.get_by_role("button", name="Delete").click()
    card.wait_for(state="detached")


def test_the_report_is_in_the_page(open_page: Open) -> None:
    page = open_page()
    page.get_by_role("tab", name="Benchmark").click()
    page.frame_locator("iframe.report").get_by_role("heading", name="A report").wait_for()


@pytest.mark.parametrize("width", [1440, 390])
def test_axe_finds_nothing_serious(open_page: Open, width: int) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(width=width)
    for number, tab in enumerate(TABS if width > 1000 else TABS[:1]):
        if number:
            page.get_by_role("tab", name=tab).click()
            page.wait_for_timeout(600)
        found = Axe().run(page).response["violations"]
        serious = [
            (problem["id"], [node["html"][:160] for node in problem["nodes"]])
            for problem in found
            if problem["impact"] in ("serious", "critical")
        ]
        assert serious == [], tab


def test_it_fits_a_phone_and_works_by_keyboard(open_page: Open, picture: Any) -> None:
    page = open_page(width=360, height=780)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    picture(page, "page-phone")
    page.get_by_role("radio", name="Text to video").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    expect(page.get_by_role("radio", name="Image to video")).to_be_checked()
    seen = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.getAttribute('aria-label')"))
    assert {"run", "number input for Steps", "number input for Guidance"} <= seen
