import math
import sys
from types import SimpleNamespace

import pytest
import torch

from swiftwan.ops.attention import KERNELS, kernel, norm_attend, opaque, opaque_for_bytes, sdpa
from swiftwan.ops.fp8 import Rounded


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


def test_an_outside_kernel_is_one_operator_to_the_compiler():
    attend = opaque("test_kernel", lambda q, k, v: (sdpa(q, k, v).contiguous(), "log-sum-exp"))
    q, k, v = (torch.randn(1, 6, 2, 8) for _ in range(3))
    compiled = torch.compile(lambda q, k, v: attend(q, k, v) + 1, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(q, k, v), sdpa(q, k, v) + 1)


def test_a_kernel_that_leaves_bytes_is_one_operator_to_the_compiler():
    def in_bytes(q, k, v, times):
        out = times * sdpa(q, k, v)
        scale = out.abs().amax((2, 3), keepdim=True) / 448
        return Rounded((out / scale).to(torch.float8_e4m3fn), scale)

    attend = opaque_for_bytes("test_kernel_for_bytes", in_bytes, ", float times")
    q, k, v = (torch.randn(1, 6, 2, 8) for _ in range(3))
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, 2.0), backend="eager", fullgraph=True)
    expected = in_bytes(q, k, v, 2.0)
    for found in (attend(q, k, v, 2.0), compiled(q, k, v)):
        assert isinstance(found, Rounded)
        assert torch.equal(found.values.float(), expected.values.float())
        assert torch.equal(found.scale, expected.scale)


@pytest.mark.parametrize("capability", [None, (7, 5), (8, 6), (9, 0), (10, 0)])
def test_the_reference_runs_everywhere_and_each_refusal_says_why(capability):
    assert kernel("sdpa").missing_on(capability) == ""
    assert all(k.missing_on(capability) for k in KERNELS if k.capability and (capability or (0, 0)) < k.capability)


def test_sage_gets_smoothed_keys_in_its_layout_and_the_caller_keeps_his(monkeypatch):
    given = {}

    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, smooth_k=True):
        given.update(k=k.clone(), layout=tensor_layout)
        if smooth_k:
            k -= k.mean(dim=1, keepdim=True)  # as 1.0.6 does
        return sdpa(q, k, v)

    monkeypatch.setitem(sys.modules, "sageattention", SimpleNamespace(sageattn=sageattn))
    monkeypatch.setattr("swiftwan.ops.attention.opaque", lambda name, function: function)
    q, k, v = (torch.randn(2, 6, 3, 8) for _ in range(3))
    k += 3
    before = k.clone()
    got = kernel("sage").load.__wrapped__()(q, k, v)
    assert torch.equal(k, before)
    assert given["layout"] == "NHD"
    assert given["k"].mean(dim=1).abs().max() < 1e-5
    assert (got.double() - by_definition(q, k, v)).abs().max() < 1e-5


@pytest.mark.parametrize("told", ["0.0.0", "3.0.0"])
def test_a_name_that_a_registry_holds_for_nothing_is_no_installation(monkeypatch, told):
    monkeypatch.setattr("swiftwan.ops.attention.version", lambda package: told)
    missing = kernel("flash3").missing_on((9, 0))
    if told == "3.0.0":
        assert missing == ""
    else:
        assert "pip install --no-deps --index-url https://download.pytorch.org/whl/cu130 flash-attn-3" in missing


def test_flash2_is_torch_s_own_and_never_another():
    assert kernel("flash2").package is None
    assert "compute capability 8.0" in kernel("flash2").missing_on((7, 5))
    assert kernel("flash2").missing_on((8, 0)) == ""
    q, k, v = (torch.randn(1, 6, 2, 8) for _ in range(3))
    assert (kernel("flash2").load()(q, k, v).double() - by_definition(q, k, v)).abs().max() < 1e-5
    # Values as wide as no query are: what FlashAttention does not take, and another backend would.
    with (
        pytest.warns(UserWarning, match="[Ff]lash attention"),
        pytest.raises(RuntimeError, match="No available kernel"),
    ):
        kernel("flash2").load()(q, k, v[..., :4])


def test_text_attention_norms_the_whole_width_and_repeats_a_video_for_each_prompt():
    q, weight = torch.randn(1, 6, 24), torch.randn(24)
    key, value = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3, 8)
    got = norm_attend(q, weight, key, value, None, 1e-6)
    normed = q * (q.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
    scores = torch.einsum("lhe,bshe->bhls", normed[0].unflatten(-1, (3, 8)), key) / 8**0.5
    expected = torch.einsum("bhls,bshe->blhe", scores.softmax(-1), value).flatten(2)
    assert got.shape == (2, 6, 24)
    assert torch.allclose(got, expected, atol=1e-5)
