"""8-bit products that are added in place, beside float32."""

import pytest
import torch

from swiftwan.ops import cublaslt
from swiftwan.ops.fp8 import Fp8Linear, quantize_rows


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda").to(dtype)


@pytest.fixture
def anew():
    """The library is looked for once a process."""
    cublaslt._library.cache_clear()
    yield
    cublaslt._library.cache_clear()


def test_a_missing_library_is_told_and_not_called(anew, monkeypatch, caplog):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not cublaslt.can_add()
    assert "libcublasLt.so.0" in caplog.text


@pytest.mark.parametrize(("version", "taken"), [(120803, False), (120900, True), (130100, True)])
def test_an_older_library_is_told_and_not_called(anew, monkeypatch, caplog, version, taken):
    asked = []

    class Library:
        @staticmethod
        def cublasLtGetVersion():
            return version

    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr("ctypes.CDLL", lambda name: asked.append(name) or Library)
    assert cublaslt.can_add() is cublaslt.can_add() is taken
    assert asked == ["libcublasLt.so.12"]
    assert [str(version) in record.getMessage() for record in caplog.records] == ([] if taken else [True])


hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize(
    ("rows", "into", "out"), [(1, 512, 128), (77, 1536, 256), (3120, 8960, 1536), (5000, 3072, 3072)]
)
def test_what_is_there_and_the_float_product_of_what_bytes_stand_for(rows, into, out):
    linear = Fp8Linear.of(torch.nn.Linear(into, out, device="cuda", dtype=torch.bfloat16))
    x = quantize_rows(draw(rows, into) * torch.rand(rows, 1, device="cuda").exp())
    there = draw(rows, out, dtype=torch.bfloat16)
    product = (x.values.float() * x.scale) @ (linear.weight.float() * linear.scale.T).T + linear.bias.float()
    expected = there.float() + product
    separate = there + linear(x)
    cublaslt.add_product(there, *x, linear.weight, linear.scale, linear.bias)
    far = [((got.float() - expected).norm() / product.norm()).item() for got in (there, separate)]
    assert far[0] < 5e-3
    assert far[0] < 1.05 * far[1]


@pytest.mark.gpu
@hopper
def test_an_empty_tail_stays_as_it_was():
    linear = Fp8Linear.of(torch.nn.Linear(512, 128, device="cuda", dtype=torch.bfloat16))
    x = quantize_rows(draw(70, 512))
    room = draw(100, 128, dtype=torch.bfloat16)
    behind = room[70:].clone()
    cublaslt.add_product(room[:70], *x, linear.weight, linear.scale, linear.bias)
    assert torch.equal(room[70:], behind)


@pytest.mark.gpu
@hopper
def test_widths_that_it_has_no_kernel_for_are_refused():
    values, weight = (torch.zeros(16, 24, dtype=torch.float8_e4m3fn, device="cuda") for _ in range(2))
    out, bias = torch.zeros(16, 16, dtype=torch.bfloat16, device="cuda"), draw(16, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="cublasLtMatmulAlgoGetHeuristic returned|no kernel"):
        cublaslt.add_product(out, values, draw(16, 1), weight, draw(1, 16), bias)
