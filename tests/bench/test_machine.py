from swiftwan.bench.machine import code_digest


def test_the_digest_follows_what_a_cell_runs_and_nothing_else(tmp_path) -> None:
    for name in ("engine.py", "bench/cell.py", "bench/report.py", "cli/bench.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    before = code_digest(tmp_path)

    for name in ("bench/report.py", "cli/bench.py"):
        (tmp_path / name).write_text("2")
    assert code_digest(tmp_path) == before
    for name in ("engine.py", "bench/cell.py"):
        (tmp_path / name).write_text("2")
        assert code_digest(tmp_path) != before
        (tmp_path / name).write_text("1")
