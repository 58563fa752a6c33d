"""Text attention with its norm and rounding in one kernel against the plain function, as in test_fused_fp8.py."""

import os

import pytest
import torch

triton = pytest.importorskip("triton", reason="the fused kernels are written in Triton: pip install triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not torch.cuda.is_available() and not INTERPRETED:
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from swiftwan.ops.attention import norm_attend as plain  # noqa: E402
from swiftwan.ops.fp8 import LARGEST  # noqa: E402
from swiftwan.ops.text_attention import MOST_KEYS, norm_attend  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
WORST = 0.12 if INTERPRETED else 0.03  # 0.026 is E4M3's own; the interpreter loses carries


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "videos", "tokens", "heads", "width", "keys", "biased"),
    [(1, 1, 70, 3, 64, 20, True), (2, 1, 130, 2, 128, 33, True), (2, 2, 64, 1, 32, 5, False)],
)
def test_it_is_the_plain_function_rounded(dtype, batch, videos, tokens, heads, width, keys, biased):
    q, weight = draw(videos, tokens, heads * width, dtype=dtype), draw(heads * width, dtype=dtype)
    key, value = draw(batch, keys, heads, width, dtype=dtype), draw(batch, keys, heads, width, dtype=dtype)
    bias = draw(1, 1, 1, keys, dtype=dtype) if biased else None
    got = norm_attend(q, weight, key, value, bias, 1e-6)
    exact = (None if x is None else x.float() for x in (q, weight, key, value, bias))
    expected = plain(*exact, 1e-6)
    assert got.values.shape == expected.shape == (batch, tokens, heads * width)
    assert torch.allclose(got.scale, torch.full_like(got.scale, value.abs().max().item() / LARGEST))
    back = got.values.float() * got.scale
    assert ((back - expected).norm() / expected.norm()).item() < WORST


def test_more_keys_than_fit_take_the_plain_way():
    q, weight = draw(1, 8, 64), draw(64)
    key, value = draw(1, MOST_KEYS + 1, 1, 64), draw(1, MOST_KEYS + 1, 1, 64)
    got = norm_attend(q, weight, key, value, None, 1e-6)
    assert torch.equal(got, plain(q, weight, key, value, None, 1e-6))


def test_a_bias_of_each_prompt_takes_the_plain_way():
    q, weight, key, value = draw(1, 8, 64), draw(64), draw(2, 5, 1, 64), draw(2, 5, 1, 64)
    bias = draw(2, 1, 1, 5)
    assert torch.equal(norm_attend(q, weight, key, value, bias, 1e-6), plain(q, weight, key, value, bias, 1e-6))
