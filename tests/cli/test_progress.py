"""What a run tells while it runs."""

import pytest

from swiftwan.cli import progress
from swiftwan.pipelines.result import StepEvent


@pytest.mark.parametrize("behind", [0, 10])
def test_a_step_s_time_is_without_the_first_of_this_process(behind, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    display = progress.PlainDisplay()
    display.begin("load")

    def step(number, seconds):
        now[0] += seconds
        display.on_step(StepEvent("train", number, 20, now[0]))

    step(0, 5.0)  # data stands ready
    assert display.step_seconds() is None
    step(behind + 1, 30.0)  # compiles
    assert display.step_seconds() == 30.0
    step(behind + 2, 2.0)
    step(behind + 3, 4.0)
    assert display.step_seconds() == 3.0
