"""Files appear whole or not at all, and are as readable as any other output."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from swiftwan.errors import OutputError
from swiftwan.weights.check import write_json
from swiftwan.weights.lora_write import write_lora
from swiftwan.weights.write import Slot, appearing, write_shards, write_tensors
from swiftwan.whole_file import beside, replacing, write_text

posix = pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")


@pytest.fixture(params=[0o022, 0o027, 0o077])
def mask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def a_lora(path: Path) -> None:
    factors = {f"blocks.0.attn1.to_q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    write_lora(path, {None: factors}, peft_config={"r": 2, "lora_alpha": 2}, metadata={})


WRITERS = {
    "text": lambda path: write_text(path, "words"),
    "json": lambda path: write_json(path, {"a": 1}),
    "tensors": lambda path: write_tensors(path, {"a": torch.ones(3)}),
    "lora": a_lora,
}


@posix
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_has_the_mode_that_open_gives(tmp_path: Path, mask: int, writer: str) -> None:
    path = tmp_path / "out"
    WRITERS[writer](path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    assert os.listdir(tmp_path) == ["out"]


@posix
def test_a_folder_of_weights_has_the_modes_that_mkdir_and_open_give(tmp_path: Path, mask: int) -> None:
    folder = tmp_path / "vae"
    with appearing(folder, need=12) as new:
        write_shards(new, "model", [Slot("a", (3,), "F32")], lambda slot: torch.ones(slot.shape))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask
    assert stat.S_IMODE((folder / "model.safetensors").stat().st_mode) == 0o666 & ~mask


def test_the_old_file_stands_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"before")
    with replacing(path) as half:
        half.write_bytes(b"after")
        assert half.parent == tmp_path
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("fault", [OSError(5, "Input/output error"), ValueError("wrong"), KeyboardInterrupt()])
def test_whatever_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, fault: BaseException) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"before")

    def write() -> None:
        with replacing(path) as half:
            half.write_bytes(b"half")
            raise fault

    with pytest.raises(type(fault)) as raised:
        write()
    assert raised.value is fault
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(("durable", "kinds"), [(True, ["file", "folder"]), (False, [])])
def test_durable_waits_for_the_bytes_then_for_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool, kinds: list[str]
) -> None:
    seen: list[str] = []

    def note(handle: int) -> None:
        folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        seen.append("folder" if folder else "file")
        assert (tmp_path / "out").exists() == folder

    monkeypatch.setattr(os, "fsync", note)
    with replacing(tmp_path / "out", durable=durable) as half:
        half.write_bytes(b"x")
    assert seen == (kinds if os.name == "posix" else kinds[:1])


def test_two_writers_of_one_name_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with replacing(path) as first, replacing(path) as second:
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert path.read_bytes() == b"first"


def test_a_name_beside_is_hidden_and_removed(tmp_path: Path) -> None:
    with beside(tmp_path / "out.mp4") as half:
        half.touch()
        assert half.name.startswith(".out.mp4.")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("writer", WRITERS)
def test_a_failed_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"before")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises((OutputError, OSError), match="No space left on device") as told:
        WRITERS[writer](path)
    if isinstance(told.value, OutputError):
        assert str(path) in str(told.value)
        assert "[Errno" not in str(told.value)
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["out"]


def test_tensors_come_back_with_their_metadata(tmp_path: Path) -> None:
    tensor = torch.randn(3, 4)
    write_tensors(tmp_path / "new" / "a.safetensors", {"a": tensor.T}, {"step": "4"})
    assert torch.equal(load_file(tmp_path / "new" / "a.safetensors")["a"], tensor.T)


def test_tensors_that_cannot_be_written_say_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"a\.safetensors cannot be written: .*; ask another\.$") as told:
        write_tensors(tmp_path / "file" / "a.safetensors", {"a": torch.ones(1)}, way_out="ask another")
    assert "[Errno" not in str(told.value)
