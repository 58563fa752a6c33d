"""Blocks with the kernels that training gives them learn what plain ones do."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from swiftwan.device import pick_device
from swiftwan.errors import RequestError, UnavailableError
from swiftwan.models.config import POCKET
from swiftwan.models.dit import KEEP_FP32, WanTransformer
from swiftwan.ops.attention import kernel, sdpa
from swiftwan.ops.block import PLAIN
from swiftwan.train import adapter, flow
from swiftwan.train.trainee import attention, compile_blocks, equip
from swiftwan.weights.load import randomize

CONFIG = replace(POCKET.transformer, num_attention_heads=2, attention_head_dim=128, num_layers=2)
CPU = pick_device("cpu")


def model_and_factors(device, dtype, rank=8):
    with torch.device("meta"):
        model = WanTransformer(CONFIG).requires_grad_(False)
    randomize(model, device=device.torch_device, dtype=dtype, keep_fp32=KEEP_FP32)
    factors = adapter.inject(model, rank, float(rank), adapter.chosen_targets(("all",)), seed=0)
    draw = torch.Generator().manual_seed(1)
    for factor in factors.values():
        factor.data = (0.05 * torch.randn(factor.shape, generator=draw)).to(factor.device)
    return model, factors


def gradients(model, factors):
    draw = torch.Generator().manual_seed(2)
    device = next(iter(factors.values())).device
    latents, noise = torch.randn(2, 1, 16, 3, 16, 16, generator=draw).to(device)
    text = torch.randn(1, 9, CONFIG.text_dim, generator=draw).to(device)
    flow.loss(model, flow.Batch(latents, text), torch.tensor([0.6], device=device), noise).backward()
    return torch.cat([factor.grad.flatten() for factor in factors.values()])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("default")  # importing kernels warns of what their packages deprecate
@pytest.mark.parametrize(("base", "limit"), [("bf16", 0.02), ("fp8", 0.08), ("fp8-attention", 0.1)])
def test_the_gradients_are_those_of_plain_blocks(base, limit):
    device = pick_device("cuda")
    model, factors = model_and_factors(device, torch.bfloat16)
    if base != "bf16":
        if any(kernel(name).missing_on(device.capability) for name in ("fp8", "flash4")):
            pytest.skip("8-bit attention needs Hopper and FlashAttention-4")
        adapter.check_fp8_attention(model, device)
    equip(model, device, attention(device, torch.bfloat16, base))
    if base != "bf16":
        adapter.freeze_in_fp8(model, device)
    compile_blocks(model)
    expected = gradients(*model_and_factors(device, torch.float32))
    found = gradients(model, factors)
    assert (found - expected).norm() < limit * expected.norm()


def test_a_cpu_learns_by_plain_functions():
    model, _ = model_and_factors(CPU, torch.float32)
    before = model.blocks[0].ffn.net[0].linear_gelu
    equip(model, CPU, attention(CPU, torch.float32))
    block = model.blocks[0]
    assert (block.attn1.attend, block.attn2.attend, block.ops) == (sdpa, sdpa, PLAIN)
    assert block.ffn.net[0].linear_gelu is before


def test_8_bit_products_say_what_they_lack():
    model, _ = model_and_factors(CPU, torch.float16)
    with pytest.raises(UnavailableError, match=r"compute capability 8\.9"):
        adapter.check_fp8(model, CPU)
    with pytest.raises(RequestError, match="go with --dtype bf16, and this is float16"):
        adapter.check_fp8(model, replace(CPU, capability=(9, 0)))


def test_8_bit_attention_says_what_it_lacks():
    model, _ = model_and_factors(CPU, torch.float32)
    with pytest.raises(UnavailableError, match="compute capability"):
        adapter.check_fp8_attention(model, CPU)


def gelu_in_one_pass(base, low, up):
    return F.gelu(base + low @ up.T, approximate="tanh")


@pytest.mark.parametrize(("rank", "fused"), [(8, True), (129, False)])
def test_gelu_is_fused_with_adapters_that_its_kernel_can_hold(rank, fused):
    model, _ = model_and_factors(CPU, torch.float32, rank)
    gelu, x = model.blocks[0].ffn.net[0], torch.randn(1, 5, CONFIG.dim)
    before, expected = gelu.linear_gelu, gelu(x)
    adapter.fuse_gelu(model.blocks[0], gelu_in_one_pass)
    assert (gelu.linear_gelu is not before) == fused
    assert torch.allclose(gelu(x), expected, atol=1e-5)
    assert not torch.allclose(expected, F.gelu(gelu.proj.base_layer(x), approximate="tanh"), atol=1e-3)
