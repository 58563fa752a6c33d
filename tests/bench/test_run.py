import subprocess
import sys
from dataclasses import replace

import pytest

from swiftwan.bench.cell import Job
from swiftwan.bench.report import Report, markdown, page
from swiftwan.bench.rows import Journal
from swiftwan.bench.run import ask_machine, lines_of, run_in_process, run_matrix, turns
from swiftwan.bench.summary import rows_of
from swiftwan.errors import OutputError, RequestError


class Killed(BaseException):
    pass


def report(matrix, out, machine):
    rows = rows_of(matrix, lines_of(matrix, out, machine)[0])
    made = Report(matrix.title, rows, out, ["swiftwan", "bench", "toy"])
    return markdown(made), page(made)


def test_cells_take_turns_and_the_second_round_goes_back(matrix, machine) -> None:
    order = [(turn.round, turn.cell.plan.name) for turn in turns(matrix, machine)]
    forth = ["peer", "plain", "fast", "broken"]
    assert order == [(0, name) for name in forth] + [(1, name) for name in reversed(forth)]


@pytest.mark.parametrize("killed_at", [1, 3, 6])
def test_killed_and_started_again_it_comes_to_the_same_report(tmp_path, matrix, machine, measured, killed_at) -> None:
    list(run_matrix(matrix, tmp_path / "whole", machine, measured))
    ran = []

    def until_killed(job, timeout_seconds):
        if len(ran) == killed_at:
            raise Killed
        ran.append(job)
        return measured(job, timeout_seconds)

    with pytest.raises(Killed):
        list(run_matrix(matrix, tmp_path / "killed", machine, until_killed))
    with (tmp_path / "killed" / "journal.jsonl").open("ab") as file:
        file.write(b'{"key": "half a li')  # the power went while a row was written
    again = []
    list(run_matrix(matrix, tmp_path / "killed", machine, lambda job, limit: again.append(job) or measured(job, limit)))

    assert len(again) == 8 - killed_at
    assert report(matrix, tmp_path / "killed", machine) == report(matrix, tmp_path / "whole", machine)


def test_other_versions_and_other_settings_are_left_aside_not_mixed_in(tmp_path, matrix, machine, measured) -> None:
    list(run_matrix(matrix, tmp_path, machine, measured))
    newer = replace(machine, versions=machine.versions | {"torch": "2.14.0"})

    assert lines_of(matrix, tmp_path, newer) == ([], 8)
    assert len(list(run_matrix(matrix, tmp_path, newer, measured))) == 8
    mine, others = lines_of(matrix, tmp_path, newer)
    assert (len(mine), others) == (8, 8)
    assert not list(run_matrix(matrix, tmp_path, machine, measured)), "the old rows are still there"
    assert len(list(run_matrix(replace(matrix, runs=2), tmp_path, machine, measured))) == 8


def test_retry_runs_only_what_did_not_succeed(tmp_path, matrix, machine, measured) -> None:
    list(run_matrix(matrix, tmp_path, machine, measured))
    again = [progress.row["plan_name"] for progress in run_matrix(matrix, tmp_path, machine, measured, retry=True)]
    assert again == ["broken", "broken"]


def test_a_full_disk_ends_the_benchmark_and_keeps_its_rows(tmp_path, matrix, machine, measured) -> None:
    def full(job, timeout_seconds):
        if job.cell.plan.name == "fast":
            return {"status": "no space", "reason": "the disk of 'videos' is full."}
        return measured(job, timeout_seconds)

    with pytest.raises(OutputError, match="Finished rows are kept"):
        list(run_matrix(matrix, tmp_path, machine, full))
    assert [row["plan_name"] for row in Journal(tmp_path / "journal.jsonl").read()] == ["peer", "plain"]


def test_a_folder_that_cannot_be_is_told(tmp_path, matrix, machine, measured) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        list(run_matrix(matrix, tmp_path / "file", machine, measured))


def test_a_process_that_dies_or_hangs_is_a_row(tmp_path, matrix, machine, monkeypatch) -> None:
    from swiftwan.bench import run

    job = next(run_matrix(matrix, tmp_path, machine, lambda job, limit: {"status": "ok", "job": job.to_json()})).row
    job = run.Job.from_json(job["job"])
    died = tmp_path / "python-that-dies"
    died.write_text("#!/bin/sh\nkill -9 $$\n")
    died.chmod(0o755)
    monkeypatch.setattr(run.sys, "executable", str(died))
    assert "by signal 9" in run_in_process(job, 10)["reason"]
    died.write_text("#!/bin/sh\nexec sleep 60\n")
    assert "not done after 0.2 s" in run_in_process(job, 0.2)["reason"]
    assert run_in_process(job, 0.2)["status"] == "failed"
    assert not list((tmp_path / "logs").glob("*.job.json"))


def test_a_plan_with_a_point_or_a_slash_in_its_name_has_files_of_its_own(
    tmp_path, matrix, machine, monkeypatch
) -> None:
    from swiftwan.bench import run

    monkeypatch.setattr(run.sys, "executable", "/bin/true")
    plans = tuple(replace(plan, name=f"keep=0.5/{plan.name}") for plan in matrix.plans)
    dotted = replace(matrix, plans=plans, baseline=plans[0].name, rounds=1)
    rows = [progress.row for progress in run_matrix(dotted, tmp_path, machine, run_in_process)]
    assert ["with exit code 0" in row["reason"] for row in rows] == [True] * len(plans)
    assert len(list((tmp_path / "logs").glob("keep=0.5-*.txt"))) == len(plans)


def test_a_folder_that_cannot_be_written_is_told(tmp_path, matrix, machine) -> None:
    job = next(run_matrix(matrix, tmp_path, machine, lambda job, limit: {"status": "ok", "job": job.to_json()})).row
    row = run_in_process(replace(Job.from_json(job["job"]), folder=tmp_path / "gone"), 10)
    assert (row["status"], "No such file or directory" in row["reason"]) == ("no space", True)


def test_this_machine_is_asked_in_a_process_that_ends() -> None:
    machine = ask_machine("cpu")
    assert machine.versions["torch"]
    assert len(machine.code) == 12
    with pytest.raises(RequestError, match="device is 'cuda:99'|device is 'cud'"):
        ask_machine("cud")


def test_a_cell_ends_when_its_benchmark_is_gone(tmp_path) -> None:
    code = "from swiftwan.bench import cell; cell.attempt = lambda job: __import__('time').sleep(60)\n"
    code += "cell.Job.from_json = lambda values: None; cell.main([r'JOB', 'result'])"
    (tmp_path / "job.json").write_text("{}")
    code = code.replace("JOB", str(tmp_path / "job.json"))
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.close()  # as the system does when the other end dies
    assert process.wait(30) == 1
