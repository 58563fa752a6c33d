"""Image tasks on the command line, with the embedded model: files out, and wrong requests that write nothing."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

import swiftwan.cli
from swiftwan import media

SMALL = ("--width", "32", "--height", "32", "--steps", "2", "--device", "cpu", "--seed", "1")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32), "red").save("a.png")
    Image.new("RGBA", (64, 48), "blue").save("b.png")
    frames = torch.full((9, 32, 32, 3), 90, dtype=torch.uint8)
    media.write(Path("v.mp4"), frames, fps=8, record={"request": {}})
    return tmp_path


def call(capsys, *arguments):
    code = swiftwan.cli.main(arguments)
    told = capsys.readouterr()
    return code, told.out, told.err


@pytest.mark.parametrize(
    ("arguments", "task", "frames"),
    [
        (("--image", "a.png", "--frames", "5", "--out", "o.mp4"), "ImageToVideo", 5),
        (("--image", "b.png", "--creativity", "0.5", "--out", "o.png"), "ImageToImage", 1),
        (("--image", "a.png", "--image", "a.png", "--weight", "1", "--weight", "2", "--out", "o.png"), "Blend", 1),
        (("--video", "v.mp4", "--creativity", "0.5", "--frames", "5", "--out", "o.mp4"), "VideoToVideo", 5),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_task_writes_its_file_and_like_repeats_it(capsys, arguments, task, frames):
    code, out, err = call(capsys, "generate", "a red circle", *arguments, *SMALL)
    assert code == 0, err
    path = Path(out.strip())
    record = media.read_record(path)
    assert record["request"]["task"] == task
    assert len(media.read_frames(path)) == frames
    assert [given["name"] for given in record["inputs"]] == [a for a in arguments if a[:2] in ("a.", "b.", "v.")]
    again = f"again{path.suffix}"
    assert call(capsys, "generate", "--like", str(path), "--out", again)[0] == 0
    assert Path(again).read_bytes() == path.read_bytes()
    assert call(capsys, "info", str(path))[0] == 0


def test_how_an_image_was_fitted_is_told(capsys):
    arguments = ("a red circle", "--image", "b.png", "--creativity", "0.5", "--out", "o.png", *SMALL)
    code, out, err = call(capsys, "explain", *arguments)
    told = "b.png: transparency laid over white, cropped from 64x48 to 48x48, scaled to 32x32"
    assert told in out
    assert "the last 1 of 2 steps" in out
    assert told in call(capsys, "generate", *arguments)[2]
    assert told.removeprefix("b.png: ") in call(capsys, "info", "o.png")[1]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--image none.png --out o.mp4", "image 'none.png' does not exist"),
        ("--image text.png --out o.mp4", "is no image of a known kind"),
        ("--image a.png --creativity 1.5 --out o.png", "creativity is 1.5; allowed: 0 to 1"),
        ("--image a.png --weight 1 --out o.png", "a blend of 1 image; it takes two or more"),
        ("--image a.png --image b.png --out o.png", "the images of a blend differ in size (32x32, 64x48)"),
        ("--image a.png --image a.png --weight 0 --weight 0 --out o.png", "sum to zero"),
        ("--image a.png --image a.png --weight 1 --out o.png", "1 weights for 2 images"),
        ("--image a.png --frames 1 --out o.mp4", "num_frames is 1"),
        ("--image a.png --last-image a.png --out o.mp4", "'pocket' knows no last image"),
        ("--video a.png --out o.mp4", "video 'a.png' is no .mp4"),
        ("--video v.mp4 --frames 33 --out o.mp4", "has 9; take 9 or fewer"),
        ("--video v.mp4 --out o.png", "'o.png' is an image, which cannot hold 9 frames"),
        ("--image a.png --model wan2.1-t2v-1.3b --out o.mp4", "cannot begin a video with an image"),
        ("--model wan2.2-i2v-a14b --out o.mp4", "makes videos from an image"),
    ],
)
def test_a_wrong_request_writes_nothing(capsys, line, words):
    Path("text.png").write_text("no image")
    before = sorted(os.listdir())
    code, out, err = call(capsys, "generate", "x", *line.split(), "--device", "cpu")
    assert (code, out) == (2, ""), err
    assert words in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("error: ")
    assert sorted(os.listdir()) == before
