import pytest
import torch

from swiftwan.device import pick_device
from swiftwan.errors import PlanError
from swiftwan.ops.block import PLAIN
from swiftwan.plan import make_plan, parse
from swiftwan.techniques.fused import Fused, MergedProjection


def test_a_cpu_is_refused_with_the_reason():
    with pytest.raises(PlanError, match="'fused' cannot run on .*: it needs an NVIDIA GPU"):
        make_plan(["fused"], pick_device("cpu"))


def test_without_triton_the_way_to_it_is_told(gpu, monkeypatch):
    monkeypatch.setattr("swiftwan.techniques.fused.find_spec", lambda name: None)
    with pytest.raises(PlanError, match="pip install triton"):
        make_plan(["fused"], gpu((9, 0)))


def test_blocks_are_plain_until_told_otherwise(parts):
    assert all(block.ops is PLAIN for block in parts.transformer.blocks)


def test_merged_projections_compute_what_their_layers_do(parts, forward):
    expected = forward(parts.transformer)
    names = list(parts.transformer.state_dict())
    for block in parts.transformer.blocks:
        block.attn1.project = MergedProjection(block.attn1)
    assert torch.allclose(forward(parts.transformer), expected, atol=1e-5)
    assert list(parts.transformer.state_dict()) == names
    with torch.no_grad():  # as a LoRA is merged: in place
        parts.transformer.blocks[0].attn1.to_k.weight.add_(0.1)
    assert not torch.allclose(forward(parts.transformer), expected, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "worst"), [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_the_flow_is_that_of_the_plain_model(parts, forward, dtype, worst):
    expected = forward(parts.transformer)
    parts.transformer.to("cuda", dtype)
    Fused().install(parts)
    got = forward(parts.transformer)
    assert ((got - expected).norm() / expected.norm()).item() < worst


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_layer_that_is_no_plain_linear_keeps_its_own_product(parts, forward):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for block in parts.transformer.blocks:
        block.ffn.net[0].proj.__class__ = Doubled
    expected = forward(parts.transformer)
    parts.transformer.to("cuda")
    Fused().install(parts)
    assert ((forward(parts.transformer) - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_blocks_of_8_bit_layers_round_in_passing(parts_by_16, forward):
    parts = parts_by_16
    expected = forward(parts.transformer)
    parts.transformer.to("cuda", torch.bfloat16)
    parse("quantize:fp8").install(parts)
    apart = forward(parts.transformer)
    Fused().install(parts)
    together = forward(parts.transformer)
    errors = [((flow.to(expected) - expected).norm() / expected.norm()).item() for flow in (apart, together)]
    assert 1e-3 < errors[1] < 1.2 * errors[0] < 0.3


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("weights_move", [False, True])
def test_products_add_to_tokens_where_weights_stay(parts_by_16, forward, monkeypatch, weights_move):
    from swiftwan.ops import added_product, cublaslt

    parts, added = parts_by_16, []
    expected = forward(parts.transformer)
    inner = cublaslt.add_product
    monkeypatch.setattr(cublaslt, "add_product", lambda *given: (added.append(1), inner(*given)))
    parts.transformer.to("cuda", torch.bfloat16)
    parts.weights_move = weights_move
    parse("quantize:fp8").install(parts)
    Fused().install(parts)
    apart = forward(parts.transformer)  # of so few tokens that no product adds
    assert not added
    monkeypatch.setattr(added_product, "LEAST_BYTES", 0)
    first, again = forward(parts.transformer), forward(parts.transformer)
    assert len(added) == (0 if weights_move else 2 * 3 * len(parts.transformer.blocks))
    assert torch.equal(first, again)
    errors = [((flow.to(expected) - expected).norm() / expected.norm()).item() for flow in (apart, first)]
    assert errors[1] < 1.2 * errors[0] < 0.3
