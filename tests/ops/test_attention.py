import math

import pytest
import torch

from swiftwan.ops.attention import sdpa


def by_definition(q, k, v, bias=0.0):
    scores = torch.einsum("blhe,bshe->bhls", q.double(), k.double()) / math.sqrt(q.shape[-1]) + bias
    return torch.einsum("bhls,bshe->blhe", scores.softmax(-1), v.double())


@pytest.mark.parametrize(("dtype", "worst"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 5), (33, 4)])
def test_matches_the_definition(dtype, worst, queries, keys):
    q, k, v = (torch.randn(2, n, 3, 16).to(dtype) for n in (queries, keys, keys))
    assert (sdpa(q, k, v).double() - by_definition(q, k, v)).abs().max() < worst


def test_a_key_kept_once_with_the_log_of_its_count_is_that_many_keys():
    q, k, v = (torch.randn(1, n, 2, 8) for n in (6, 5, 5))
    repeated_k, repeated_v = (torch.cat((x, x[:, -1:].expand(-1, 90, -1, -1)), dim=1) for x in (k, v))
    bias = torch.zeros(1, 1, 1, 5)
    bias[..., -1] = math.log(91)
    assert (sdpa(q, k, v, bias).double() - by_definition(q, repeated_k, repeated_v)).abs().max() < 1e-5
