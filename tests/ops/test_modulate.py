import pytest
import torch
import torch.nn.functional as F

from swiftwan.ops.modulate import gated_add, norm_modulate


def spread(vectors, spans):
    """(B, K, D) to one vector a token."""
    return torch.cat([vectors[:, k : k + 1].expand(-1, n, -1) for k, n in enumerate(spans)], dim=1)


@pytest.mark.parametrize("spans", [[9], [4, 5]], ids=str)
@pytest.mark.parametrize(("dtype", "worst"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_spans_equal_one_vector_a_token(spans, dtype, worst):
    x, update = torch.randn(2, 9, 16).to(dtype), torch.randn(2, 9, 16).to(dtype)
    shift, scale, gate = (torch.randn(2, len(spans), 16) for _ in range(3))
    normed = F.layer_norm(x.double(), (16,), eps=1e-6) * (1 + spread(scale, spans)) + spread(shift, spans)
    added = x.double() + update.double() * spread(gate, spans)
    assert (norm_modulate(x, shift, scale, spans, 1e-6)[1].double() - normed).abs().max() < worst
    assert (gated_add(x, update, gate, spans).double() - added).abs().max() < worst
