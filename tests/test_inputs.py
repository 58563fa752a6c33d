"""What a request brings: read upright, fitted to size, said how; refused in one line where it cannot be read."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import swiftwan as sw
from swiftwan import inputs, media
from swiftwan.errors import RequestError
from swiftwan.models.config import KNOWN_MODELS, POCKET_DEFAULTS
from swiftwan.pipelines.request import Grid

GRID = Grid(spatial=16, temporal=4)
OFFICIAL = KNOWN_MODELS["wan2.1-i2v-14b-480p"].defaults


def halves(width, height, left="red", right="blue"):
    image = Image.new("RGB", (width, height), left)
    image.paste(Image.new("RGB", (width - width // 2, height), right), (width // 2, 0))
    return image


def sized(request, defaults=POCKET_DEFAULTS):
    return inputs.sized(request, defaults, GRID)


def given(request, defaults=POCKET_DEFAULTS):
    return inputs.read(sized(request, defaults).completed(defaults))


@pytest.mark.parametrize(
    ("size", "expected"),
    [((832, 480), (832, 480)), ((480, 832), (480, 832)), ((1000, 1000), (624, 624)), ((4000, 10), (1264, 304))],
    ids=str,
)
def test_the_models_area_in_the_images_aspect(size, expected):
    request = sized(sw.ImageToVideo("x", image=Image.new("RGB", size)), OFFICIAL)
    assert (request.width, request.height) == expected


def test_one_side_asked_for_decides_the_other():
    image = Image.new("RGB", (200, 100))
    assert sized(sw.ImageToImage("x", image=image, width=320)).height == 160
    assert sized(sw.ImageToImage("x", image=image, height=160)).width == 320
    asked = sized(sw.ImageToImage("x", image=image, height=96, width=16))
    assert (asked.width, asked.height) == (16, 96)


def test_an_image_of_the_size_is_used_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    read = given(sw.ImageToImage("x", image=Image.fromarray(pixels), width=48, height=32))
    assert torch.equal(read.pixels, torch.from_numpy(pixels)[None, None])
    assert str(read.inputs[0]) == "memory: used as it is"


def test_a_crop_is_even_and_said():
    read = given(sw.ImageToImage("x", image=halves(200, 100), width=64, height=64))
    assert read.inputs[0].fitted == "cropped from 200x100 to 100x100, scaled to 64x64"
    picture = read.pixels[0, 0]
    assert picture.shape == (64, 64, 3)
    assert picture[:, :28, 0].min() > 250
    assert picture[:, 36:, 2].min() > 250


def test_modes_and_orientation_are_said(tmp_path):
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    read = given(sw.ImageToImage("x", image=clear, width=32, height=32))
    assert read.pixels.min() == 255
    assert read.inputs[0].fitted == "transparency laid over white"
    read = given(sw.ImageToImage("x", image=Image.new("L", (32, 32), 9), width=32, height=32))
    assert (read.pixels == 9).all()
    assert read.inputs[0].fitted == "made RGB from mode L"
    lying, exif = halves(64, 32), Image.Exif()
    exif[274] = 6  # turned by 90 degrees
    lying.save(tmp_path / "phone.jpg", exif=exif, quality=95)
    request = sized(sw.ImageToImage("x", image=tmp_path / "phone.jpg", width=32))
    assert request.height == 64
    read = given(request)
    assert "upright" in read.inputs[0].fitted
    assert read.pixels[0, 0, :24, :, 0].min() > 200  # what was on the left is on top


def test_a_file_is_known_by_its_bytes(tmp_path):
    path = tmp_path / "a.png"
    halves(32, 32).save(path)
    one = given(sw.ImageToImage("x", image=path)).inputs[0]
    assert one.sha256 == inputs.sha256_of(path)
    halves(32, 32, left="green").save(path)
    assert one.sha256 != inputs.sha256_of(path)


def huge_png(side):
    """A header of many pixels, and none behind it."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    packed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def png(mode, size=(8, 8)):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "png")
    return buffer.getvalue()


def animation():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "png", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")])
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "does not exist"),
        (b"", "is no image of a known kind"),
        (b"GIF89a" + bytes(99), "is no image of a known kind"),
        (b"hello" * 99, "is no image of a known kind"),
        (png("RGB", (99, 99))[:-60], "is damaged"),
        (huge_png(9_000), "is 9000x9000, more than the 67108864 pixels allowed; scale it down"),
        (huge_png(20_000), "has more pixels than the 67108864 allowed; scale it down"),
        (png("I;16"), "has mode I;16, not 8 bits a channel"),
        (animation(), "holds 2 pictures; give one"),
    ],
    ids=["missing", "empty", "gif", "text", "cut", "large", "bomb", "16 bit", "animated"],
)
def test_an_image_that_cannot_be_read(tmp_path, data, words):
    path = tmp_path / "a.png"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(RequestError, match=words) as problem:
        sized(sw.ImageToVideo("x", image=path))
    assert "\n" not in str(problem.value)
    assert "a.png" in str(problem.value)


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(RequestError, match="is a folder"):
        sized(sw.ImageToVideo("x", image=tmp_path))


def test_a_blends_images_are_of_one_size():
    images = [Image.new("RGB", (32, 32)), Image.new("RGB", (48, 32))]
    with pytest.raises(RequestError, match=r"differ in size \(32x32, 48x32\); crop or scale"):
        sized(sw.Blend("x", images=images))


# Videos


@pytest.fixture
def clip(tmp_path) -> Path:
    frames = torch.zeros(11, 48, 64, 3, dtype=torch.uint8)
    frames[5:] = 200
    return media.write(tmp_path / "clip.mp4", frames, fps=12, record={"request": {}})


def test_a_video_brings_its_size_length_and_rate(clip):
    request = sized(sw.VideoToVideo("x", video=clip))
    assert (request.num_frames, request.fps) == (9, 12)
    assert (request.width, request.height) == (144, 96)  # the pocket model's area
    read = given(sw.VideoToVideo("x", video=clip, width=64, height=48, num_frames=5))
    assert read.pixels.shape == (1, 5, 48, 64, 3)
    assert read.pixels.max() < 9
    assert read.inputs[0].fitted == "its first 5 frames"


def test_frames_in_memory_are_a_video():
    frames = [Image.new("RGB", (64, 32), (n, n, n)) for n in range(6)]
    read = given(sw.VideoToVideo("x", video=frames, width=32, height=32))
    assert read.pixels[0, :, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert read.inputs[0].fitted == "its first 5 frames, cropped from 64x32 to 32x32"


def test_a_video_that_cannot_be_read(tmp_path, clip):
    with pytest.raises(RequestError, match="num_frames is 13, and the video '.*' has 11; take 9 or fewer"):
        sized(sw.VideoToVideo("x", video=clip, num_frames=13))
    (tmp_path / "text.mp4").write_text("#EXTM3U\nfile:///etc/passwd")
    with pytest.raises(RequestError, match="is no .mp4, .mov"):
        sized(sw.VideoToVideo("x", video=tmp_path / "text.mp4"))
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:400])
    with pytest.raises(RequestError, match=r"cut.mp4' is damaged: [^\[]+\.$"):
        sized(sw.VideoToVideo("x", video=tmp_path / "cut.mp4"))
    with pytest.raises(RequestError, match="does not exist"):
        sized(sw.VideoToVideo("x", video=tmp_path / "none.mp4"))
    with pytest.raises(RequestError, match="has no frames"):
        sized(sw.VideoToVideo("x", video=[]))
