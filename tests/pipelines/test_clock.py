import time

import torch

from swiftwan.pipelines.clock import Clock


def test_units_are_told_by_phase_and_sum_to_the_total():
    clock = Clock(torch.device("cpu"))
    for phase in ("text", "denoise", "denoise", "decode"):
        time.sleep(0.001)
        clock.mark(phase)
    seconds = clock.seconds()
    assert list(seconds) == ["text", "denoise", "decode", "total"]
    assert len(clock.units("denoise")) == 2
    assert sum(clock.units("denoise")) == seconds["denoise"]
    assert abs(sum(seconds[phase] for phase in ("text", "denoise", "decode")) - seconds["total"]) < 1e-9
    assert all(unit > 0 for unit in clock.units("denoise"))
