"""The words of ``swiftwan train``."""

import json

import pytest

from swiftwan.cli import main


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("styled")
    assert main(["train", "style-clips", str(folder), "--count", "2"]) == 0
    return folder


def test_style_clips_are_clips_with_captions(clips):
    assert sorted(path.name for path in clips.iterdir()) == ["clip00.mp4", "clip00.txt", "clip01.mp4", "clip01.txt"]


@pytest.mark.parametrize(
    ("arguments", "told"), [(("clips", "--count", "0"), "--count is 0"), (("file",), "'file' cannot be made")]
)
def test_style_clips_that_cannot_be_drawn(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["train", "style-clips", *arguments]) == 2
    assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_check_only_reports(clips, tmp_path, capsys):
    (clips / "odd.mp4").write_bytes(b"no video")
    try:
        assert main(["train", "lora", str(clips), "--out", str(tmp_path), "--check", "--json", "--device", "cpu"]) == 0
    finally:
        (clips / "odd.mp4").unlink()
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == []
    assert told["data"][0] == "2 clips and 0 images can be used"
    assert "odd.mp4: no caption" in told["data"][1]
    assert [path.name for path in tmp_path.iterdir()] == ["data.txt"]


def test_a_short_run_says_how_to_use_what_it_made(clips, tmp_path, capsys):
    options = [
        "--steps",
        "1",
        "--rank",
        "1",
        "--frames",
        "5",
        "--width",
        "64",
        "--height",
        "64",
        "--targets",
        "self-q,ffn",
        "--device",
        "cpu",
    ]
    assert main(["train", "lora", str(clips), "--out", str(tmp_path), *options]) == 0
    file = tmp_path / "lora.safetensors"
    assert capsys.readouterr().out.strip() == f"{file}: try it with --with lora:{file}"
    assert file.is_file()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["nowhere"], "'nowhere' does not exist"),
        (["{clips}", "--rank", "9999"], "rank is 9999"),
        (["{clips}", "--targets", "sefl"], "Did you mean 'self'"),
        (["{clips}", "--frames", "8"], "frames is 8"),
        (["{clips}", "--log", "tensorbored"], "Did you mean 'tensorboard'"),
        (["{clips}", "--base", "fp8"], "--base fp8 and fp8-attention need an NVIDIA GPU"),
        (["{clips}", "--base", "fp8-attention"], "--base fp8 and fp8-attention need an NVIDIA GPU"),
        (["{clips}", "--base", "int3"], "base is 'int3'"),
        (["{clips}", "--keep", "some"], "keep is 'some'"),
        (["{clips}", "--steps", "0"], "steps is 0"),
        (["{clips}", "--model", "wan9"], "wan9"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_a_wrong_request_exits_2_with_one_line(clips, tmp_path, capsys, options, told):
    words = [word.format(clips=clips) for word in options]
    assert main(["train", "lora", *words, "--out", str(tmp_path / "run"), "--device", "cpu"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert told in error[0]
