from dataclasses import replace

import pytest

from swiftwan.bench.join import join
from swiftwan.bench.run import lines_of, run_matrix
from swiftwan.bench.summary import rows_of
from swiftwan.errors import RequestError


def test_parts_joined_have_every_cell_and_every_parts_baseline(tmp_path, matrix, machine, measured) -> None:
    list(run_matrix(matrix.only(["plain"]), tmp_path / "a", machine, measured))
    list(run_matrix(matrix.only(["fast", "broken"]), tmp_path / "b", machine, measured))
    (tmp_path / "b" / "videos" / "fast.mp4").write_bytes(b"video")

    for _ in range(2):  # joining again adds nothing
        found = join(tmp_path / "all", [tmp_path / "a", tmp_path / "b"])
        rows = rows_of(matrix, lines_of(matrix, tmp_path / "all", found)[0])

        assert found == machine
        assert [(row["plan_name"], row["repeats"]) for row in rows] == [
            ("peer", 4),
            ("plain", 2),
            ("fast", 2),
            ("broken", 0),
        ]
        assert rows[2]["ratio"] == pytest.approx(4)
        assert (tmp_path / "all" / "videos" / "fast.mp4").read_bytes() == b"video"


def test_what_no_part_ran_is_a_row_that_says_so(tmp_path, matrix, machine, measured) -> None:
    list(run_matrix(matrix.only(["plain"]), tmp_path / "a", machine, measured))
    found = join(tmp_path / "all", [tmp_path / "a"])
    rows = rows_of(matrix, lines_of(matrix, tmp_path / "all", found)[0])
    assert [row["status"] for row in rows] == ["ok", "ok", "not run", "not run"]
    assert rows[2]["reason"] == "the benchmark ended before its turn"
    assert rows[2]["ratio"] is None
    assert rows_of(matrix, []) == []


def test_parts_of_other_machines_or_none_are_refused(tmp_path, matrix, machine, measured) -> None:
    list(run_matrix(matrix, tmp_path / "a", machine, measured))
    list(run_matrix(matrix, tmp_path / "b", replace(machine, device="H200"), measured))
    with pytest.raises(RequestError, match="has device Abacus, .* H200; run them anew"):
        join(tmp_path / "all", [tmp_path / "a", tmp_path / "b"])
    with pytest.raises(RequestError, match="holds no rows"):
        join(tmp_path / "all", [tmp_path / "a", tmp_path / "none"])
    assert not (tmp_path / "all").exists()


def test_a_part_says_which_plans_there_are(matrix) -> None:
    assert [plan.name for plan in matrix.only(["fast"]).plans] == ["peer", "fast"]
    with pytest.raises(RequestError, match="no plan 'plane'. Did you mean 'plain'"):
        matrix.only(["plane"])


def test_a_baseline_runs_again_where_its_frames_are_gone_and_still_needed(tmp_path, matrix, machine, measured) -> None:
    part = matrix.only(["plain"])
    list(run_matrix(part, tmp_path, machine, measured))
    for path in (tmp_path / "reference").iterdir():
        path.unlink()
    assert not list(run_matrix(part, tmp_path, machine, measured)), "nobody needs them"

    found = list(run_matrix(matrix.only(["fast"]), tmp_path, machine, measured))

    assert [(one.row["plan_name"], one.row["round"]) for one in found] == [("peer", 0), ("fast", 0), ("fast", 1)]
