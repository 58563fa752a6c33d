import pytest
import torch

from swiftwan.ops.attention import sdpa
from swiftwan.ops.attention_fp8 import kernel_order, plain_fp8, round_attention


def draw(batch, tokens, heads, width, **options):
    return tuple(torch.randn(batch, tokens, heads, width, **options) for _ in range(3))


def error(got, expected):
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


def test_each_token_has_one_place():
    order = kernel_order(48)
    assert torch.equal(order.sort().values, torch.arange(48))
    # A thread holds scores 2t, 2t + 1, 2t + 8, 2t + 9, and multiplies places 4t to 4t + 3.
    assert order[:8].tolist() == [0, 1, 8, 9, 2, 3, 10, 11]
    assert order[16:20].tolist() == [16, 17, 24, 25]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_rounded_comes_back_near(dtype):
    q, k, v = (x.to(dtype) for x in draw(2, 70, 3, 128))
    rounded = round_attention(q, k, v)
    assert rounded.v.shape == (2, 3, 128, 128)
    scores = torch.einsum("blhe,bmhe->bhlm", rounded.q.float(), rounded.k.float()) * rounded.factor[..., None]
    centred = k.float() - k.float().mean(1, keepdim=True)
    exact = torch.einsum("blhe,bmhe->bhlm", q.float(), centred) * 128**-0.5 * 1.442695
    assert error(scores, exact) < 0.04
    values = torch.empty(2, 3, 128, 128).index_copy_(-1, kernel_order(128), rounded.v.float())
    assert error(values[..., :70] * rounded.v_scale[..., None], v.permute(0, 2, 3, 1)) < 0.03
    assert not values[..., 70:].any()


@pytest.mark.parametrize("sharp", [1.0, 4.0])
def test_it_is_near_attention(sharp):
    q, k, v = draw(1, 200, 2, 128)
    assert error(plain_fp8(sharp * q, k, v), sdpa(sharp * q, k, v)) < 0.08


def test_a_mean_that_all_keys_share_does_no_harm():
    q, k, v = draw(1, 100, 2, 64)
    shift = 20 * torch.randn(2, 64)
    q = q - (q * shift).sum(-1, keepdim=True) * shift / (shift * shift).sum(-1, keepdim=True)  # unseen by exact scores
    assert torch.allclose(sdpa(q, k + shift, v), sdpa(q, k, v), atol=1e-4)
    assert error(plain_fp8(q, k + shift, v), sdpa(q, k, v)) < 0.15


def test_zeros_are_no_trouble():
    zeros = torch.zeros(1, 20, 1, 128)
    assert torch.equal(plain_fp8(zeros, zeros, zeros), zeros)
