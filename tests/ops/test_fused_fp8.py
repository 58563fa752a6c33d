"""Each kernel that rounds in passing against the plain function and the plain rounding, as in test_fused.py."""

import os

import pytest
import torch

triton = pytest.importorskip("triton", reason="the fused kernels are written in Triton: pip install triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not torch.cuda.is_available() and not INTERPRETED:
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from swiftwan.ops.block import PLAIN  # noqa: E402
from swiftwan.ops.fp8 import Fp8Linear, quantize_rows  # noqa: E402
from swiftwan.ops.fused import FUSED  # noqa: E402
from swiftwan.ops.fused_fp8 import FUSED_FP8, linear_gelu  # noqa: E402
from swiftwan.ops.fused_fp8 import quantize_rows as fast_rows  # noqa: E402
from swiftwan.ops.modulate import whole  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
EPS = 1e-6
# Three bits of mantissa: 0.026 on normal numbers. Triton's interpreter loses the carry where a mantissa rounds up to 2.
DIFFER, WORST = (0.05, 0.12) if INTERPRETED else (0.01, 0.03)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def agree(rounded, expected):
    """Bytes and scales are those of the exact numbers, but for ties and for what a float32 sum's order moves."""
    plain = quantize_rows(expected)
    assert rounded.values.dtype is torch.float8_e4m3fn
    assert rounded.values.shape == expected.shape
    assert torch.allclose(rounded.scale, plain.scale, rtol=1e-5)
    assert (rounded.values.float() != plain.values.float()).float().mean() < DIFFER
    back = rounded.values.float() * rounded.scale
    assert ((back - expected).norm() / expected.norm()).item() < WORST


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spans", [[15], [4, 11]], ids=str)
@pytest.mark.parametrize("width", [80, 256, 1040])
def test_norms_end_rounded(dtype, spans, width):
    x, update = draw(2, 15, width, dtype=dtype), draw(2, 15, width, dtype=dtype)
    shift, scale, gate = draw(2, len(spans), 6, width).unbind(2)[:3]
    weight, bias = draw(width), draw(width)
    for name, args in (
        ("norm_modulate", (x, shift, scale, spans, EPS)),
        ("gated_add_norm", (x, update, gate, spans, weight, bias, EPS)),
        ("add_norm_modulate", (x, update, shift, scale, spans, EPS)),
    ):
        (total, got), (fused_total, _) = getattr(FUSED_FP8, name)(*args), getattr(FUSED, name)(*args)
        assert torch.equal(total, fused_total)
        # The exact norm of the sum as it is stored: what rounding to 8 bits should begin with.
        if name == "gated_add_norm":
            expected = torch.nn.functional.layer_norm(total.float(), (width,), weight, bias, EPS)
        else:
            _, expected = PLAIN.norm_modulate(total.float(), shift, scale, spans, EPS)
        agree(got, expected)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="takes minutes in the interpreter")
@pytest.mark.parametrize("length", [14040, 32760])
def test_norms_of_many_rows_end_rounded(length):
    x = draw(1, length, 1536, dtype=torch.bfloat16)
    shift, scale, _ = draw(1, 1, 3, 1536).unbind(2)
    got = FUSED_FP8.norm_modulate(x, shift, scale, [length], EPS)[1]
    agree(got, PLAIN.norm_modulate(x.float(), shift, scale, [length], EPS)[1])


@pytest.mark.parametrize("spans", [[15], [4, 11]], ids=str)
def test_a_sum_left_to_the_norm_is_the_sum_and_its_norm(spans):
    x, update = draw(2, 15, 80, dtype=torch.float16), draw(2, 15, 80, dtype=torch.float16)
    shift, scale, gate = draw(2, len(spans), 6, 80).unbind(2)[:3]
    summed, normed = FUSED_FP8.norm_modulate(FUSED_FP8.gated_add(x, update, gate, spans), shift, scale, spans, EPS)
    assert torch.equal(summed, whole(FUSED.gated_add(x, update, gate, spans)))
    _, expected = FUSED_FP8.norm_modulate(summed, shift, scale, spans, EPS)
    assert torch.equal(normed.values.float(), expected.values.float())
    assert torch.equal(normed.scale, expected.scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 200, 8960])
def test_rows(dtype, width):
    x = draw(2, 7, 2 * width, dtype=dtype)[..., :width]  # rows with gaps between them
    agree(fast_rows(x), x.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_is_rounded_behind_the_product(dtype):
    x = draw(2, 7, 208, dtype=dtype)
    agree(linear_gelu(lambda inputs: inputs, x), torch.nn.functional.gelu(x.float(), approximate="tanh"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="8-bit products need a GPU")
def test_a_layer_takes_rows_rounded_before():
    layer = Fp8Linear.of(torch.nn.Linear(256, 320, device="cuda", dtype=torch.bfloat16))
    x = draw(2, 40, 256, dtype=torch.bfloat16)
    assert torch.equal(layer(fast_rows(x)), layer(x))
