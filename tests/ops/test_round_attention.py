"""The kernels that round for 8-bit attention, and choose blocks, against the plain ones; as in test_fused.py."""

import os

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels are written in Triton: pip install triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not torch.cuda.is_available() and not INTERPRETED:
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from swiftwan.ops.attention_fp8 import round_attention as plain  # noqa: E402
from swiftwan.ops.round_attention import round_and_pool, round_attention  # noqa: E402
from swiftwan.ops.sparse import block_means  # noqa: E402
from swiftwan.ops.sparse import keep_best as plain_keep_best  # noqa: E402
from swiftwan.ops.sparse_triton import keep_best  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
# Triton's interpreter loses the carry where a mantissa rounds up to 2.
DIFFER = 0.05 if INTERPRETED else 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [128, 300])
def test_all_is_rounded_as_the_plain_way_does(dtype, tokens):
    merged = torch.randn(2, tokens, 3 * 256, device=DEVICE).to(dtype)
    q, k, v = (x.unflatten(-1, (2, 128)) for x in merged.chunk(3, dim=-1))
    k, v = k + 1, v + 1
    ours, theirs = round_attention(q.contiguous(), k, v), plain(q, k, v)
    for name in ("factor", "v_scale", "v_mean", "bound"):
        assert torch.allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-6), name
    for name in ("q", "k", "v"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert one.shape == other.shape
        assert one.dtype is other.dtype
        assert (one.float() != other.float()).float().mean() < DIFFER, name


@pytest.mark.parametrize("tokens", [256, 300])
def test_blocks_are_pooled_on_the_way(tokens):
    q, k, v = (torch.randn(1, tokens, 2, 128, device=DEVICE) for _ in range(3))
    _, q_means, k_means = round_and_pool(q, k, v)
    assert torch.allclose(q_means, block_means(q, 128), atol=1e-5)
    assert torch.allclose(k_means, block_means(k, 128), atol=1e-5)


@pytest.mark.parametrize(("count", "kept"), [(1, 1), (7, 3), (33, 9), (64, 64), (300, 75)])
def test_the_best_are_kept(count, kept):
    scores = torch.randn(1, 2, count, count, device=DEVICE) * 10
    assert torch.equal(keep_best(scores, kept), plain_keep_best(scores, kept))


def test_of_equal_scores_the_first_are_kept():
    blocks = keep_best(torch.zeros(1, 1, 6, 6, device=DEVICE), 3)
    assert blocks[0, 0].tolist() == [[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 3], [0, 1, 4], [0, 1, 5]]
