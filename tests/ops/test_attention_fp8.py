import pytest
import torch

from swiftwan.ops.attention import sdpa
from swiftwan.ops.attention_fp8 import (
    channel_order,
    exp2_by_lines,
    kernel_order,
    plain_fp8,
    round_attention,
    slope_of,
)


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


def test_each_channel_has_one_row():
    order = channel_order(128)
    assert torch.equal(order.sort().values, torch.arange(128))
    # The first thread of four holds rows 0, 1, 8, 9, ... of the result.
    rows = [row for start in range(0, 64, 8) for row in (start, start + 1)]
    assert order[rows].tolist() == list(range(16))
    assert torch.equal(channel_order(64), torch.arange(64))  # no width of the kernel's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_rounded_comes_back_near(dtype):
    q, k, v = (x.to(dtype) for x in draw(2, 70, 3, 128))
    rounded = round_attention(q, k, v)
    assert rounded.v.shape == (2, 3, 128, 128)
    scores = torch.einsum("blhe,bmhe->bhlm", rounded.q.float(), rounded.k.float()) * rounded.factor[..., None]
    centred = k.float() - k.float().mean(1, keepdim=True)
    exact = torch.einsum("blhe,bmhe->bhlm", q.float(), centred) * 128**-0.5 * 1.442695
    assert error(scores, exact) < 0.02
    values = torch.empty(2, 3, 128, 128).index_copy_(-1, kernel_order(128), rounded.v.float())
    values = torch.empty(2, 3, 128, 128).index_copy_(2, channel_order(128), values)
    values_again = values[..., :70] * rounded.v_scale[..., None] + rounded.v_mean[..., None]
    assert error(values_again, v.permute(0, 2, 3, 1)) < 0.03
    assert not values[..., 70:].any()
    largest = v.float().abs().amax((1, 2, 3))
    assert (rounded.bound > 0.9999 * largest).all()  # a float's rounding below
    assert (rounded.bound < 3 * largest).all()


def test_an_exponential_by_lines_is_two_percent_above_to_four_below():
    x = torch.linspace(-20, 8, 28 * 1024 + 1)
    off = exp2_by_lines(x) / torch.exp2(x) - 1
    assert off.max().item() == pytest.approx(0.0201, abs=3e-4)
    assert off.min().item() == pytest.approx(-0.0391, abs=3e-4)
    assert abs(off.mean().item()) < 1e-4
    assert exp2_by_lines(torch.tensor([-1e4])).item() < 1e-37


def test_a_slope_is_a_whole_number_of_steps_and_never_none():
    factor = torch.tensor([0.0, 1e-9, 9.5e-5, 1e-2])
    steps = slope_of(factor) * 2**23
    assert steps.tolist() == [1, 1, 797, 83886]
    # Scores of 128 products of bytes: what lines leave their exponent by at most, where a row's scores span all of it.
    assert ((slope_of(factor) - factor).abs() * 128 * 127**2).max().item() < 0.25


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
    assert error(plain_fp8(q, k, v + shift), sdpa(q, k, v + shift)) < 0.01


def test_zeros_are_no_trouble():
    zeros = torch.zeros(1, 20, 1, 128)
    assert torch.equal(plain_fp8(zeros, zeros, zeros), zeros)


on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("batch", "tokens", "heads"), [(1, 128, 1), (2, 300, 3), (1, 1111, 2), (1, 4096, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_is_as_near_as_its_reference(batch, tokens, heads, dtype):
    from swiftwan.ops.attention_fp8_gluon import attend

    q, k, v = (x.to("cuda", dtype) for x in draw(batch, tokens, heads, 128))
    q, k = 2 * q, k + torch.randn(heads, 128, device="cuda", dtype=dtype)
    expected = sdpa(q.float(), k.float(), v.float())
    got, plain = attend(q, k, v), plain_fp8(q, k, v)
    assert got.dtype is dtype
    # Both round the same numbers; the kernel adds with fewer bits, and rounds weights below the largest so far.
    assert error(got, expected) < 1.3 * error(plain, expected) < 0.1
    assert error(got, plain) < 0.06


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("sharp", [1e-3, 0.1, 20.0])
def test_lines_follow_flat_and_steep_softmax(sharp):
    from swiftwan.ops.attention_fp8_gluon import attend

    q, k, v = (x.to("cuda", torch.bfloat16) for x in draw(1, 500, 2, 128))
    expected = sdpa(sharp * q.float(), k.float(), v.float())
    got, plain = attend(sharp * q, k, v), plain_fp8(sharp * q, k, v)
    assert error(got, expected) < 1.5 * error(plain, expected) + 5e-3


@pytest.mark.gpu
@on_gpu
def test_the_kernel_reads_values_out_of_a_merged_projection():
    from swiftwan.ops.attention_fp8_gluon import attend

    q, k, v = torch.randn(1, 200, 3, 2, 128, device="cuda", dtype=torch.bfloat16).unbind(2)
    assert torch.equal(attend(q.contiguous(), k.contiguous(), v), attend(*(x.contiguous() for x in (q, k, v))))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("tokens", [1024, 1000])
def test_the_sparse_kernel_sees_the_blocks_it_is_given(tokens):
    from swiftwan.ops.attention_fp8_gluon import attend_rounded, attend_sparse
    from swiftwan.ops.round_attention import round_attention as fast
    from swiftwan.ops.sparse import select_blocks, sparse_reference

    q, k, v = (x.to("cuda", torch.bfloat16) for x in draw(1, tokens, 2, 128))
    blocks = select_blocks(q, k, 0.3)
    expected = sparse_reference(q.float(), k.float(), v.float(), blocks, 128)
    assert error(attend_rounded(fast(q, k, v), q.dtype, blocks), expected) < 0.08
    assert error(attend_sparse(q, k, v, 0.3), expected) < 0.08
    assert error(attend_sparse(q, k, v, 1.0), sdpa(q.float(), k.float(), v.float())) < 0.08


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("batch", "tokens", "heads"), [(1, 128, 1), (2, 300, 3), (1, 4096, 6)])
def test_bytes_for_an_8_bit_layer_are_the_result(batch, tokens, heads):
    from swiftwan.ops.attention_fp8_gluon import attend, attend_for_bytes, attend_sparse, attend_sparse_for_bytes

    q, k, v = (x.to("cuda", torch.bfloat16) for x in draw(batch, tokens, heads, 128))
    v = v + torch.randn(heads, 128, device="cuda", dtype=torch.bfloat16)
    for expected, got in (
        (attend(q, k, v), attend_for_bytes(q, k, v)),
        (attend_sparse(q, k, v, 0.5), attend_sparse_for_bytes(q, k, v, 0.5)),
    ):
        assert got.scale.shape == (batch, tokens, 1, 1)
        assert (got.scale == got.scale[:, :1]).all()
        assert error(got.values.float() * got.scale, expected) < 0.03
