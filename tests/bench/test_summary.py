import pytest

from swiftwan.bench.run import lines_of, run_matrix
from swiftwan.bench.summary import conclusion, frontier, number, rows_of, rung_of, why_missing

CONTRACT = {
    *("case", "rung", "plan", "seconds", "spread", "repeats", "peer", "peer_seconds", "ratio", "ceiling_fraction"),
    *("peak_bytes", "error", "device", "versions", "commit", "date", "status", "reason"),
}


@pytest.fixture
def rows(tmp_path, matrix, machine, measured):
    list(run_matrix(matrix, tmp_path, machine, measured))
    return rows_of(matrix, lines_of(matrix, tmp_path, machine)[0])


def test_a_row_has_the_fields_other_programs_read(rows) -> None:
    assert set(rows[0]) >= CONTRACT


def test_medians_spreads_and_ratios(rows) -> None:
    peer, plain, fast, broken = rows
    assert plain["seconds"] == pytest.approx(5.25)  # 5.0 and 5.5
    assert plain["spread"] == pytest.approx([5.0, 5.5])
    assert plain["repeats"] == 2
    assert fast["ratio"] == pytest.approx(4.0)
    assert fast["peer_seconds"] == peer["seconds"]
    assert peer["ratio"] == 1
    assert plain["first_output_seconds"] == 4.0
    # 8 TFLOP in 0.8 x 5.25 s, of 10 TFLOP/s
    assert plain["ceiling_fraction"] == pytest.approx(8 / (0.8 * 5.25) / 10)
    assert plain["first_clip_seconds"] == pytest.approx(4.0 + 2 * 0.4 * 5.25)
    assert (plain["rung"], fast["rung"], broken["rung"]) == ("exact", "near", None)


def test_what_did_not_run_is_a_row_with_its_reason(rows) -> None:
    broken = rows[3]
    assert (broken["status"], broken["seconds"], broken["ratio"]) == ("refused", None, None)
    assert "unknown technique" in broken["reason"]


def test_one_bad_round_marks_the_row_and_keeps_its_numbers(tmp_path, matrix, machine, measured) -> None:
    def once_bad(job, limit):
        bad = {"status": "oom", "reason": "too little"}
        return bad if (job.cell.plan.name, job.round) == ("fast", 1) else measured(job, limit)

    list(run_matrix(matrix, tmp_path, machine, once_bad))
    fast = rows_of(matrix, lines_of(matrix, tmp_path, machine)[0])[2]
    assert (fast["status"], fast["reason"], fast["seconds"]) == ("oom", "too little", 2.5)


def test_values_and_reasons(rows) -> None:
    assert number(rows[1], "psnr_db") == 35.0
    assert number(rows[0], "psnr_db") is None
    assert why_missing(rows[0], "psnr_db") == "it is the baseline"


def test_the_frontier_is_what_nothing_beats(rows) -> None:
    assert [row["plan_name"] for row in frontier(rows, "psnr_db")] == ["fast"]  # faster, and at 37.5 dB better too


def test_the_conclusion_names_a_plan_for_each_need(rows) -> None:
    said = conclusion(rows)
    # load 3 s, warm-up with one of three steps 1 s, two steps of 1.05 s
    assert said[0].startswith("Single prompts: fast (near, fp32): 6.1 s from nothing to a clip of 3 steps, 4.00x")
    assert said[1] == "Batches: fast (near, fp32): 2.62 s a clip once loaded, 4.00x the baseline's speed."
    assert "0.54 GB" in said[2]
    assert said[3].startswith("Without any change of the maths: plain (exact, fp32)")
    assert said[4] == "1 of 4 cells did not run: broken."
    assert conclusion(rows[3:]) == ["No cell finished, so there is nothing to conclude."]


def test_little_memory_is_the_fastest_of_those_that_need_about_the_least(rows) -> None:
    plain, fast = rows[1:3]
    assert "Little memory: fast" in conclusion([plain | {"peak_bytes": 2**29 - 2**20}, fast])[2]
    assert "Little memory: plain" in conclusion([plain | {"peak_bytes": 2**28}, fast])[2]


@pytest.mark.parametrize(
    ("specs", "kinds", "rung"),
    [
        ([], [], "exact"),
        (["fused", "quantize:fp8"], ["exact", "near"], "near"),
        (["step-cache", "quantize:fp8"], ["approximate", "near"], "approximate"),
        (["lora:style.safetensors", "compile"], ["retrained", "exact"], "retrained"),
        (["few-step:steps=4", "quantize:fp8"], ["retrained", "near"], "few-step"),
    ],
)
def test_a_rung_is_the_loosest_technique(specs, kinds, rung) -> None:
    assert rung_of(specs, kinds) == rung


def test_sixteen_bits_beside_a_float32_baseline_are_near_at_best(tmp_path, matrix, machine, measured) -> None:
    def half(job, limit):
        return measured(job, limit) | ({"dtype": "bfloat16"} if job.cell.plan.name == "plain" else {})

    list(run_matrix(matrix, tmp_path, machine, half))
    peer, plain, *_ = rows_of(matrix, lines_of(matrix, tmp_path, machine)[0])
    assert (peer["rung"], plain["rung"]) == ("exact", "near")
    assert "(near, bf16)" in conclusion([plain])[0]


def test_a_plan_that_comes_up_late_is_worth_it_from_a_number_of_steps_on(rows) -> None:
    plain, fast = rows[1:3]
    # plain 8.2 s for 3 steps and 2.1 s a step more; fast now 30 s, and 1.05 s: even after 21 steps more
    said = conclusion([plain, fast | {"first_clip_seconds": 30.0}])[0]
    assert said.startswith("Single prompts: plain")
    assert said.endswith(" From 24 steps on fast is sooner than all.")
    assert "From" not in conclusion([plain, fast])[0]
