"""Our transformer against diffusers', on the same random weights and fresh random inputs."""

import math
import weakref
from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel

from swiftwan.errors import WeightsError
from swiftwan.models.config import TransformerConfig
from swiftwan.models.dit import Opening, WanTransformer, log_counts
from swiftwan.ops.block import PLAIN
from swiftwan.ops.modulate import GatedSum, gated_add

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "text_dim": 20,
    "freq_dim": 32,
    "ffn_dim": 56,
    "num_layers": 3,
}
KINDS = {
    "t2v": {},
    "i2v without clip (2.2)": {"in_channels": 36},
    "i2v with clip (2.1)": {"in_channels": 36, "image_dim": 40, "added_kv_proj_dim": 48},
    "first and last frame": {
        "in_channels": 36,
        "image_dim": 40,
        "added_kv_proj_dim": 48,
        "pos_embed_seq_len": 514,
    },
    "ti2v-5b": {"in_channels": 48, "out_channels": 48},
}


def pair(**sizes):
    reference = WanTransformer3DModel(**TINY | sizes).eval()
    with torch.no_grad():  # norms and gates away from their trivial starting values
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    ours = WanTransformer(TransformerConfig(**TINY | sizes)).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    return ours, reference


def padded(text, length=512):
    return torch.nn.functional.pad(text, (0, 0, 0, length - text.shape[1]))


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 4, 6), (2, 6, 4), (3, 10, 2)], ids=str)
@torch.no_grad()
def test_equals_diffusers(kind, shape):
    ours, reference = pair(**KINDS[kind])
    config = ours.config
    latents = torch.randn(2, config.in_channels, *shape)
    text = torch.randn(2, 7, config.text_dim)
    text[1, 4:] = 0  # the second prompt of the batch is shorter
    timestep = torch.tensor([999.0, 37.5])
    image = reference_image = None
    if config.image_dim:
        image = reference_image = torch.randn(4 if config.pos_embed_seq_len else 2, 257, config.image_dim)
    expected = reference(latents, timestep, padded(text), reference_image, return_dict=False)[0]
    got = ours(latents, timestep, ours.condition(text, latents.shape, image))
    assert got.shape == expected.shape
    assert relative_error(got, expected) < 1e-5


@torch.no_grad()
def test_two_timesteps_equal_one_a_token():
    ours, reference = pair(**KINDS["ti2v-5b"])
    latents, text = torch.randn(2, 48, 3, 6, 4), torch.randn(2, 5, 20)
    timestep = torch.tensor([[0.0, 700.0], [0.0, 700.0]])
    per_token = torch.cat([torch.zeros(2, 6), torch.full((2, 12), 700.0)], dim=1)
    expected = reference(latents, per_token, padded(text), return_dict=False)[0]
    got = ours(latents, timestep, ours.condition(text, latents.shape))
    assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("kind", ["t2v", "i2v with clip (2.1)", "ti2v-5b"])
@torch.no_grad()
def test_one_video_under_two_prompts_equals_two_videos(kind):
    ours, _ = pair(**KINDS[kind])
    latents, text = torch.randn(1, ours.config.in_channels, 2, 6, 4), torch.randn(2, 5, 20)
    image = torch.randn(2, 257, ours.config.image_dim) if ours.config.image_dim else None
    timestep = torch.tensor([[0.0, 700.0]]) if kind == "ti2v-5b" else torch.tensor([700.0])
    condition = ours.condition(text, latents.shape, image)
    twice = ours(latents.expand(2, -1, -1, -1, -1), timestep.expand(2, *timestep.shape[1:]), condition)
    seen = []
    ours.blocks[0].attn1.to_out[0].register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    once = ours(latents, timestep, condition)
    assert seen == [1], "the first self-attention serves both prompts"
    assert once.shape == twice.shape
    assert relative_error(once, twice) < 1e-6


@pytest.mark.parametrize("kind", ["t2v", "i2v with clip (2.1)", "ti2v-5b"])
@torch.no_grad()
def test_an_opening_is_computed_once_and_changes_no_bit(kind):
    ours, _ = pair(**KINDS[kind])
    latents, texts = torch.randn(1, ours.config.in_channels, 2, 6, 4), torch.randn(2, 1, 5, 20)
    image = torch.randn(1, 257, ours.config.image_dim) if ours.config.image_dim else None
    timestep = torch.tensor([[0.0, 700.0]]) if kind == "ti2v-5b" else torch.tensor([700.0])
    conditions = [ours.condition(text, latents.shape, image) for text in texts]
    apart = [ours(latents, timestep, condition) for condition in conditions]
    seen = []
    for number, block in enumerate(ours.blocks):
        block.attn1.to_out[0].register_forward_hook(lambda *_, number=number: seen.append(number))
    opening = Opening()
    together = [ours(latents, timestep, condition, opening) for condition in conditions]
    assert seen == [0, 1, 2, 1, 2]
    assert all(map(torch.equal, together, apart))
    assert not torch.equal(*together)


@torch.no_grad()
def test_a_full_prompt_needs_no_padding():
    ours, reference = pair()
    latents, text = torch.randn(1, 16, 1, 4, 4), torch.randn(1, 512, 20)
    condition = ours.condition(text, latents.shape)
    assert condition.text_bias is None
    expected = reference(latents, torch.tensor([500.0]), text, return_dict=False)[0]
    assert relative_error(ours(latents, torch.tensor([500.0]), condition), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 101, 447, 511])
def test_padding_weighs_its_count_in_every_dtype(dtype, count):
    logs = log_counts(count, dtype)
    assert torch.tensor(logs).to(dtype).tolist() == logs, "each is a number of that dtype"
    assert sum(map(math.exp, logs)) == pytest.approx(count, rel=2e-5)
    assert len(logs) <= 4


def test_a_norm_that_every_wan_has_is_not_optional():
    with pytest.raises(WeightsError, match="cross_attn_norm false"):
        WanTransformer(TransformerConfig(**TINY, cross_attn_norm=False))


@pytest.mark.parametrize(("dtype", "worst"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@torch.no_grad()
def test_half_precision_stays_near_float32(dtype, worst):
    ours, _ = pair()
    latents, text, timestep = torch.randn(1, 16, 3, 8, 8), torch.randn(1, 9, 20), torch.tensor([250.0])
    expected = ours(latents, timestep, ours.condition(text, latents.shape))
    half = ours.to(dtype)
    got = half(latents, timestep, half.condition(text, latents.shape))
    assert got.dtype == torch.float32
    assert relative_error(got, expected) < worst


def test_lora_by_peft_finds_the_modules():
    peft = pytest.importorskip("peft")
    ours, _ = pair()
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"])
    wrapped = peft.get_peft_model(ours, config)
    adapted = [name for name, _ in wrapped.named_parameters() if "lora_A" in name]
    assert len(adapted) == 3 * (4 + 4 + 2)
    latents, text = torch.randn(1, 16, 1, 4, 4), torch.randn(1, 3, 20)
    condition = wrapped.condition(text, latents.shape)
    wrapped(latents, torch.tensor([1.0]), condition).sum().backward()


@torch.no_grad()
def test_a_sum_left_to_the_next_block_outlives_nothing():
    """Same flow; and in the second block the first one's terms are gone, though the caller still holds its result."""
    ours, _ = pair()
    latents, timestep = torch.randn(1, 16, 1, 4, 6), torch.tensor([500.0])
    condition = ours.condition(torch.randn(1, 7, ours.config.text_dim), latents.shape)
    expected = ours(latents, timestep, condition)
    left, alive = [], []

    def leave(x, update, gate, spans):
        left.append((weakref.ref(x), weakref.ref(update)))
        return GatedSum(x, update, gate, spans, gated_add)

    ours.ops = replace(PLAIN, gated_add=leave)
    for block in ours.blocks:
        block.ops = ours.ops
        block.attn1.register_forward_pre_hook(
            lambda *_: alive.append(sum(term() is not None for terms in left for term in terms))
        )
    assert torch.equal(ours(latents, timestep, condition), expected)
    assert len(left) == len(alive) == ours.config.num_layers
    assert not any(alive)
