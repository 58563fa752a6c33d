"""Each fused kernel against its plain function: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1)."""

import os

import pytest
import torch

triton = pytest.importorskip("triton", reason="the fused kernels are written in Triton: pip install triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not torch.cuda.is_available() and not INTERPRETED:
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from swiftwan.ops.block import PLAIN  # noqa: E402
from swiftwan.ops.fused import FUSED, linear_gelu  # noqa: E402
from swiftwan.ops.modulate import whole  # noqa: E402
from swiftwan.ops.rope import rope_tables  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# The interpreter keeps bf16 as 16-bit integers and multiplies those, so it cannot be asked about bf16.
DTYPES = [(torch.float32, 1e-6), (torch.float16, 2e-3)] + ([] if INTERPRETED else [(torch.bfloat16, 1e-2)])
SHAPES = [(3, 24, (2, 2, 3)), (4, 64, (1, 3, 5)), (2, 128, (3, 3, 2))]
EPS = 1e-6


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def compare(name, worst, *args):
    """The fused function on these arguments against the plain one on the same in float32."""
    got = getattr(FUSED, name)(*args)
    expected = getattr(PLAIN, name)(*(a.float() if isinstance(a, torch.Tensor) else a for a in args))
    if isinstance(expected, torch.Tensor):
        got, expected = (whole(got),), (expected,)
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == args[0].dtype
        error = ((one.float() - other).norm() / other.norm()).item()
        assert error < worst, f"{name}: relative error {error:.1e}, allowed {worst:.0e}"


@pytest.mark.parametrize(("dtype", "worst"), DTYPES)
@pytest.mark.parametrize("spans", [[15], [4, 11]], ids=str)
@pytest.mark.parametrize("width", [72, 256])
def test_norms_and_gates(dtype, worst, spans, width):
    x, update = draw(2, 15, width, dtype=dtype), draw(2, 15, width, dtype=dtype)
    # Slices of one tensor, as a block makes them.
    shift, scale, gate = draw(2, len(spans), 6, width).unbind(2)[:3]
    compare("norm_modulate", worst, x, shift, scale, spans, EPS)
    compare("gated_add", worst, x, update, gate, spans)
    compare("gated_add_norm", worst, x, update, gate, spans, draw(width), draw(width), EPS)
    compare("add_norm_modulate", worst, x, update, shift, scale, spans, EPS)


@pytest.mark.parametrize("spans", [[15], [4, 11]], ids=str)
def test_one_vector_and_one_stream_serve_a_whole_batch(spans):
    x, update = draw(1, 15, 72), draw(2, 15, 72)
    shift, scale, gate = draw(1, len(spans), 6, 72).unbind(2)[:3]
    compare("norm_modulate", 1e-6, update, shift, scale, spans, EPS)
    compare("gated_add", 1e-6, update, update, gate, spans)
    compare("add_norm_modulate", 1e-6, x, update, shift, scale, spans, EPS)


def test_the_norm_is_that_of_the_rounded_sum():
    x, update = draw(1, 15, 64, dtype=torch.float16), draw(1, 15, 64, dtype=torch.float16)
    shift, scale = draw(1, 1, 64), draw(1, 1, 64)
    summed, normed = FUSED.add_norm_modulate(x, update, shift, scale, [15], EPS)
    assert torch.equal(summed, x + update)
    _, again = FUSED.norm_modulate(summed, shift, scale, [15], EPS)
    assert torch.equal(normed, again)


@pytest.mark.parametrize("spans", [[15], [4, 11]], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_sum_left_to_the_norm_is_the_sum_and_its_norm(spans, batch):
    x, update = draw(2, 15, 64, dtype=torch.float16), draw(2, 15, 64, dtype=torch.float16)
    shift, scale, gate = draw(batch, len(spans), 6, 64).unbind(2)[:3]
    left = FUSED.gated_add(x, update, gate, spans)
    summed, normed = FUSED.norm_modulate(left, shift, scale, spans, EPS)
    assert torch.equal(summed, whole(FUSED.gated_add(x, update, gate, spans)))
    assert torch.equal(normed, FUSED.norm_modulate(summed, shift, scale, spans, EPS)[1])
    assert (summed.float() - PLAIN.gated_add(x, update, gate, spans).float()).abs().max() < 0.01


@pytest.mark.parametrize(("dtype", "worst"), DTYPES)
@pytest.mark.parametrize(("heads", "head_dim", "grid"), SHAPES)
def test_norm_rope(dtype, worst, heads, head_dim, grid):
    length, width = grid[0] * grid[1] * grid[2], heads * head_dim
    q, k = draw(2, length, width, dtype=dtype), draw(2, length, width, dtype=dtype)
    weights = [draw(width, dtype=dtype) for _ in range(2)]
    compare("norm_rope", worst, q, k, *weights, rope_tables(head_dim, *grid, device=DEVICE), heads, EPS)


def test_norm_rope_reads_slices_of_a_merged_projection():
    merged = draw(2, 18, 3 * 64)
    q, k, _ = merged.chunk(3, dim=-1)
    compare("norm_rope", 1e-6, q, k, draw(64), draw(64), rope_tables(32, 3, 3, 2, device=DEVICE), 2, EPS)


def test_a_gradient_is_refused_not_dropped():
    x = draw(1, 15, 64).requires_grad_()
    with pytest.raises(RuntimeError, match="no backward pass"):
        FUSED.gated_add(x, x, draw(1, 1, 64), [15])
    with torch.no_grad():
        FUSED.gated_add(x, x, draw(1, 1, 64), [15])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="GELU is in cuBLASLt's epilogue on CUDA only")
def test_linear_gelu():
    linear = torch.nn.Linear(64, 96, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, 40, 64, device="cuda", dtype=torch.bfloat16)
    expected = torch.nn.functional.gelu(linear.float()(x.float()), approximate="tanh")
    got = linear_gelu(linear.bfloat16(), x)
    assert got.shape == expected.shape
    assert ((got.float() - expected).norm() / expected.norm()).item() < 1e-2
