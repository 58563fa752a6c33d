"""Command lines, and the requests they come to."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import swiftwan as sw
from swiftwan import media
from swiftwan.cli.asked import Asked
from swiftwan.cli.understand import free_name, understand
from swiftwan.errors import RequestError
from swiftwan.pipelines.request import TextToVideo


def test_free_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert free_name("A red, RED circle!", ".mp4") == Path("a-red-red-circle.mp4")
    assert free_name("../../etc/passwd", ".png") == Path("etc-passwd.png")
    assert free_name("???", ".mp4") == Path("swiftwan.mp4")
    assert free_name("红色圆" * 40, ".mp4") == Path("红色圆" * 13 + "红.mp4")
    assert len(free_name("word " * 40, ".mp4").stem) <= 40
    for name in ("a.mp4", "a-2.mp4"):
        Path(name).touch()
    assert free_name("a", ".mp4") == Path("a-3.mp4")


def test_defaults_are_left_to_the_model() -> None:
    run = understand(Asked(prompt="x"))
    assert run.request == TextToVideo("x")
    assert (run.model, run.plan, run.device, run.dtype) == ("pocket", "auto", None, None)
    assert understand(Asked(prompt="x", plan="none")).plan == []
    assert understand(Asked(prompt="x", quality="near")).plan == "auto:near"
    assert understand(Asked(prompt="x", quality="fast", plan="auto")).plan == "auto:fast"
    with pytest.raises(RequestError, match="--quality near is for --plan auto"):
        understand(Asked(prompt="x", quality="near", techniques=["fused"]))


def test_a_prompt_is_needed() -> None:
    with pytest.raises(RequestError, match="there is no prompt"):
        understand(Asked())


A, B = Path("a.png"), Path("b.png")


@pytest.mark.parametrize(
    ("asked", "request_"),
    [
        ({"image": [A]}, sw.ImageToVideo("x", image="a.png")),
        ({"image": [A], "last_image": B}, sw.ImageToVideo("x", image="a.png", last_image="b.png")),
        ({"image": [A], "out": Path("o.mp4")}, sw.ImageToVideo("x", image="a.png")),
        ({"image": [A], "out": Path("o.png")}, sw.ImageToImage("x", image="a.png")),
        ({"image": [A], "creativity": 0.3}, sw.ImageToImage("x", image="a.png", creativity=0.3)),
        ({"image": [A, B]}, sw.Blend("x", images=("a.png", "b.png"))),
        ({"image": [A, B], "weight": [0.3, 0.7]}, sw.Blend("x", images=("a.png", "b.png"), weights=(0.3, 0.7))),
        ({"video": Path("v.mp4"), "creativity": 0.5}, sw.VideoToVideo("x", video="v.mp4", creativity=0.5)),
        ({"out": Path("o.png"), "frames": 1}, sw.TextToImage("x")),
    ],
    ids=str,
)
def test_what_is_given_says_the_task(asked, request_):
    assert understand(Asked(prompt="x", **asked)).request == request_


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"creativity": 0.5}, "--creativity is for ImageToImage, Blend, VideoToVideo, and this is TextToVideo"),
        ({"image": [A], "creativity": 0.5, "out": Path("o.mp4")}, "--creativity is for .* this is ImageToVideo"),
        ({"image": [A], "last_image": B, "out": Path("o.png")}, "--last-image is for ImageToVideo"),
        ({"video": Path("v.mp4"), "image": [A]}, "--image is for"),
        ({"image": [A, B], "frames": 9}, "--frames is 9, and what Blend makes is a picture"),
        ({"image": [A, B], "out": Path("o.mp4")}, "'o.mp4' is a video, and Blend makes a picture; name it .png"),
        ({"plan": "auto", "techniques": ["tf32"]}, "both given; give one"),
    ],
    ids=str,
)
def test_what_does_not_go_together(asked, words):
    with pytest.raises(RequestError, match=words):
        understand(Asked(prompt="x", **asked))


def test_like_repeats_a_task_and_its_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16), "red").save(A)
    from swiftwan.inputs import sha256_of

    made = sw.ImageToImage("x", image="a.png", creativity=0.4, width=16, height=16, seed=3)
    inputs = [{"name": "a.png", "sha256": sha256_of(A), "fitted": ""}]
    record = {"model": "pocket", "request": made.to_json(), "inputs": inputs, "plan": []}
    frames = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    media.write(Path("o.png"), frames, fps=1, record=record)
    assert understand(Asked(like=Path("o.png"))).request == made
    changed = understand(Asked(like=Path("o.png"), creativity=0.9)).request
    assert changed == sw.ImageToImage("x", image="a.png", creativity=0.9, width=16, height=16, seed=3)
    # A video from the same image: a picture's creativity and frame do not go with it.
    video = understand(Asked(like=Path("o.png"), image=[A], out=Path("o.mp4"))).request
    assert video == sw.ImageToVideo("x", image="a.png", width=16, height=16, seed=3)
    Image.new("RGB", (16, 16), "blue").save(A)
    with pytest.raises(RequestError, match="'a.png' has changed since 'o.png' was made from it"):
        understand(Asked(like=Path("o.png")))
    assert understand(Asked(like=Path("o.png"), image=[A], out=Path("p.png"))).request.image == "a.png"
    A.unlink()
    with pytest.raises(RequestError, match="'a.png' does not exist"):
        understand(Asked(like=Path("o.png")))
