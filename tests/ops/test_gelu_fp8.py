"""A product with GELU behind it, rounded by a bound."""

from math import ceil

import pytest
import torch
import torch.nn.functional as F

from swiftwan.ops.fp8 import LARGEST, Fp8Linear, quantize_rows
from swiftwan.ops.gelu_fp8 import Bound, linear_gelu


def layer(into, out, dtype, device="cpu"):
    return Fp8Linear.of(torch.nn.Linear(into, out, device=device, dtype=dtype))


def exact(linear, x):
    """In float32, from the numbers that the bytes stand for."""
    weight = linear.weight.float() * linear.scale.T
    return F.gelu(F.linear(x.values.float() * x.scale, weight, linear.bias.float()), approximate="tanh")


def error(got, expected):
    return ((got.values.float() * got.scale - expected).norm() / expected.norm()).item()


class InFloat32(Fp8Linear):
    """The product where torch has none of bytes."""

    def forward(self, x):
        return F.linear(x.values.float() * x.scale, self.weight.float() * self.scale.T, self.bias.float())


@pytest.mark.parametrize("spread", [1.0, 30.0], ids=["alike", "one input far larger"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_exceeds_the_bound_and_little_is_lost(dtype, spread):
    linear = layer(64, 96, dtype)
    linear.__class__ = InFloat32
    x = torch.randn(2, 50, 64)
    x[..., 7] *= spread
    rounded = quantize_rows(x.to(dtype))
    got = linear_gelu(linear, rounded, Bound.of(linear))
    expected = exact(linear, rounded)
    assert got.values.shape == (2, 50, 96)
    assert got.scale.shape == (2, 50, 1)
    assert (expected.abs() <= LARGEST * got.scale).all()
    assert got.values.float().abs().max() < LARGEST
    assert error(got, expected) < 0.03  # 0.026 is E4M3's own


def test_a_bound_is_reached_by_the_input_that_has_a_weights_signs():
    linear = layer(64, 96, torch.float32)
    weight = linear.weight.float() * linear.scale.T
    slope, offset = Bound.of(linear)
    worst = weight.abs().sum(1).argmax()
    assert F.linear(weight[worst].sign(), weight)[worst].item() == pytest.approx(slope, rel=1e-5)
    assert offset == pytest.approx(linear.bias.abs().max().item() / LARGEST)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])  # torch multiplies bytes to no others
@pytest.mark.parametrize("tokens", [1, 300, 1560])
@pytest.mark.parametrize(("into", "out"), [(512, 256), (1536, 1280), (3072, 256)])
def test_the_kernel_rounds_as_the_plain_way_does(dtype, tokens, into, out):
    from swiftwan.ops.gelu_fp8_gluon import fits
    from swiftwan.ops.gelu_fp8_gluon import linear_gelu as in_one_kernel

    linear = layer(into, out, dtype, "cuda")
    assert fits(linear)
    bound = Bound.of(linear)
    found = []
    for _ in range(ceil(8192 / (2 * tokens * out))):  # of 256 numbers the shares below are a matter of luck
        x = quantize_rows(torch.randn(2, tokens, into, device="cuda").to(dtype))
        got, plain = in_one_kernel(linear, x, bound), linear_gelu(linear, x, bound)
        assert got.values.shape == plain.values.shape
        assert torch.allclose(got.scale, plain.scale)
        ours = got.values.float()
        found.append((ours * got.scale, exact(linear, x), ours, plain.values.float()))
    numbers, expected, ours, theirs = map(torch.cat, zip(*found, strict=True))
    assert ((numbers - expected).norm() / expected.norm()).item() < 0.03
    # The plain way rounds the product to the layer's dtype first; bytes then differ by a step.
    assert ((ours - theirs).norm() / theirs.norm()).item() < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)
def test_layers_that_do_not_divide_into_tiles_are_told():
    from swiftwan.ops.gelu_fp8_gluon import fits

    assert not fits(layer(64, 256, torch.bfloat16, "cuda"))
    assert not fits(layer(512, 128, torch.bfloat16, "cuda"))
    assert not fits(layer(512, 192, torch.bfloat16, "cuda"))
    assert not fits(layer(13 * 128, 256, torch.bfloat16, "cuda"))
