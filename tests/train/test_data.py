import json
import shutil
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from swiftwan.errors import RequestError, UnavailableError
from swiftwan.train.data import find


def anything(caption):
    """A model that reads every caption."""


def why(found):
    """Reasons by file name."""
    return {problem.what.rpartition("/")[2]: problem.why for problem in found.problems}


@pytest.fixture
def folder(clips, tmp_path):
    return shutil.copytree(clips, tmp_path / "data")


def test_a_folder_of_clips_with_captions_beside(folder):
    found = find(str(folder), anything)
    assert [clip.path.name for clip in found.clips] == [f"clip{i}.mp4" for i in range(5)]
    assert found.clips[0].caption == (folder / "clip0.txt").read_text()
    assert (found.clips[0].width, found.clips[0].height, found.clips[0].frames, found.clips[0].fps) == (64, 64, 9, 16)
    assert found.problems == []


def test_nothing_is_left_out_in_silence(folder):
    (folder / "clip0.txt").unlink()
    (folder / "clip1.txt").write_text("  ")
    (folder / "clip2.mp4").write_bytes((folder / "clip2.mp4").read_bytes()[:400])
    shutil.copy(folder / "clip3.mp4", folder / "again.mp4")
    shutil.copy(folder / "clip3.txt", folder / "again.txt")
    (folder / "notes.md").write_text("hello")
    (folder / "lost.txt").write_text("a caption")
    found = find(str(folder), anything)
    assert [clip.path.name for clip in found.clips] == ["again.mp4", "clip4.mp4"]
    told = why(found)
    assert told["clip0.mp4"] == "no caption; write it to 'clip0.txt' beside it"
    assert told["clip1.mp4"] == "its caption is empty"
    assert "damaged" in told["clip2.mp4"] or "no video" in told["clip2.mp4"] or "no frames" in told["clip2.mp4"]
    assert told["clip3.mp4"].startswith("the same clip and caption as")
    assert told["notes.md"] == "neither a video, an image nor a caption"
    assert told["lost.txt"] == "a caption with no clip beside it"
    assert len(found.lines()) == 1 + len(found.problems) == 7


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_table_names_files_and_captions(folder, name):
    rows = [("clip0.mp4", "one"), ("clip1.mp4", "two, with a comma"), ("gone.mp4", "three")]
    if name.endswith("csv"):
        text = "file_name,text\n" + "".join(f'{file},"{caption}"\n' for file, caption in rows)
    else:
        text = "".join(json.dumps({"video": file, "caption": caption}) + "\n" for file, caption in rows)
    (folder / name).write_text(text)
    for source in (folder, folder / name):
        found = find(str(source), anything)
        assert [(clip.path.name, clip.caption) for clip in found.clips] == rows[:2]
        assert why(found) == {"gone.mp4": "the file does not exist"}


def test_damaged_rows_are_told_by_line(folder):
    (folder / "list.jsonl").write_text('{"video": "clip0.mp4", "text": "x"}\n{oops\n[1]\n{"text": "no file"}\n')
    found = find(str(folder / "list.jsonl"), anything)
    assert len(found.clips) == 1
    assert [problem.what.rpartition(":")[2] for problem in found.problems] == ["2", "3", "4"]
    assert found.problems[0].why.startswith("not JSON")
    assert found.problems[2].why.startswith("no file")


def test_images_are_clips_of_one_frame(folder):
    Image.new("RGB", (80, 64), "red").save(folder / "still.png")
    (folder / "still.txt").write_text("a red picture")
    still = next(clip for clip in find(str(folder), anything).clips if clip.is_image)
    assert (still.width, still.height, still.frames, still.fps) == (80, 64, 1, None)


def test_a_caption_that_the_model_cannot_read_is_a_problem(folder):
    def check(caption):
        if caption == "too long":
            raise RequestError("the prompt is too long.")

    (folder / "clip0.txt").write_text("too long")
    assert why(find(str(folder), check)) == {"clip0.mp4": "the prompt is too long"}


def test_the_digest_is_of_contents_not_names(folder):
    before = find(str(folder), anything).sha256
    (folder / "clip0.mp4").rename(folder / "renamed.mp4")
    (folder / "clip0.txt").rename(folder / "renamed.txt")
    assert find(str(folder), anything).sha256 == before
    (folder / "clip1.txt").write_text("another caption")
    assert find(str(folder), anything).sha256 != before


@pytest.mark.parametrize(
    ("source", "told"),
    [("nowhere", "does not exist"), ("empty", "it holds no videos or images"), ("empty/a.zip", "no folder, .csv")],
)
def test_a_source_that_gives_nothing(tmp_path, monkeypatch, source, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    if source.endswith("zip"):
        (tmp_path / source).write_bytes(b"x")
    with pytest.raises(RequestError, match=told):
        find(source, anything)


def test_the_hub_needs_its_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UnavailableError, match=r"pip install 'swiftwan\[data\]'"):
        find("hf:someone/clips", anything, downloads=tmp_path)


class Table(list):
    """Rows as a data set of the hub has them; ``features`` are empty where nothing is known of a column."""

    def __init__(self, rows, **features):
        super().__init__(rows)
        self.column_names = list(rows[0])
        self.features = {name: features.get(name, {}) for name in self.column_names}

    def cast_column(self, name, feature):
        assert feature.decode is False
        return self


@pytest.fixture
def hub(monkeypatch):
    """A hub of these tables, by name."""
    tables = {}

    def load_dataset(name, split):
        if name not in tables:
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub")
        return tables[name]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return tables


class Video:
    def __init__(self, decode=True):
        self.decode = decode


@pytest.mark.parametrize("feature", [{}, Video()], ids=["bytes", "video"])
def test_a_data_set_of_the_hub(clips, tmp_path, hub, feature):
    data = (clips / "clip0.mp4").read_bytes()
    rows = [{"video": {"bytes": data, "path": None}, "text": text} for text in ("one", None, 7)]
    rows.append({"video": {"bytes": None, "path": str(clips / "clip1.mp4")}, "text": "two"})
    hub["me/clips"] = Table(rows, video=feature)
    found = find("hf:me/clips", anything, downloads=tmp_path)
    assert [(clip.caption, clip.frames) for clip in found.clips] == [("one", 9), ("two", 9)]
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [data]
    assert why(found)["clips:2"] == "its caption is 7, not text"
    assert len(found.problems) == 2


def test_a_data_set_that_cannot_be_used(tmp_path, hub):
    hub["me/other"] = Table([{"a": 1}])
    with pytest.raises(RequestError, match="has the columns a; it needs one of file_name"):
        find("hf:me/other", anything, downloads=tmp_path)
    with pytest.raises(RequestError, match="'hf:me/none' cannot be loaded: Couldn't reach"):
        find("hf:me/none", anything, downloads=tmp_path)


def test_a_row_without_a_caption_is_told_the_columns(folder):
    (folder / "two.csv").write_text("file_name,caption\nclip4.mp4,a circle\nclip3.mp4\n")
    found = find(str(folder / "two.csv"), anything)
    assert [clip.path.name for clip in found.clips] == ["clip4.mp4"]
    assert list(why(found).values()) == ["no caption; give it in one of caption, text, prompt"]
