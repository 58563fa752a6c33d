"""Kernels with a backward pass, against plain float32."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from swiftwan.models.config import POCKET
from swiftwan.models.dit import WanTransformer
from swiftwan.ops import flash4_training, rope
from swiftwan.ops.attention import kernel, sdpa
from swiftwan.ops.attention_fp8 import plain_fp8, round_attention
from swiftwan.ops.few_keys_training import FEW, few_keys, to_prompt
from swiftwan.ops.fp8 import quantize_rows
from swiftwan.ops.fp8_training import Fp8FrozenLinear
from swiftwan.train import adapter, memory

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def relative(got, expected):
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


@gpu
@needs_cuda
@pytest.mark.filterwarnings("default")  # importing FlashAttention-4 warns of what its own packages deprecate
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("length", [512, 1000])
def test_flash4_has_the_gradients_of_the_reference(length, compiled):
    if missing := kernel("flash4").missing_on(torch.cuda.get_device_capability()):
        pytest.skip(missing)
    from swiftwan.ops.flash4_training import flash4

    attend = torch.compile(flash4) if compiled else flash4
    q, k, v, grad = torch.randn(4, 2, length, 3, 128, device="cuda", dtype=torch.bfloat16)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    wide = [x.detach().float().requires_grad_() for x in inputs]
    out, expected = attend(*inputs), sdpa(*wide)
    pairs = zip(
        (out, *torch.autograd.grad(out, inputs, grad)),
        (expected, *torch.autograd.grad(expected, wide, grad.float())),
        strict=True,
    )
    for got, wanted in pairs:
        assert relative(got, wanted) < 0.006


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[gpu, needs_cuda])])
@pytest.mark.filterwarnings("default")  # importing torch's compiler warns of torch.jit, and it advises TF32
@pytest.mark.parametrize("compiled", [False, True])
def test_the_frozen_8_bit_layer_s_output_and_input_gradient(compiled, device):
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("8-bit float products need compute capability 8.9")
    if device == "cpu" and torch.__version__ < "2.13":
        pytest.skip("torch 2.11 multiplies 8-bit floats on a CPU with one scale a tensor only")
    plain = nn.Linear(192, 320, device=device, dtype=torch.bfloat16).requires_grad_(False)
    layer = Fp8FrozenLinear(plain)
    run = torch.compile(layer, backend="inductor" if device == "cuda" else "aot_eager") if compiled else layer
    x = torch.randn(2, 48, 192, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(2, 48, 320, device=device, dtype=torch.bfloat16)
    out, expected = run(x), plain(x)
    assert relative(out, expected) < 0.05
    assert relative(*(torch.autograd.grad(y, x, grad)[0] for y in (out, expected))) < 0.05


def test_both_copies_of_an_8_bit_weight_are_the_weight():
    plain = nn.Linear(64, 48, dtype=torch.bfloat16).requires_grad_(False)
    layer = Fp8FrozenLinear(plain)
    forth = layer.weight.float() * layer.scale.T
    back = (layer.transposed.float() * layer.transposed_scale.T).T
    for copy in (forth, back):
        assert relative(copy, plain.weight) < 0.04
    assert torch.equal(layer.weight, quantize_rows(plain.weight)[0])


def test_flash4_s_shapes_are_known_without_a_gpu():
    from torch._subclasses.fake_tensor import FakeTensorMode

    from swiftwan.ops.flash4_training import flash4_backward, flash4_forward

    with FakeTensorMode():
        q = torch.empty(2, 40, 3, 128, dtype=torch.bfloat16)
        out, lse = flash4_forward(q, q, q)
        assert (out.shape, lse.shape, lse.dtype) == (q.shape, (2, 3, 40), torch.float32)
        assert [grad.shape for grad in flash4_backward(q, q, q, q, out, lse, False)] == [q.shape] * 3


@gpu
@needs_cuda
@pytest.mark.filterwarnings("default")  # importing FlashAttention-4 warns of what its own packages deprecate
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("length", [512, 1000])
def test_attention_in_8_bits_has_nearly_the_gradients_of_the_reference(length, compiled):
    for name in ("flash4", "fp8"):
        if missing := kernel(name).missing_on(torch.cuda.get_device_capability()):
            pytest.skip(missing)
    from swiftwan.ops.attention_fp8_training import attention_fp8, attention_fp8_forward, centred

    attend = torch.compile(attention_fp8) if compiled else attention_fp8
    q, k, v, grad = torch.randn(4, 2, length, 3, 128, device="cuda", dtype=torch.bfloat16)
    k += 2 * torch.randn(128, device="cuda", dtype=torch.bfloat16)  # a mean, which the forward pass takes off
    inputs = [x.requires_grad_() for x in (q, k, v)]
    wide = [x.detach().float().requires_grad_() for x in inputs]
    lse = attention_fp8_forward(q, centred(k), v)[1]
    scores = torch.einsum("blhe,bshe->bhls", wide[0], centred(wide[1])) / 128**0.5
    assert (lse - scores.logsumexp(-1)).abs().max() < 0.02
    out, expected = attend(*inputs), sdpa(*wide)
    pairs = zip(
        (out, *torch.autograd.grad(out, inputs, grad)),
        (expected, *torch.autograd.grad(expected, wide, grad.float())),
        strict=True,
    )
    for (got, wanted), limit in zip(pairs, (0.06, 0.015, 0.015, 0.015), strict=True):
        assert relative(got, wanted) < limit


@pytest.fixture
def pretended_flash4(monkeypatch):
    """FlashAttention-4's two functions in plain torch, under its module's name."""

    def forward(q, k, v, return_lse):
        scores = torch.einsum("blhe,bshe->bhls", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhls,bshe->blhe", scores.softmax(-1), v), scores.logsumexp(-1), None

    def backward(q, k, v, out, grad, lse, deterministic):
        scores = torch.einsum("blhe,bshe->bhls", q, k) / q.shape[-1] ** 0.5
        weights = (scores - lse[..., None]).exp()
        d_weights = torch.einsum("blhe,bshe->bhls", grad, v)
        d_scores = weights * (d_weights - (grad * out).sum(-1).transpose(1, 2)[..., None]) / q.shape[-1] ** 0.5
        return (
            torch.einsum("bhls,bshe->blhe", d_scores, k),
            torch.einsum("bhls,blhe->bshe", d_scores, q),
            torch.einsum("bhls,blhe->bshe", weights, grad),
            None,
        )

    module = SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward)
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", module)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", SimpleNamespace(interface=module))
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())


@pytest.mark.usefixtures("pretended_flash4")
def test_the_operators_are_wired_as_the_reference_is():
    from swiftwan.ops.flash4_training import flash4

    inputs = [torch.randn(2, 20, 3, 8, requires_grad=True) for _ in range(3)]
    out, expected = flash4(*inputs), sdpa(*inputs)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for got, wanted in zip(*(torch.autograd.grad(y, inputs, grad) for y in (out, expected)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture
def pretended_attention_fp8(pretended_flash4, monkeypatch):
    """Its kernels in plain torch, under their modules' names."""

    def attend_rounded(rounded, dtype, lse):
        q, k, v = rounded.inputs
        scores = torch.einsum("blhe,bshe->bhls", rounded.plain.q.float(), rounded.plain.k.float())
        lse.copy_((scores * rounded.factor[..., None] * math.log(2)).logsumexp(-1))
        return plain_fp8(q, k, v).to(dtype)

    def rounding(*inputs):
        plain = round_attention(*inputs)
        return SimpleNamespace(inputs=inputs, plain=plain, factor=plain.factor)

    modules = {
        "attention_fp8_gluon": {"attend_rounded": attend_rounded},
        "round_attention": {"round_attention": rounding},
    }
    for name, functions in modules.items():
        monkeypatch.setitem(sys.modules, f"swiftwan.ops.{name}", SimpleNamespace(**functions))


@pytest.mark.usefixtures("pretended_attention_fp8")
def test_8_bit_attention_s_gradients_do_not_see_the_keys_mean():
    from swiftwan.ops.attention_fp8_training import attention_fp8, attention_fp8_forward, centred

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 400, 2, 32).unbind()
    inputs = [x.requires_grad_() for x in (q, k + 2 * torch.randn(32), v)]
    out, expected = attention_fp8(*inputs), sdpa(*inputs)
    assert relative(out, expected) < 0.06
    assert torch.equal(out, attention_fp8_forward(q, centred(inputs[1]), v)[0])
    grad = torch.randn_like(out)
    for got, wanted in zip(*(torch.autograd.grad(y, inputs, grad) for y in (out, expected)), strict=True):
        assert relative(got, wanted) < 0.01


@pytest.mark.usefixtures("pretended_flash4")
def test_checkpointing_keeps_what_flash4_returns():
    torch.manual_seed(0)
    model = WanTransformer(POCKET.transformer).requires_grad_(False)
    factors = adapter.inject(model, 2, 2.0, adapter.chosen_targets(("all",)), seed=2)
    for block in model.blocks:
        block.attn1.attend = flash4_training.flash4
    memory.keep_in_blocks(model, ["attention"] * 7)
    latents, text = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 6, 192)
    calls = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            calls.append(op is torch.ops.swiftwan.flash4_forward.default)
            return op(*args, **(kwargs or {}))

    with Count():
        out = model(latents, torch.tensor([300.0]), model.condition(text, latents.shape))
        torch.autograd.grad(out.square().sum(), list(factors.values()))
    assert sum(calls) == 7


def cross_inputs(dtype, device="cpu", batch=2, queries=48, keys=11, heads=3, width=16):
    shapes = [(batch, queries, heads, width), (batch, keys, heads, width), (batch, keys, heads, width)]
    return [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]


def assert_few_keys_is_sdpa(inputs, bias, attend, limit):
    wide = [x.detach().float().requires_grad_() for x in inputs]
    out, expected = attend(*inputs, bias), sdpa(*wide, None if bias is None else bias.float())
    grad = torch.randn_like(out)
    got = (out, *torch.autograd.grad(out, inputs, grad))
    wanted = (expected, *torch.autograd.grad(expected, wide, grad.float()))
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.shape == theirs.shape
        assert relative(mine, theirs) < limit


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 0.006)])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("keys", [11, 16])
def test_few_keys_has_the_result_and_the_gradients_of_the_reference(dtype, limit, biased, keys):
    bias = torch.randn(1, 1, 1, keys, dtype=dtype) if biased else None
    assert_few_keys_is_sdpa(cross_inputs(dtype, keys=keys), bias, few_keys, limit)


@gpu
@needs_cuda
@pytest.mark.filterwarnings("default")  # torch.compile advises TF32
@pytest.mark.parametrize("compiled", [False, True])
def test_few_keys_on_a_gpu(compiled):
    attend = torch.compile(few_keys, dynamic=False) if compiled else few_keys
    for batch, keys, heads, biased in ((1, 66, 12, True), (2, 128, 3, False), (1, 9, 5, True)):
        bias = torch.randn(1, 1, 1, keys, dtype=torch.bfloat16, device="cuda") if biased else None
        inputs = cross_inputs(torch.bfloat16, "cuda", batch, queries=3000, keys=keys, heads=heads, width=128)
        assert_few_keys_is_sdpa(inputs, bias, attend, 0.006)


def test_many_keys_go_to_the_reference():
    short, long = (cross_inputs(torch.float32, keys=keys) for keys in (FEW, FEW + 1))
    assert torch.equal(to_prompt(*short), few_keys(*short))
    assert torch.equal(to_prompt(*long), sdpa(*long))


@gpu
@needs_cuda
@pytest.mark.filterwarnings("default")  # torch.compile advises TF32
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("heads", "width"), [(12, 128), (5, 48)])
def test_norm_and_rope_have_the_gradients_of_the_reference(heads, width, compiled):
    from swiftwan.ops.norm_rope_training import norm_rope

    turned = torch.compile(norm_rope, dynamic=False) if compiled else norm_rope
    tables = rope.rope_tables(width, 5, 6, 10, device=torch.device("cuda"))
    weights = torch.rand(2, heads * width, device="cuda") + 0.5
    q, k = (torch.randn(2, 300, heads * width, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qk")
    wide = [x.detach().float().requires_grad_() for x in (q, k)]
    got, expected = turned(q, k, *weights, tables, heads, 1e-6), rope.norm_rope(*wide, *weights, tables, heads, 1e-6)
    grads = torch.randn(2, *got[0].shape, device="cuda", dtype=torch.bfloat16)
    got += torch.autograd.grad(got, (q, k), tuple(grads))
    expected += torch.autograd.grad(expected, wide, tuple(grads.float()))
    for mine, theirs in zip(got, expected, strict=True):
        assert relative(mine, theirs) < 0.004


@gpu
@needs_cuda
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("tokens", "width", "rank"), [(300, 8960, 32), (130, 72, 4), (64, 128, 20), (200, 768, 128)])
def test_gelu_of_a_layer_and_its_adapter_has_the_gradients_of_the_reference(tokens, width, rank, compiled):
    from swiftwan.ops.lora_gelu_training import lora_gelu, reference

    made = torch.compile(lora_gelu, dynamic=False) if compiled else lora_gelu
    shapes = (2, tokens, width), (2, tokens, rank), (width, rank)
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    wide = [x.detach().float().requires_grad_() for x in inputs]
    got, expected = made(*inputs), reference(*wide)
    grad = torch.randn_like(got)
    pairs = zip(
        (got, *torch.autograd.grad(got, inputs, grad)),
        (expected, *torch.autograd.grad(expected, wide, grad.float())),
        strict=True,
    )
    for mine, theirs in pairs:
        assert relative(mine, theirs) < 0.006
