import pytest

from swiftwan.bench.compare import worse
from swiftwan.bench.run import lines_of, run_matrix
from swiftwan.bench.summary import rows_of
from swiftwan.errors import RequestError


@pytest.fixture
def rows(tmp_path, matrix, machine, measured):
    list(run_matrix(matrix, tmp_path, machine, measured))
    return rows_of(matrix, lines_of(matrix, tmp_path, machine)[0])


def changed(rows, **values):
    return [row | values if row["plan_name"] == "fast" else row for row in rows]


def test_the_same_rows_are_not_worse(rows) -> None:
    assert worse(rows, rows) == []


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"seconds": 3.0, "spread": [2.9, 3.1]}, "seconds was 2.625, is 3"),
        ({"peak_bytes": 2**30}, "peak_bytes"),
        ({"quality": {"psnr_db": 30.0}}, "psnr_db was 37.5, is 30"),
        ({"status": "failed", "reason": "broke"}, "status was ok, is failed (broke)"),
    ],
)
def test_what_got_worse_is_named(rows, values, told) -> None:
    (change,) = worse(rows, changed(rows, **values))
    assert str(change).startswith("pocket / a / fast: ")
    assert told in str(change)


@pytest.mark.parametrize(
    "values",
    [
        {"seconds": 2.74, "spread": [2.7, 2.8]},  # the runs overlap those before
        {"seconds": 1.0, "spread": [1.0, 1.0]},
        {"quality": {"psnr_db": 37.2}},
        {"quality": {"psnr_db": 45.0}},
        {"peak_bytes": int(2**29 * 1.01)},
    ],
)
def test_noise_and_gains_are_not_worse(rows, values) -> None:
    assert worse(rows, changed(rows, **values)) == []


def test_a_cell_that_is_gone_is_worse_and_one_that_never_ran_is_not(rows) -> None:
    assert [str(change) for change in worse(rows, rows[:2])] == ["pocket / a / fast: status was ok, is not there"]


def test_another_device_or_matrix_cannot_be_compared(rows) -> None:
    with pytest.raises(RequestError, match="other devices: Abacus and H200"):
        worse(rows, [row | {"device": "H200"} for row in rows])
    with pytest.raises(RequestError, match="no cell in common"):
        worse(rows, [row | {"model": "other"} for row in rows])


def test_rows_of_another_kind_are_refused_by_the_field_that_they_lack(rows) -> None:
    with pytest.raises(RequestError, match=r"has no 'request_name'; give the rows\.jsonl"):
        worse([{"case": "forward", "model": "pocket", "seconds": 1.0}], rows)
