import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swiftwan.errors import OutputError
from swiftwan.serve.jobs.folder import DiskFullError, Folder


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(tmp_path / "a" / "b")
    made.make()
    return made


def test_nobody_else_may_look_inside(folder: Folder) -> None:
    assert folder.root.stat().st_mode & 0o077 == 0


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be made"):
        Folder(tmp_path / "file" / "data").make()


def test_an_upload_gets_a_name_of_ours(folder: Folder) -> None:
    one, two = folder.take_in([b"ab", b"c"], ".png"), folder.take_in([b"abc"], ".png")
    assert one != two
    assert folder.path(one).read_bytes() == b"abc"
    assert folder.path(one).parent == folder.root / "inputs"


@given(
    st.text(max_size=80) | st.sampled_from(["../x", "inputs/../../x", "/etc/passwd", "inputs/a\0.png", "inputs/a/b"])
)
def test_no_name_of_another_leads_anywhere(name: str) -> None:
    with pytest.raises(AssertionError):
        Folder(Path("/data")).path(name)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_nothing(folder: Folder, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskFullError, match="full") as told:
        folder.take_in([b"abc"], ".png")
    assert str(folder.root) not in str(told.value)
    assert list((folder.root / "inputs").iterdir()) == []


def test_room_is_asked_for_with_a_reserve(folder: Folder) -> None:
    folder.check_room(1)
    with pytest.raises(DiskFullError, match="MiB free"):
        folder.check_room(2**60)


def test_the_sweep_keeps_what_is_needed(folder: Folder) -> None:
    kept, lost = folder.take_in([b"a"], ".png"), folder.take_in([b"b"], ".png")
    (folder.root / "results" / ".video.mp4.7.tmp").write_bytes(b"half")
    folder.sweep({kept})
    assert folder.path(kept).exists()
    assert not folder.path(lost).exists()
    assert list((folder.root / "results").iterdir()) == []
