"""Hopper's kernel for heads that attend to text, against the plain function; as in test_text_attention.py."""

from functools import partial

import pytest
import torch

from swiftwan.ops.attention import norm_attend as plain
from swiftwan.ops.fp8 import LARGEST

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
]
DTYPES = pytest.mark.parametrize(("dtype", "worst"), [(torch.float16, 2e-3), (torch.bfloat16, 8e-3)])
SIZES = pytest.mark.parametrize(
    ("batch", "videos", "tokens", "heads", "width", "keys", "biased"),
    [
        (1, 1, 70, 3, 128, 20, True),
        (2, 1, 130, 2, 128, 33, True),
        (2, 2, 64, 1, 128, 5, False),
        (2, 2, 1560, 12, 128, 131, True),
        (2, 1, 1560, 12, 128, 131, True),
        (1, 1, 5000, 12, 128, 67, True),
        (2, 2, 700, 40, 128, 144, True),
        (1, 1, 65, 2, 64, 64, True),  # for the other kernel
    ],
)


def draw(*shape, dtype):
    return torch.randn(*shape, device="cuda").to(dtype)


def inputs(dtype, batch, videos, tokens, heads, width, keys, biased):
    q, weight = draw(videos, tokens, heads * width, dtype=dtype), draw(heads * width, dtype=dtype)
    key, value = draw(batch, keys, heads, width, dtype=dtype), draw(batch, keys, heads, width, dtype=dtype)
    return q, weight, key, value, draw(1, 1, 1, keys, dtype=dtype) if biased else None


def exact(found):
    return plain(*(None if x is None else x.float() for x in found), 1e-6)


def far(got, expected):
    return ((got.float() - expected).norm() / expected.norm()).item()


@DTYPES
@SIZES
def test_it_is_the_plain_function(dtype, worst, batch, videos, tokens, heads, width, keys, biased):
    from swiftwan.ops.text_attention import norm_attend
    from swiftwan.ops.text_attention_gluon import attend_heads

    found = inputs(dtype, batch, videos, tokens, heads, width, keys, biased)
    got = partial(norm_attend, heads=attend_heads)(*found, 1e-6)
    expected = exact(found)
    assert got.dtype is dtype
    assert far(got, expected) < worst
    assert (got.float() - expected).abs().amax() < 20 * worst * expected.abs().amax()


@DTYPES
@SIZES
def test_it_is_the_plain_function_rounded(dtype, worst, batch, videos, tokens, heads, width, keys, biased):
    from swiftwan.ops.text_attention import norm_attend_round
    from swiftwan.ops.text_attention_gluon import attend_heads

    found = inputs(dtype, batch, videos, tokens, heads, width, keys, biased)
    got, expected = norm_attend_round(*found, 1e-6, heads=attend_heads), exact(found)
    assert got.values.shape == expected.shape
    assert torch.allclose(got.scale, torch.full_like(got.scale, found[3].abs().max().item() / LARGEST))
    assert far(got.values.float() * got.scale, expected) < 0.03  # 0.026 is E4M3's own


@pytest.mark.parametrize(("heads", "programs"), [(12, 11), (24, 5), (40, 3), (80, 3), (1, 132), (132, 1)])
def test_programs_of_all_heads_fill_the_processors(heads, programs):
    from swiftwan.ops.text_attention_gluon import programs_of

    assert programs_of(heads, 132) == programs
