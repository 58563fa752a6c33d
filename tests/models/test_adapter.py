"""What an adapter adds, live and merged, against the dense product."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from swiftwan.models.adapter import (
    AdaptedLinear,
    Change,
    Full,
    Hadamard,
    Kronecker,
    LowRank,
    attach,
    fit,
    merge,
    quantised,
    set_strength,
)

CPU = torch.device("cpu")


def deltas(dtype=torch.float32):
    def r(*shape):
        return torch.randn(shape, dtype=dtype) / 3

    return {
        "full": (Full(change := r(12, 8)), change),
        "low-rank": (LowRank(down := r(3, 8), up := r(12, 3)), up @ down),
        "kronecker": (Kronecker(outer := r(3, 4), inner := r(4, 2)), torch.kron(outer, inner)),
        "hadamard": (Hadamard(a := r(12, 3), b := r(3, 8), c := r(12, 3), d := r(3, 8)), (a @ b) * (c @ d)),
    }


class Model(nn.Module):
    """A linear and a norm, as in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.requires_grad_(False)

    def forward(self, x):
        return self.norm(self.linear(x))


def changes(kind="low-rank"):
    delta, _ = deltas()[kind]
    return {
        "linear.weight": Change((delta,), (12, 8), linear=True),
        "linear.bias": Change((Full(torch.randn(12)),), (12,), linear=True),
        "norm.weight": Change((Full(torch.randn(12)),), (12,), linear=False),
        "norm.bias": Change((Full(torch.randn(12)),), (12,), linear=False),
    }


def live(model, change, key="a", strength=1.0):
    attach(model, change, key, strength, device=CPU, dtype=torch.float32)
    return model


@pytest.mark.parametrize(("dtype", "worst"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("kind", ["full", "low-rank", "kronecker", "hadamard"])
def test_a_delta_is_its_dense_product(kind, dtype, worst):
    delta, expected = deltas(dtype)[kind]
    x, strength = torch.randn(2, 5, 8, dtype=dtype), torch.tensor(0.6)
    assert torch.allclose(delta.dense(), expected)
    found, reference = delta(x, strength), 0.6 * (x.double() @ expected.double().T)
    assert found.dtype is dtype
    error = (found - reference).abs().max() / reference.abs().max()
    assert error < worst, f"relative error {error:.1e}"


@pytest.mark.parametrize("kind", ["full", "low-rank", "kronecker", "hadamard"])
def test_live_is_merged_and_zero_is_none(kind):
    model, x = Model(), torch.randn(4, 8)
    plain, change = model(x), changes(kind)
    merged = Model()
    merged.load_state_dict(model.state_dict())
    merge(merged, change, 0.7, CPU)
    live(model, change, strength=0.0)
    assert torch.equal(model(x), plain)
    assert set_strength(model, "a", 0.7)
    assert torch.allclose(model(x), merged(x), atol=1e-5)
    assert not torch.allclose(model(x), plain, atol=1e-2)
    set_strength(model, "a", 0.0)
    assert torch.equal(model(x), plain)
    assert not set_strength(model, "b", 1.0)


def test_several_add_up():
    one, other = changes(), changes("kronecker")
    model, x = Model(), torch.randn(4, 8)
    merged = Model()
    merged.load_state_dict(model.state_dict())
    for change, strength in ((one, 0.5), (other, -1.5)):
        merge(merged, change, strength, CPU)
    live(live(model, one, "one", 0.5), other, "other", -1.5)
    assert torch.allclose(model(x), merged(x), atol=1e-5)
    assert isinstance(model.linear, AdaptedLinear)
    assert model.linear.weight is model.linear.base.weight


def test_merging_behind_a_live_one_changes_the_linear_itself():
    model, x = Model(), torch.randn(4, 8)
    plain = model(x)
    live(model, changes(), strength=0.0)
    merge(model, changes(), 0.7, CPU)
    assert not torch.allclose(model(x), plain, atol=1e-2)


def test_another_strength_does_not_compile_anew():
    model, x = live(live(Model(), changes(), "a", 0.3), changes("kronecker"), "b"), torch.randn(4, 8)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=False, fullgraph=True)
    torch._dynamo.reset()
    seen = []
    for strength in (0.3, 0.0, -2.0, 1.0):
        set_strength(model, "a", strength)
        seen.append(compiled(x))
        assert torch.allclose(seen[-1], model(x), atol=1e-5)
    assert counter.frame_count == 1
    assert not torch.allclose(seen[0], seen[2], atol=1e-2)


class Packed(nn.Module):
    """A linear in 8 bits that keeps no float weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.codes * self.scale, self.bias)


def test_quantised_linears_are_only_called():
    model, x, change = Model(), torch.randn(4, 8), changes("full")
    assert quantised(model, change) == []
    model.linear = Packed(model.linear)
    assert quantised(model, change) == ["linear.weight", "linear.bias"]
    plain = model.linear(x)
    live(model, change, strength=0.5)
    weight, bias = (change[f"linear.{leaf}"].deltas[0].change for leaf in ("weight", "bias"))
    assert torch.allclose(model.linear(x), plain + 0.5 * (x @ weight.T + bias), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_eight_bit_weights_count_as_quantised(dtype):
    model = Model()
    model.linear.weight = nn.Parameter(model.linear.weight.to(dtype), requires_grad=False)
    assert quantised(model, changes()) == ["linear.weight", "linear.bias"]


def test_merged_in_bfloat16_is_rounded_once():
    model = Model().to(torch.bfloat16)
    weight, change = model.linear.weight.clone(), changes("full")
    merge(model, change, 0.7, CPU)
    exact = weight.float() + 0.7 * change["linear.weight"].deltas[0].change
    assert torch.equal(model.linear.weight, exact.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("have", "want"), [((1, 6, 8), (1, 6, 8)), ((6, 8), (1, 6, 8)), ((4, 12), (4, 3, 1, 2, 2)), ((8, 1), (8,))]
)
def test_a_change_is_brought_to_its_parameters_shape(have, want):
    change = torch.randn(have)
    assert torch.equal(fit(change, want).flatten(), change.flatten())


def test_missing_input_channels_are_zero():
    change = torch.randn(4, 16, 1, 2, 2)
    found = fit(change, (4, 36, 1, 2, 2))
    assert torch.equal(found[:, :16], change)
    assert not found[:, 16:].any()


@pytest.mark.parametrize(("have", "want"), [((8,), (12,)), ((8, 12), (12, 8)), ((4, 36, 1, 2, 2), (4, 16, 1, 2, 2))])
def test_another_shape_is_refused(have, want):
    with pytest.raises(ValueError, match="is not"):
        fit(torch.zeros(have), want)
