"""``swiftwan bench`` and ``swiftwan verify`` as a user calls them, cells in real processes."""

import json
import subprocess
import sys
import time

import pytest

from swiftwan.bench.rows import Journal, read_rows
from swiftwan.cli import main

MATRIX = """
models = ["pocket"]
device = "cpu"
rounds = 1
warm_up_steps = 1
metrics = ["psnr", "judge"]
[requests.a]
prompt = "a red circle moves left over a blue background"
seed = 7
width = 32
height = 32
num_frames = 5
num_inference_steps = 2
[plans.diffusers]
peer = "diffusers"
dtype = "fp32"
[plans.plain]
with = []
dtype = "fp32"
[plans.elsewhere]
with = ["attention:cudnn"]
"""


@pytest.mark.slow
def test_a_killed_benchmark_goes_on_and_compares_itself(tmp_path, capsys) -> None:
    matrix, out = tmp_path / "tiny.toml", tmp_path / "out"
    matrix.write_text(MATRIX)
    journal = Journal(out / "journal.jsonl")
    first = subprocess.Popen(
        [sys.executable, "-m", "swiftwan", "bench", str(matrix), "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while first.poll() is None and not journal.read():
            time.sleep(0.05)
    finally:
        first.kill()
        first.wait()
    kept = journal.read()
    assert [row["plan_name"] for row in kept][:1] == ["diffusers"]

    assert main(["bench", str(matrix), "--out", str(out)]) == 0

    assert journal.read()[: len(kept)] == kept, "what was done is not done again"
    rows = read_rows(out / "rows.jsonl")
    assert [row["status"] for row in rows] == ["ok", "ok", "refused"]
    assert rows[1]["error"] < 1e-3
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    for row in rows:
        if row["spread"]:
            row |= {"seconds": row["seconds"] / 9, "spread": [each / 9 for each in row["spread"]]}
    (tmp_path / "faster.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    assert main(["bench", str(matrix), "--out", str(out), "--compare", str(tmp_path / "faster.jsonl")]) == 1
    assert "worse: pocket / a / plain: seconds was" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)  # six processes: 53 s on two free cores, 77 s beside a load of 5
def test_the_pocket_matrix_beside_diffusers(tmp_path) -> None:
    assert main(["bench", "pocket", "--out", str(tmp_path), "--device", "cpu"]) == 0

    rows = {row["plan_name"]: row for row in read_rows(tmp_path / "rows.jsonl")}
    assert {name: (row["status"], row["repeats"]) for name, row in rows.items()} == dict.fromkeys(rows, ("ok", 2))
    for name in ("plain", "batched-cfg"):
        quality = rows[name]["quality"]
        assert rows[name]["error"] < 1e-3, "the same maths as diffusers' own pipeline"
        assert quality["psnr_db"] > 50
        assert quality["pocket_perceptual"] < 1e-3
        assert quality["pocket_clip_score"] == pytest.approx(
            rows["diffusers"]["quality"]["pocket_clip_score"], abs=1e-3
        )
    page = (tmp_path / "report.html").read_text()
    assert page.count("<video ") == 3
    assert page.count("data:video/mp4;base64,") == 3


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["bench", "poket", "--out", "x"], "Did you mean 'pocket'?"),
        (["bench", "pocket", "--out", "x", "--compare", "none.jsonl"], "there are no rows at 'none.jsonl'"),
        (["bench", "pocket", "--out", "x", "--compare", "/dev/null"], "there are no rows at '/dev/null'"),
        (["verify", "batched-cgf"], "Did you mean 'batched-cfg'?"),
        (["verify", "16gb", "step-cache"], "'16gb' is a plan's name, which stands alone"),
        (["verify", "batched-cfg", "--runs", "0"], "--runs is 0"),
        (["verify", "batched-cfg", "--frames", "1000001"], "1000001 frames take about"),
    ],
)
def test_what_is_wrong_is_told_in_one_line_before_anything_runs(arguments, told, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_rows_of_another_machine_are_refused_before_anything_runs(tmp_path, monkeypatch, machine, capsys) -> None:
    monkeypatch.setattr("swiftwan.bench.run.ask_machine", lambda device: machine)
    row = {"model": "pocket", "request_name": "a", "plan_name": "plain", "device": "Another", "status": "ok"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    out = tmp_path / "out"
    assert main(["bench", "pocket", "--out", str(out), "--compare", str(tmp_path / "rows.jsonl")]) == 2
    assert "the rows are of other devices: Another and Abacus" in capsys.readouterr().err
    assert not out.exists()


def test_verify_prints_its_checks_and_a_verdict(capsys) -> None:
    small = ["--width", "32", "--height", "32", "--frames", "5", "--steps", "2", "--runs", "2", "--device", "cpu"]
    assert main(["verify", "batched-cfg", *small]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "plan       batched-cfg (exact)"
    assert lines[-1] == "verdict    passed"
    assert main(["verify", "batched-cfg", *small, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rung"] == "exact"
