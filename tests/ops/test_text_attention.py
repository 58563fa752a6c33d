"""Text attention with its norm, and with rounding, against the plain function; as in test_fused_fp8.py."""

import os

import pytest
import torch

triton = pytest.importorskip("triton", reason="the fused kernels are written in Triton: pip install triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not torch.cuda.is_available() and not INTERPRETED:
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from swiftwan.ops import text_attention  # noqa: E402
from swiftwan.ops.attention import norm_attend as plain  # noqa: E402
from swiftwan.ops.fp8 import LARGEST  # noqa: E402
from swiftwan.ops.text_attention import MOST_KEYS, norm_attend, norm_attend_round  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = [torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
WORST = 0.12 if INTERPRETED else 0.03  # 0.026 is E4M3's own; the interpreter loses carries


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


SIZES = [  # prompts, videos, tokens, heads, width, keys, biased
    (1, 1, 70, 3, 64, 20, True),
    (2, 1, 130, 2, 128, 33, True),
    (2, 2, 64, 1, 32, 5, False),
    (1, 1, 65, 2, 64, 64, True),
    (2, 1, 40, 3, 32, MOST_KEYS, True),
]


def inputs(dtype, batch, videos, tokens, heads, width, keys, biased):
    q, weight = draw(videos, tokens, heads * width, dtype=dtype), draw(heads * width, dtype=dtype)
    key, value = draw(batch, keys, heads, width, dtype=dtype), draw(batch, keys, heads, width, dtype=dtype)
    return q, weight, key, value, draw(1, 1, 1, keys, dtype=dtype) if biased else None


def exact(found):
    return plain(*(None if x is None else x.float() for x in found), 1e-6)


def far(got, expected):
    return ((got.float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_is_the_plain_function(dtype, size):
    found = inputs(dtype, *size)
    got = norm_attend(*found, 1e-6)
    assert got.dtype is dtype
    assert far(got, exact(found)) < {torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_is_the_plain_function_rounded(dtype, size):
    found = inputs(dtype, *size)
    got, expected = norm_attend_round(*found, 1e-6), exact(found)
    assert got.values.shape == expected.shape
    assert torch.allclose(got.scale, torch.full_like(got.scale, found[3].abs().max().item() / LARGEST))
    assert far(got.values.float() * got.scale, expected) < WORST


@pytest.mark.parametrize(("tokens", "at_once"), [(200, 1), (330, 2), (150, 2)])
def test_many_tokens_take_several_turns(monkeypatch, tokens, at_once):
    monkeypatch.setattr(text_attention, "AT_ONCE", at_once)
    found = inputs(torch.float16, 1, 1, tokens, 1, 32, 20, True)
    assert far(norm_attend(*found, 1e-6), exact(found)) < 2e-3


@pytest.mark.parametrize("function", [norm_attend, norm_attend_round])
def test_more_keys_than_fit_take_the_plain_way(function):
    found = inputs(torch.float16, 1, 1, 8, 1, 64, MOST_KEYS + 1, False)
    assert torch.equal(function(*found, 1e-6), plain(*found, 1e-6))


@pytest.mark.parametrize("function", [norm_attend, norm_attend_round])
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 64), (torch.float16, 8), (torch.float16, 48)])
def test_32_bits_and_odd_heads_take_the_plain_way(function, dtype, width):
    found = inputs(dtype, 1, 1, 8, 1, width, 9, True)
    assert torch.equal(function(*found, 1e-6), plain(*found, 1e-6))


@pytest.mark.parametrize("function", [norm_attend, norm_attend_round])
def test_a_bias_of_each_prompt_takes_the_plain_way(function):
    q, weight, key, value, bias = (
        draw(*shape, dtype=torch.float16) for shape in ((1, 8, 64), (64,), (2, 5, 1, 64), (2, 5, 1, 64), (2, 1, 1, 5))
    )
    assert torch.equal(function(q, weight, key, value, bias, 1e-6), plain(q, weight, key, value, bias, 1e-6))
