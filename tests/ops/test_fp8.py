import pytest
import torch
from torch import nn

from swiftwan.ops.fp8 import Fp8Linear, Rounded, quantize_rows

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_a_row_comes_back_within_half_a_step(dtype, size):
    x = (torch.randn(33, 200) * size).to(dtype)
    rounded, scale = quantize_rows(x)
    assert rounded.dtype is torch.float8_e4m3fn
    assert scale.shape == (33, 1)
    error = (rounded.float() * scale - x.float()).abs()
    # Three bits of mantissa: half a step is 1/16 of a value, or of the smallest normal one, 2**-6.
    assert (error <= x.float().abs() / 16 + scale * 2**-10 + 1e-9).all()


def test_a_row_of_zeros_stays_zero():
    rounded, scale = quantize_rows(torch.zeros(2, 16))
    assert not rounded.float().any()
    assert scale.isfinite().all()


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (77, 1536), (1000, 8960)])
def test_the_fast_rows_equal_the_plain_ones(dtype, tokens, width):
    from swiftwan.ops.fused_fp8 import quantize_rows as fast

    x = torch.randn(tokens, width, device="cuda").to(dtype)
    (ours, our_scale), (plain, scale) = fast(x), quantize_rows(x)
    assert torch.allclose(our_scale, scale, rtol=1e-6)
    assert (ours.float() != plain.float()).float().mean() < 1e-3  # ties, after a scale that differs in its last bit


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_near_its_float_twin(bias):
    linear = nn.Linear(1536, 640, bias=bias, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, 300, 1536, device="cuda", dtype=torch.bfloat16)
    exact = nn.functional.linear(x.float(), linear.weight.float(), linear.bias.float() if bias else None)
    out = Fp8Linear.of(linear)(x)
    assert out.shape == (2, 300, 640)
    assert ((out.float() - exact).norm() / exact.norm()).item() < 0.05


def test_merged_layers_share_their_weights_and_keep_their_numbers():
    layers = [Fp8Linear.of(nn.Linear(32, out)) for out in (16, 48)]
    before = [(layer.weight.float(), layer.scale.clone(), layer.bias.data.clone()) for layer in layers]
    one = Fp8Linear.merged(layers)
    assert (one.in_features, one.out_features) == (32, 64)
    assert torch.equal(one.weight.float(), torch.cat([weight for weight, _, _ in before]))
    assert torch.equal(one.scale, torch.cat([scale for _, scale, _ in before], dim=1))
    assert torch.equal(one.bias, torch.cat([bias for _, _, bias in before]))
    layers[1].weight.zero_()
    layers[1].bias.data.fill_(3)
    assert not one.weight[16:].float().any()
    assert (one.bias[16:] == 3).all()
    assert torch.equal(layers[0].weight.float(), before[0][0])


@pytest.mark.gpu
@on_gpu
def test_a_merged_layer_computes_what_its_parts_do():
    layers = [Fp8Linear.of(nn.Linear(256, out, device="cuda", dtype=torch.bfloat16)) for out in (64, 320)]
    x = torch.randn(2, 30, 256, device="cuda", dtype=torch.bfloat16)
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    got = Fp8Linear.merged(layers)(x)
    assert ((got.float() - expected.float()).norm() / expected.float().norm()).item() < 1e-2


def test_bytes_with_one_scale_for_all_heads_flatten_as_a_tensor_does():
    x = torch.randn(2, 5, 3, 16)
    flat = quantize_rows(x.flatten(2))
    heads = Rounded(flat.values.unflatten(-1, (3, 16)), flat.scale[..., None]).flatten(2)
    assert torch.equal(heads.values.float(), flat.values.float())
    assert torch.equal(heads.scale, flat.scale)
