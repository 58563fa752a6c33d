import re
from html.parser import HTMLParser

import pytest

from swiftwan.bench.report import EMBEDDED_BYTES, Report, markdown, page, write
from swiftwan.bench.run import lines_of, run_matrix
from swiftwan.bench.summary import rows_of
from swiftwan.bench.tables import beside_baseline

EMPTY_ELEMENTS = {"meta", "img", "input", "br"}


@pytest.fixture
def report(tmp_path, matrix, machine, measured):
    list(run_matrix(matrix, tmp_path, machine, measured))
    rows = rows_of(matrix, lines_of(matrix, tmp_path, machine)[0])
    return Report(matrix.title, rows, tmp_path, ["swiftwan", "bench", "toy", "--out", "my folder"])


class Balanced(HTMLParser):
    """Every element that opens closes; gathers addresses and scripts on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.addresses, self.scripts = [], [], 0

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in EMPTY_ELEMENTS:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_beside_it(report) -> None:
    parser = Balanced()
    parser.feed(page(report))
    assert parser.open == []
    assert parser.scripts == 1, "the prompt's own is text"
    assert parser.addresses == []


def test_what_people_wrote_is_escaped(report) -> None:
    html, text = page(report), markdown(report)
    assert "<script>alert" not in html + text
    assert "Toy &lt;b&gt;matrix&lt;/b&gt;" in html
    assert r"x \| &lt;script&gt;" in text


def test_the_eight_figures_stand_beside_the_baseline_with_their_ratio(report) -> None:
    peer, _, fast, _ = report.rows
    table = {line[0]: line[1:] for line in beside_baseline(fast, peer)}
    assert table["Clip-wise latency"] == ["10.500 s", "2.625 s", "4.00x"]
    assert table["Max VRAM"] == ["1.07 GB", "0.54 GB", "2.00x"]
    assert table["CLIP score"] == ["-", "-", ""]
    assert len(table) == 9


def test_refused_plans_settings_and_command_are_in_both(report) -> None:
    for text in (page(report), markdown(report).replace("\\", "")):
        assert "refused: unknown technique" in text
        assert "torch 2.13.0" in text
        assert "Abacus" in text
        assert re.search(r"swiftwan bench toy --out ('|&#x27;)my folder", text)


def test_videos_go_into_the_page_unless_they_are_large(report, tmp_path) -> None:
    (tmp_path / "videos" / "small.mp4").write_bytes(b"video")
    (tmp_path / "videos" / "large.mp4").write_bytes(bytes(EMBEDDED_BYTES + 1))
    for row, name in zip(report.rows, ("small", "large", "gone"), strict=False):
        row["video"] = f"videos/{name}.mp4"

    html = page(report)

    assert "src='data:video/mp4;base64,dmlkZW8='" in html
    assert "src='videos/large.mp4'" in html
    assert "videos/gone.mp4 is no longer there" in html


def test_it_is_written_as_two_files(report) -> None:
    text, html = write(report)
    assert text.read_text().startswith("# Toy")
    assert html.read_text().startswith("<!doctype html>")


def test_a_report_of_failures_alone_is_a_report(report) -> None:
    alone = Report("t", report.rows[3:], report.folder, [])
    assert "nothing to conclude" in page(alone)
    assert "nothing to conclude" in markdown(alone)
