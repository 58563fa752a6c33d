import torch

from swiftwan import ceilings
from swiftwan.ops.attention import KERNELS


def test_the_ceiling_counts_two_operations_a_multiply_add(monkeypatch) -> None:
    times = iter([0.5, 0.25, 1.0])
    monkeypatch.setattr(ceilings, "CPU_SIZE", 16)
    monkeypatch.setattr(ceilings, "_seconds", lambda work, device: next(times))

    found = ceilings.product_tflop_per_second(torch.device("cpu"), torch.float32, repeats=1)

    assert found == 2 * 16**3 / 0.25 / 1e12


def test_a_rate_is_measured_on_this_machine(monkeypatch) -> None:
    monkeypatch.setattr(ceilings, "CPU_SIZE", 64)
    assert ceilings.product_tflop_per_second(torch.device("cpu"), torch.float32) > 0


def test_every_attention_kernel_has_a_rate() -> None:
    assert {kernel.name for kernel in KERNELS} <= ceilings.H200.attention.keys()
