import pytest

from swiftwan.bench.rows import Journal, content_key, read_rows, write_rows
from swiftwan.errors import OutputError, RequestError


def test_half_a_line_is_dropped_and_written_over(tmp_path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append({"n": 1})
    with journal.path.open("ab") as file:
        file.write(b'{"n": 2, "half')

    assert journal.read() == [{"n": 1}]
    journal.append({"n": 3})
    assert journal.read() == [{"n": 1}, {"n": 3}]


def test_no_file_has_no_rows(tmp_path) -> None:
    assert Journal(tmp_path / "none.jsonl").read() == []
    with pytest.raises(RequestError, match="there are no rows"):
        read_rows(tmp_path / "none.jsonl")


def test_a_damaged_line_in_the_middle_is_an_error_with_its_number(tmp_path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"n": 1}\nnot json\n{"n": 3}\n')
    with pytest.raises(OutputError, match="line 2 is not a benchmark row"):
        Journal(path).read()


def test_where_nothing_can_be_written_the_error_says_so(tmp_path) -> None:
    with pytest.raises(OutputError, match="the rows before it are kept"):
        Journal(tmp_path).append({"n": 1})
    with pytest.raises(OutputError, match="cannot be written"):
        write_rows(tmp_path / "no" / "rows.jsonl", [])


def test_rows_survive_a_file(tmp_path) -> None:
    rows = [{"prompt": "ein Kreis \u2028 läuft", "n": None}]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows


def test_a_key_follows_the_content_not_the_order() -> None:
    assert content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})
