"""Products in tall tiles beside torch's own."""

import pytest
import torch
import torch.nn.functional as F

from swiftwan.ops.fp8 import Fp8Linear, quantize_rows, scaled_product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
]


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda").to(dtype)


def layer_of(into, out, dtype=torch.bfloat16, **options):
    return Fp8Linear.of(torch.nn.Linear(into, out, device="cuda", dtype=dtype, **options))


def far(got, expected):
    return ((got.float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("rows", "into", "out"), [(1, 512, 128), (64, 1536, 256), (321, 1536, 1536), (3120, 1536, 1536), (3120, 8960, 1536)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bytes_with_their_scales_give_the_float_product_of_what_they_stand_for(dtype, rows, into, out):
    from swiftwan.ops.tall_product import fits, product

    linear = layer_of(into, out, dtype)
    assert fits(linear)
    x = quantize_rows(draw(rows, into) * torch.rand(rows, 1, device="cuda").exp())
    got = product(linear, *x)
    expected = F.linear(x.values.float() * x.scale, linear.weight.float() * linear.scale.T, linear.bias.float())
    assert got.shape == (rows, out)
    assert got.dtype is dtype
    # Hopper adds bytes' products in fewer bits than float32: torch's own product is as far.
    plain = scaled_product(linear, *x)
    assert far(got, expected) < max(4e-3, 1.1 * far(plain, expected))
    worst = (got.float() - expected).abs().amax()
    assert worst <= 1.5 * (plain.float() - expected).abs().amax() + 1e-3 * expected.abs().amax()


def test_the_rows_of_the_last_tile_are_those_of_a_product_of_their_own():
    from swiftwan.ops.tall_product import product

    linear = layer_of(512, 128)
    x = quantize_rows(draw(325, 512))
    assert torch.equal(product(linear, *x)[320:], product(linear, x.values[320:], x.scale[320:]))


def test_a_layer_takes_tall_tiles_where_they_fill_one_round_and_cublas_elsewhere(monkeypatch):
    from swiftwan.ops import tall_product

    linear = layer_of(1536, 1536)
    taken = []
    inner = tall_product.product

    def counted(linear, values, scale):
        taken.append(values.shape[0])
        return inner(linear, values, scale)

    monkeypatch.setattr(tall_product, "product", counted)
    monkeypatch.setattr(tall_product, "_processors", lambda _: 132)
    for tokens in (100, 1560, 5000):
        x = quantize_rows(draw(2, tokens, 1536, dtype=torch.bfloat16))
        linear.product = scaled_product
        expected = linear(x).float()
        linear.product = tall_product.scaled_product
        assert far(linear(x), expected) < 4e-3
    assert taken == [3120]


def test_layers_that_do_not_divide_are_told():
    from swiftwan.ops.tall_product import fits

    assert fits(layer_of(512, 128))
    assert not fits(layer_of(512, 192))
    assert not fits(layer_of(128 * 13, 128))
    assert not fits(layer_of(256, 128))  # two blocks make no turn
    assert not fits(layer_of(512, 128, bias=False))
