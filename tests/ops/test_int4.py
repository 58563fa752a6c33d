import pytest
import torch
from torch import nn

from swiftwan.ops.int4 import Int4Linear, pack, unpack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_comes_back_within_half_a_level(dtype):
    weight = torch.randn(96, 256).to(dtype)
    codes, scale, low = pack(weight)
    assert codes.shape == (96, 128)
    assert codes.dtype is torch.uint8
    error = (unpack(codes, scale, low, torch.float32) - weight.float()).unflatten(1, (-1, 64)).abs()
    assert (error <= 0.501 * scale).all()


def test_a_group_of_one_value_is_kept():
    weight = torch.full((2, 64), 0.25)
    assert torch.equal(unpack(*pack(weight), torch.float32), weight)


def test_a_layer_is_its_expanded_weight():
    linear = nn.Linear(128, 64)
    small, x = Int4Linear(linear), torch.randn(5, 128)
    expected = nn.functional.linear(x, unpack(small.codes, small.scale, small.low, torch.float32), linear.bias)
    assert torch.equal(small(x), expected)
    stored = sum(buffer.nbytes for buffer in small.buffers())
    assert stored == 64 * 128 // 2 + 64 * 2 * 8
