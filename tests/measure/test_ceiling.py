import torch

from swiftwan.measure import ceiling


def test_the_ceiling_counts_two_operations_a_multiply_add(monkeypatch) -> None:
    times = iter([0.5, 0.25, 1.0])
    monkeypatch.setattr(ceiling, "CPU_SIZE", 16)
    monkeypatch.setattr(ceiling, "_seconds", lambda work, device: next(times))

    found = ceiling.product_tflop_per_second(torch.device("cpu"), torch.float32, repeats=1)

    assert found == 2 * 16**3 / 0.25 / 1e12


def test_a_rate_is_measured_on_this_machine(monkeypatch) -> None:
    monkeypatch.setattr(ceiling, "CPU_SIZE", 64)
    assert ceiling.product_tflop_per_second(torch.device("cpu"), torch.float32) > 0
