"""Sums that a block's last products make, beside products and sums one after the other."""

import os

import pytest
import torch

triton = pytest.importorskip("triton", reason="the fused kernels are written in Triton: pip install triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and (not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9):
    pytest.skip("needs a Hopper GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from swiftwan.ops import added_product, cublaslt  # noqa: E402
from swiftwan.ops.fp8 import Fp8Linear, Product, quantize_rows  # noqa: E402
from swiftwan.ops.fused_fp8 import FUSED_FP8  # noqa: E402
from swiftwan.ops.modulate import whole  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16
WIDTH, TOKENS, EPS = 256, 40, 1e-6
OPS = added_product.adding(FUSED_FP8)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def in_float32(linear, values, scale):
    return ((values.float() * scale) @ (linear.weight.float() * linear.scale.T).T + linear.bias.float()).to(DTYPE)


@pytest.fixture
def added(monkeypatch):
    """Where a product was added in place; for few tokens too, and without a GPU by torch."""
    calls = []
    inner = cublaslt.add_product

    def counted(out, values, scale, weight, weight_scale, bias):
        calls.append(out.shape)
        if not INTERPRETED:
            return inner(out, values, scale, weight, weight_scale, bias)
        out += ((values.float() * scale) @ (weight.float() * weight_scale.T).T + bias.float()).to(out)

    monkeypatch.setattr(cublaslt, "add_product", counted)
    monkeypatch.setattr(added_product, "LEAST_BYTES", 0)
    with torch.no_grad():
        yield calls


def product_of(batch=1):
    linear = Fp8Linear.of(torch.nn.Linear(WIDTH, WIDTH, device=DEVICE, dtype=DTYPE))
    if INTERPRETED:
        linear.product = in_float32
    return Product(linear, quantize_rows(draw(batch, TOKENS, WIDTH)))


def vectors(spans):
    return draw(1, spans, 6, WIDTH).unbind(2)[:3]


def far(got, expected):
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


def agree(got, expected):
    (x, rounded), (expected_x, expected_rounded) = got, expected
    assert far(x, expected_x) < 4e-3
    assert far(rounded.values.float() * rounded.scale, expected_rounded.values.float() * expected_rounded.scale) < 0.03


def test_each_sum_is_made_by_its_product(added):
    x, update, (shift, scale, gate) = draw(1, TOKENS, WIDTH, dtype=DTYPE), product_of(), vectors(1)
    weight, bias, apart = draw(WIDTH), draw(WIDTH), update.whole()
    gated, text = (gate, [TOKENS], weight, bias, EPS), (shift, scale, [TOKENS], EPS)
    agree(OPS.gated_add_norm(x.clone(), update, *gated), FUSED_FP8.gated_add_norm(x, apart, *gated))
    agree(OPS.add_norm_modulate(x.clone(), update, *text), FUSED_FP8.add_norm_modulate(x, apart, *text))
    last = OPS.gated_add(x.clone(), update, gate, [TOKENS]), FUSED_FP8.gated_add(x, apart, gate, [TOKENS])
    agree(*(OPS.norm_modulate(tokens, *text) for tokens in last))
    assert added == [(TOKENS, WIDTH)] * 3


def test_a_sum_that_no_norm_takes_is_made_too(added):
    x, update, gate = draw(1, TOKENS, WIDTH, dtype=DTYPE), product_of(), vectors(1)[2]
    expected = whole(FUSED_FP8.gated_add(x, update.whole(), gate, [TOKENS]))
    assert far(whole(OPS.gated_add(x.clone(), update, gate, [TOKENS])), expected) < 4e-3
    assert len(added) == 1


def test_tokens_that_someone_may_hold_are_not_written_to(added):
    x = draw(1, TOKENS, WIDTH, dtype=DTYPE)
    before, (shift, scale, gate) = x.clone(), vectors(1)
    own, _ = OPS.norm_modulate(x, shift, scale, [TOKENS], EPS)
    total, _ = OPS.gated_add_norm(own, product_of(), gate, [TOKENS], draw(WIDTH), draw(WIDTH), EPS)
    assert total.data_ptr() == own.data_ptr()
    assert torch.equal(x, before)


@pytest.mark.parametrize("case", ["two timesteps", "two prompts of one video", "few tokens"])
def test_where_a_product_cannot_add_the_sum_comes_after_it(added, monkeypatch, case):
    spans = [10, 30] if case == "two timesteps" else [TOKENS]
    update, gate = product_of(2 if "prompts" in case else 1), vectors(len(spans))[2]
    if case == "few tokens":
        monkeypatch.setattr(added_product, "LEAST_BYTES", 2 * TOKENS * WIDTH + 1)
    x = draw(1, TOKENS, WIDTH, dtype=DTYPE)
    given = (gate, spans, draw(WIDTH), draw(WIDTH), EPS)
    expected = FUSED_FP8.gated_add_norm(x, update.whole(), *given)
    got = OPS.gated_add_norm(x, update, *given)
    assert torch.equal(got[0], expected[0])
    assert not added
