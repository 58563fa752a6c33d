"""Kernels with a backward pass, against plain float32."""

import pytest
import torch
from torch import nn

from swiftwan.ops.attention import kernel, sdpa
from swiftwan.ops.fp8 import quantize_rows

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def relative(got, expected):
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


@gpu
@needs_cuda
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("length", [512, 1000])
def test_flash4_has_the_gradients_of_the_reference(length, compiled):
    if missing := kernel("flash4").missing_on(torch.cuda.get_device_capability()):
        pytest.skip(missing)
    from swiftwan.ops.flash4_training import flash4

    attend = torch.compile(flash4) if compiled else flash4
    q, k, v, grad = torch.randn(4, 2, length, 3, 128, device="cuda", dtype=torch.bfloat16)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    wide = [x.detach().float().requires_grad_() for x in inputs]
    out, expected = attend(*inputs), sdpa(*wide)
    pairs = zip(
        (out, *torch.autograd.grad(out, inputs, grad)),
        (expected, *torch.autograd.grad(expected, wide, grad.float())),
        strict=True,
    )
    for got, wanted in pairs:
        assert relative(got, wanted) < 0.006


@gpu
@needs_cuda
@pytest.mark.parametrize("compiled", [False, True])
def test_the_frozen_8_bit_layer_s_output_and_input_gradient(compiled):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("8-bit float products need compute capability 8.9")
    from swiftwan.ops.fp8_training import Fp8FrozenLinear

    plain = nn.Linear(1536, 8960, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    layer = Fp8FrozenLinear(plain)
    run = torch.compile(layer) if compiled else layer
    x = torch.randn(2, 300, 1536, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(2, 300, 8960, device="cuda", dtype=torch.bfloat16)
    out, expected = run(x), plain(x)
    assert relative(out, expected) < 0.05
    assert relative(*(torch.autograd.grad(y, x, grad)[0] for y in (out, expected))) < 0.05


def test_both_copies_of_an_8_bit_weight_are_the_weight():
    from swiftwan.ops.fp8_training import Fp8FrozenLinear

    plain = nn.Linear(64, 48, dtype=torch.bfloat16).requires_grad_(False)
    layer = Fp8FrozenLinear(plain)
    forth = layer.weight.float() * layer.scale.T
    back = (layer.transposed.float() * layer.transposed_scale.T).T
    for copy in (forth, back):
        assert relative(copy, plain.weight) < 0.04
    assert torch.equal(layer.weight, quantize_rows(plain.weight)[0])


def test_flash4_s_shapes_are_known_without_a_gpu():
    from torch._subclasses.fake_tensor import FakeTensorMode

    from swiftwan.ops.flash4_training import flash4_backward, flash4_forward

    with FakeTensorMode():
        q = torch.empty(2, 40, 3, 128, dtype=torch.bfloat16)
        out, lse = flash4_forward(q, q, q)
        assert (out.shape, lse.shape, lse.dtype) == (q.shape, (2, 3, 40), torch.float32)
        assert [grad.shape for grad in flash4_backward(q, q, q, q, out, lse)] == [q.shape] * 3
