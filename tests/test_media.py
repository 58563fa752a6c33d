"""media.py: what is written can be read back, appears whole or not at all, and repeats to the byte."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch
from PIL import Image

from swiftwan import media
from swiftwan.errors import OutputError, RequestError

RECORD = {
    "model": "pocket",
    "request": {"task": "TextToVideo", "prompt": "a «red» circle 色调 \U0001f600 \ud800", "seed": 7},
    "plan": ["quantize:fp8"],
}


def moving_blocks(num_frames: int = 9, height: int = 64, width: int = 96) -> torch.Tensor:
    """Random colours in blocks of 16 pixels, shifted by a block a frame."""
    coarse = torch.randint(0, 256, (height // 16, width // 16, 3), dtype=torch.uint8)
    image = coarse.repeat_interleave(16, 0).repeat_interleave(16, 1)
    return torch.stack([image.roll(16 * i, dims=1) for i in range(num_frames)])


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(255**2 / (a.double() - b.double()).square().mean()))


@pytest.mark.parametrize(("quality", "at_least_db"), [(10, 38), (8, 34), (1, 18)])
def test_an_mp4_holds_the_frames(tmp_path: Path, quality: int, at_least_db: float) -> None:
    frames = moving_blocks()
    path = media.write(tmp_path / "out.mp4", frames, fps=16, quality=quality, record=RECORD)
    again = media.read_frames(path)
    assert again.dtype == torch.uint8
    assert again.shape == frames.shape
    assert psnr(frames, again) > at_least_db


def test_quality_orders_size_and_error(tmp_path: Path) -> None:
    frames = torch.randint(0, 256, (5, 64, 64, 3), dtype=torch.uint8)
    paths = [media.write(tmp_path / f"{q}.mp4", frames, fps=16, quality=q, record=RECORD) for q in (1, 5, 10)]
    sizes = [path.stat().st_size for path in paths]
    quality = [psnr(frames, media.read_frames(path)) for path in paths]
    assert sizes == sorted(sizes)
    assert quality == sorted(quality)


def test_colours_survive(tmp_path: Path) -> None:
    """A wrong or missing matrix tag shifts pure colours by up to 20 levels."""
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 255, 255), (0, 0, 0)):
        frames = torch.tensor(colour, dtype=torch.uint8).expand(1, 32, 32, 3)
        path = media.write(tmp_path / "flat.mp4", frames, fps=16, quality=10, record=RECORD)
        worst = (media.read_frames(path).int() - frames.int()).abs().max()
        assert worst <= 4, f"{colour} came back off by {worst}"


def test_a_png_is_exact(tmp_path: Path) -> None:
    frames = torch.randint(0, 256, (1, 33, 47, 3), dtype=torch.uint8)
    path = media.write(tmp_path / "out.png", frames, fps=16, record=RECORD)
    assert torch.equal(media.read_frames(path), frames)
    assert media.read_record(path) == RECORD


def test_the_record_returns(tmp_path: Path) -> None:
    long = {"request": {"prompt": "x" * 70_000 + "色"}}
    for record in (RECORD, long):
        path = media.write(tmp_path / "out.mp4", moving_blocks(1), fps=16, record=record)
        assert media.read_record(path) == record


def test_the_record_survives_a_remux_that_drops_unknown_tags(tmp_path: Path) -> None:
    path = media.write(tmp_path / "out.mp4", moving_blocks(), fps=16, record=RECORD)
    copy = tmp_path / "copy.mp4"
    with av.open(path) as source, av.open(copy, "w") as target:
        target.metadata.update(source.metadata)
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    with av.open(copy) as container:
        assert "swiftwan" not in container.metadata
    assert media.read_record(copy) == RECORD


def test_facts(tmp_path: Path) -> None:
    path = media.write(tmp_path / "out.mp4", moving_blocks(9), fps=24, record=RECORD)
    facts = media.media_facts(path)
    assert (facts.width, facts.height, facts.num_frames, facts.fps, facts.codec) == (96, 64, 9, 24.0, "h264")
    assert facts.bytes == path.stat().st_size
    picture = media.write(tmp_path / "out.png", moving_blocks(1), fps=24, record=RECORD)
    assert media.media_facts(picture).to_json() == {
        "width": 96,
        "height": 64,
        "num_frames": 1,
        "fps": None,
        "codec": "png",
        "bytes": picture.stat().st_size,
    }


def test_the_index_stands_before_the_data(tmp_path: Path) -> None:
    data = media.write(tmp_path / "out.mp4", moving_blocks(), fps=16, record=RECORD).read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize(("name", "num_frames"), [("out.mp4", 33), ("out.png", 1)])
def test_equal_frames_give_equal_bytes(tmp_path: Path, name: str, num_frames: int) -> None:
    frames = torch.randint(0, 256, (num_frames, 64, 64, 3), dtype=torch.uint8)
    first = media.write(tmp_path / name, frames, fps=16, record=RECORD).read_bytes()
    assert media.write(tmp_path / name, frames, fps=16, record=RECORD).read_bytes() == first


@pytest.mark.parametrize("cuts", [(1,), (16, 17), (3, 4, 30)])
def test_frames_in_pieces_give_the_same_bytes(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    frames = torch.randint(0, 256, (33, 64, 96, 3), dtype=torch.uint8)
    whole = media.write(tmp_path / "whole.mp4", frames, fps=16, record=RECORD).read_bytes()
    path = tmp_path / "pieces.mp4"
    with media.writing(path, num_frames=33, height=64, width=96, fps=16, record=RECORD) as add:
        for piece in frames.tensor_split(cuts):
            add(piece)
        assert not path.exists()
    assert path.read_bytes() == whole


def test_what_fails_between_two_pieces_leaves_no_file(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        with media.writing(path, num_frames=33, height=64, width=96, fps=16, record=RECORD) as add:
            add(moving_blocks())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail(tmp_path / "x.mp4")
    assert list(tmp_path.iterdir()) == []


def test_what_the_encoder_refuses_is_raised(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="array"),
        media.writing(tmp_path / "x.mp4", num_frames=5, height=64, width=96, fps=16, record=RECORD) as add,
    ):
        add(torch.zeros(5, 64, 96, 4, dtype=torch.uint8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="pins threads as Linux does")
def test_bytes_do_not_depend_on_the_number_of_cores(tmp_path: Path) -> None:
    frames = torch.randint(0, 256, (17, 128, 128, 3), dtype=torch.uint8)
    cores = os.sched_getaffinity(0)
    every = media.write(tmp_path / "every.mp4", frames, fps=16, record=RECORD).read_bytes()
    os.sched_setaffinity(0, {min(cores)})
    try:
        one = media.write(tmp_path / "one.mp4", frames, fps=16, record=RECORD).read_bytes()
    finally:
        os.sched_setaffinity(0, cores)
    assert one == every


def test_a_file_of_ours_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    for value in (0, 255):
        frames = torch.full((1, 16, 16, 3), value, dtype=torch.uint8)
        media.write(path, frames, fps=16, record=RECORD)
        assert torch.equal(media.read_frames(path), frames)
    assert os.listdir(tmp_path) == ["out.png"]


REFUSED = [
    ("out.gif", 1, 64, 64, "Known: .mp4, .png"),
    ("out", 1, 64, 64, "has no ending"),
    ("out.mp5", 1, 64, 64, "Did you mean '.mp4'"),
    ("out.png", 33, 64, 64, "33 frames; name it .mp4"),
    ("out.mp4", 1, 63, 64, "even sizes"),
    ("missing/out.mp4", 1, 64, 64, "does not exist"),
    ("file/out.mp4", 1, 64, 64, "does not exist"),
    ("folder.mp4", 1, 64, 64, "is a folder"),
    ("n" * 300 + ".mp4", 1, 64, 64, "too long a name"),
    ("nul\0.mp4", 1, 64, 64, "cannot be written"),
]


@pytest.mark.parametrize(("name", "num_frames", "height", "width", "words"), REFUSED)
def test_refusals_are_the_same_before_and_after_the_run(
    tmp_path: Path, name: str, num_frames: int, height: int, width: int, words: str
) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    path = tmp_path / name
    with pytest.raises(OutputError) as early:
        media.check_writable(path, num_frames=num_frames, height=height, width=width)
    frames = torch.zeros(num_frames, height, width, 3, dtype=torch.uint8)
    with pytest.raises(OutputError) as late:
        media.write(path, frames, fps=16, record=RECORD)
    assert words in str(early.value)
    assert words in str(late.value)
    assert "\n" not in str(early.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.mp4"]


def test_check_writable_leaves_nothing(tmp_path: Path) -> None:
    media.check_writable(tmp_path / "out.mp4", num_frames=81, height=480, width=832)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("quality", [0, 11])
def test_quality_out_of_range(tmp_path: Path, quality: int) -> None:
    with pytest.raises(RequestError, match=f"quality is {quality}; allowed: 1"):
        media.write(tmp_path / "out.mp4", moving_blocks(1), fps=16, quality=quality, record=RECORD)


FAULTS = [
    (OSError(errno.ENOSPC, "No space left on device"), OutputError, "is full"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), OutputError, "is full"),
    (OSError(errno.EACCES, "Permission denied"), OutputError, "not writable"),
    (OSError(errno.EROFS, "Read-only file system"), OutputError, "not writable"),
    (OSError(errno.EIO, "Input/output error"), OutputError, "Input/output error"),
    (KeyboardInterrupt("now"), KeyboardInterrupt, "now"),
]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(("fault", "raised", "words"), FAULTS)
def test_a_failing_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    fault: BaseException,
    raised: type[BaseException],
    words: str,
) -> None:
    path = tmp_path / "out.png"
    path.write_bytes(b"before")

    def fail(*_: object) -> None:
        raise fault

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(raised, match=words):
        media.write(path, moving_blocks(1), fps=16, record=RECORD)
    assert os.listdir(tmp_path) == ["out.png"]
    assert path.read_bytes() == b"before"


def test_too_little_room_is_told_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 2**20, 2**20)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"has 1.0 MiB free, and 'out.mp4' may need 31.\d+ MiB"):
        media.check_writable(tmp_path / "out.mp4", num_frames=81, height=480, width=832)


def test_noise_at_the_best_quality_stays_within_the_estimate(tmp_path: Path) -> None:
    frames = torch.randint(0, 256, (9, 240, 416, 3), dtype=torch.uint8)
    video = media.write(tmp_path / "noise.mp4", frames, fps=16, quality=10, record=RECORD)
    assert video.stat().st_size < frames[..., 0].numel() + 2**20
    picture = media.write(tmp_path / "noise.png", frames[:1], fps=16, record=RECORD)
    assert picture.stat().st_size < frames[:1].numel() + 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_full_disk(tmp_path: Path) -> None:
    """A real one: a tmpfs of 64 KiB, in a mount namespace of its own."""
    program = (
        "import os, sys, torch\n"
        "from pathlib import Path\n"
        "from swiftwan import errors, media\n"
        "folder = Path(sys.argv[1])\n"
        "frames = torch.randint(0, 256, (1, 256, 256, 3), dtype=torch.uint8)\n"
        "try:\n"
        "    media.write(folder / 'out.png', frames, fps=16, record={})\n"
        "except errors.OutputError as error:\n"
        "    print(error, os.listdir(folder))\n"
    )
    script = f'mount -t tmpfs -o size=64k tmpfs {tmp_path} && exec "{sys.executable}" -c "$1" {tmp_path}'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", program],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(media.__file__).parents[1])},
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    assert done.stdout == f"the disk of '{tmp_path}' is full; free some room or write elsewhere. []\n", done.stderr


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, where root may not write either")
def test_a_folder_nobody_may_write_to() -> None:
    with pytest.raises(OutputError, match=r"'/proc'"):
        media.check_writable(Path("/proc/out.mp4"), num_frames=1, height=16, width=16)


def write_foreign_mp4(path: Path, **tags: str) -> None:
    with av.open(path, "w", options={"movflags": "use_metadata_tags"}) as container:
        container.metadata.update(tags)
        stream = container.add_stream("libx264", rate=16)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        container.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        container.mux(stream.encode())


def test_files_of_others_carry_no_record(tmp_path: Path) -> None:
    plain, comfy, odd = tmp_path / "plain.mp4", tmp_path / "comfy.mp4", tmp_path / "odd.mp4"
    write_foreign_mp4(plain)
    write_foreign_mp4(comfy, comment=json.dumps({"prompt": {"3": {"class_type": "KSampler"}}}))
    write_foreign_mp4(odd, swiftwan="[" * 100_000)
    picture = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(picture)
    for path in (plain, comfy, odd, picture):
        with pytest.raises(OutputError, match="carries no swiftwan record"):
            media.read_record(path)


@pytest.mark.parametrize("read", [media.read_record, media.read_frames, media.media_facts])
def test_what_is_no_media(tmp_path: Path, read: object) -> None:
    assert callable(read)
    text = tmp_path / "text.mp4"
    text.write_text("#EXTM3U\nfile:///etc/passwd\n")
    empty = tmp_path / "empty.png"
    empty.touch()
    for path in (text, empty):
        with pytest.raises(OutputError, match="neither an mp4 nor a PNG"):
            read(path)
    with pytest.raises(OutputError, match="does not exist"):
        read(tmp_path / "missing.mp4")
    with pytest.raises(OutputError, match="cannot be read"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["out.mp4", "out.png"])
def test_damage_is_told(tmp_path: Path, name: str) -> None:
    frames = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    path = media.write(tmp_path / name, frames, fps=16, record=RECORD)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(OutputError, match="is damaged"):
        media.read_frames(path)
