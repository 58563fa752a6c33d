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

SHAPES = pytest.mark.parametrize(
    ("rows", "into", "out"), [(1, 512, 128), (64, 1536, 256), (321, 1536, 1536), (3120, 1536, 1536), (3120, 8960, 1536)]
)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda").to(dtype)


def far(got, expected):
    return ((got.float() - expected).norm() / expected.norm()).item()


@SHAPES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bytes_with_their_scales_give_the_float_product_of_what_they_stand_for(dtype, rows, into, out):
    from swiftwan.ops.tall_product import fits, product

    linear = Fp8Linear.of(torch.nn.Linear(into, out, device="cuda", dtype=dtype))
    assert fits(linear)
    x = quantize_rows(draw(rows, into) * torch.rand(rows, 1, device="cuda").exp())
    got = product(x.values, linear.weight, linear.bias, (x.scale, linear.scale), dtype)
    expected = F.linear(x.values.float() * x.scale, linear.weight.float() * linear.scale.T, linear.bias.float())
    assert got.shape == (rows, out)
    assert got.dtype is dtype
    # Hopper adds bytes' products in fewer bits than float32: torch's own product is as far.
    plain = linear(x)
    assert far(got, expected) < max(4e-3, 1.1 * far(plain, expected))
    worst = (got.float() - expected).abs().amax()
    assert worst <= 1.5 * (plain.float() - expected).abs().amax() + 1e-3 * expected.abs().amax()


@SHAPES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_give_the_float_product(dtype, rows, into, out):
    from swiftwan.ops.tall_product import fits, product

    linear = torch.nn.Linear(into, out, device="cuda", dtype=dtype)
    assert fits(linear)
    x = draw(rows, into, dtype=dtype)
    got = product(x, linear.weight, linear.bias, None, dtype)
    expected = F.linear(x.float(), linear.weight.float(), linear.bias.float())
    assert got.shape == (rows, out)
    assert got.dtype is dtype
    assert far(got, expected) < 3e-3  # bf16's own rounding is 1.7e-3
    assert (got.float() - expected).abs().amax() < 1e-2 * expected.abs().amax()


def test_the_rows_of_the_last_tile_are_those_of_a_product_of_their_own():
    from swiftwan.ops.tall_product import product

    linear = torch.nn.Linear(512, 128, device="cuda", dtype=torch.bfloat16)
    x = draw(325, 512, dtype=torch.bfloat16)
    assert torch.equal(
        product(x, linear.weight, linear.bias, None, torch.bfloat16)[320:],
        product(x[320:], linear.weight, linear.bias, None, torch.bfloat16),
    )


def test_a_layer_takes_tall_tiles_where_they_fill_one_round_and_cublas_elsewhere(monkeypatch):
    from swiftwan.ops import tall_product

    linear = Fp8Linear.of(torch.nn.Linear(1536, 1536, device="cuda", dtype=torch.bfloat16))
    taken = []
    inner = tall_product.product
    monkeypatch.setattr(tall_product, "product", lambda x, *rest: taken.append(x.shape[0]) or inner(x, *rest))
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

    def layer(into, out, **options):
        return torch.nn.Linear(into, out, device="cuda", **options)

    assert fits(layer(256, 128, dtype=torch.bfloat16))
    assert not fits(layer(256, 128))  # float32
    assert not fits(layer(256, 192, dtype=torch.bfloat16))
    assert not fits(layer(64 * 13, 128, dtype=torch.bfloat16))
    assert not fits(layer(256, 128, dtype=torch.bfloat16, bias=False))
    assert not fits(Fp8Linear.of(layer(256, 128, dtype=torch.bfloat16)))  # two blocks make no turn
