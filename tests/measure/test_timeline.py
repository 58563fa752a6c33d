from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from swiftwan.measure.timeline import timeline


@dataclass(frozen=True)
class Run:
    frames: Tensor
    seconds: dict[str, float]
    step_seconds: tuple[float, ...]


RUN = Run(
    frames=torch.zeros(24, 2, 2, 3, dtype=torch.uint8),
    seconds={"text": 1.0, "denoise": 10.0, "decode": 1.0, "total": 12.0},
    step_seconds=(4.0, 2.0, 2.0, 2.0),
)


def test_the_definitions_of_the_reports() -> None:
    load = SimpleNamespace(forwards=8, tflop_per_forward=2.5)

    found = timeline(RUN, load)

    assert found.clip_latency_seconds == 12.0
    assert found.frame_latency_seconds == 0.5
    assert found.throughput_frames_per_second == 2.0
    assert found.phase_seconds == {"text": 1.0, "denoise": 10.0, "decode": 1.0}
    assert found.step_median_seconds == 2.0
    assert found.denoise_tflop_per_second == pytest.approx(8 * 2.5 / 10)


def test_without_a_count_of_operations_there_is_no_rate() -> None:
    assert timeline(RUN).denoise_tflop_per_second is None
