"""Norm, RoPE and rounding for 8-bit attention in one against one after the other; as in test_fused.py."""

import os

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels are written in Triton: pip install triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not torch.cuda.is_available() and not INTERPRETED:
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from swiftwan.ops.attention_fp8 import round_attention  # noqa: E402
from swiftwan.ops.norm_rope_round import norm_rope_round, norm_rope_round_and_pool  # noqa: E402
from swiftwan.ops.rope import norm_rope  # noqa: E402
from swiftwan.ops.sparse import block_means  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
# Triton's interpreter loses the carry where a mantissa rounds up to 2.
DIFFER = 0.05 if INTERPRETED else 0.01
EPS = 1e-6


def inputs(batch, tokens, heads, dtype):
    """Slices of one product, as a block makes them; keys and values far from zero."""
    q, k, v = torch.randn(batch, tokens, 3 * heads * 128, device=DEVICE).to(dtype).chunk(3, dim=-1)
    weights = [(1 + 0.3 * torch.randn(heads * 128, device=DEVICE)).to(dtype) for _ in range(2)]
    angle = 3 * torch.randn(tokens, 1, 64, device=DEVICE)
    return q, k + 1, (v + 1).unflatten(-1, (heads, 128)), *weights, (angle.cos(), angle.sin()), EPS


def turned(q, k, v, q_weight, k_weight, rope, eps):
    """The plain way, in float32."""
    return norm_rope(q.float(), k.float(), q_weight.float(), k_weight.float(), rope, v.shape[2], eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "heads"), [(2, 128, 2), (1, 200, 3)])
def test_all_is_rounded_as_one_after_the_other(dtype, batch, tokens, heads):
    given = inputs(batch, tokens, heads, dtype)
    ours, theirs = norm_rope_round(*given), round_attention(*turned(*given), given[2])
    for name in ("factor", "v_scale", "v_mean", "bound"):
        assert torch.allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-6), name
    for name in ("q", "k", "v"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert one.shape == other.shape
        assert one.dtype is other.dtype
        assert (one.float() != other.float()).float().mean() < DIFFER, name


@pytest.mark.parametrize("tokens", [128, 200])
def test_blocks_are_pooled_on_the_way(tokens):
    given = inputs(2, tokens, 2, torch.float32)
    rounded, *means = norm_rope_round_and_pool(*given)
    for ours, x in zip(means, turned(*given), strict=True):
        assert torch.allclose(ours, block_means(x, 128), atol=1e-5)
    assert torch.equal(rounded.q, norm_rope_round(*given).q)
