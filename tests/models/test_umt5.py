"""UMT5's encoder against transformers' on the same weights."""

import math

import pytest
import torch
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from swiftwan.errors import WeightsError
from swiftwan.models.umt5 import TextConfig, UMT5Encoder, bounded, bucket

SIZES = {
    "vocab_size": 64,
    "d_model": 48,
    "d_kv": 16,
    "d_ff": 96,
    "num_heads": 4,
    "num_layers": 3,
    "feed_forward_proj": "gated-gelu",
}
PAIRS = [(UMT5EncoderModel, UMT5Config, True), (T5EncoderModel, T5Config, False)]


def pair(model, config, own_bias, dtype):
    theirs = model(config(**SIZES)).eval().requires_grad_(False)
    for weight in theirs.parameters():  # biases begin at 0, norms at 1: nothing would be seen
        weight.normal_(0, 1 / math.sqrt(weight.shape[-1]) if weight.ndim > 1 else 1)
    ours = UMT5Encoder(TextConfig.from_json(SIZES, own_bias=own_bias)).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.to(dtype), theirs.to(dtype)


@pytest.mark.parametrize(("model", "config", "own_bias"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embeddings_are_as_exact_as_those_of_transformers(model, config, own_bias, dtype):
    ours, theirs = pair(model, config, own_bias, dtype)
    ids = torch.randint(0, SIZES["vocab_size"], (2, 150))  # longer than the widest bucket
    mask = torch.ones_like(ids)
    mask[1, 40:] = 0
    got, expected = ours(ids, mask), theirs(ids, mask).last_hidden_state
    exact = theirs.double()(ids, mask).last_hidden_state
    assert got.dtype == dtype
    for clip, length in enumerate((150, 40)):
        of_ours, of_theirs = ((out - exact)[clip, :length].norm() for out in (got, expected))
        assert of_ours < 1.5 * of_theirs
        assert of_theirs < 0.1 * exact[clip, :length].norm()


def test_padding_changes_nothing():
    ours, _ = pair(*PAIRS[0], torch.float32)
    ids = torch.randint(0, SIZES["vocab_size"], (1, 9))
    padded = torch.nn.functional.pad(ids, (0, 7))
    mask = (torch.arange(16) < 9).long()[None]
    torch.testing.assert_close(ours(padded, mask)[:, :9], ours(ids, torch.ones_like(ids)), atol=1e-5, rtol=1e-5)


def test_buckets_are_single_near_and_ranges_far():
    near = bucket(torch.arange(-7, 8), 32, 128)
    assert near.tolist() == [7, 6, 5, 4, 3, 2, 1, 0, 17, 18, 19, 20, 21, 22, 23]
    far = bucket(torch.tensor([-500, -128, -8, 8, 9, 127, 128, 500]), 32, 128)
    assert far.tolist() == [15, 15, 8, 24, 24, 31, 31, 31]


def test_float16_never_turns_infinite():
    x = torch.tensor([1.0, math.inf, -math.inf], dtype=torch.float16)
    assert bounded(x).tolist() == [1, 64512, -64512]
    assert bounded(x.float()).tolist() == [1, math.inf, -math.inf]


def test_sizes_that_transformers_gives_a_value_need_not_be_told():
    config = TextConfig.from_json(SIZES | {"dropout_rate": 0.1})
    told = UMT5Config(**SIZES)
    assert config.relative_attention_num_buckets == told.relative_attention_num_buckets
    assert config.relative_attention_max_distance == told.relative_attention_max_distance
    assert config.layer_norm_epsilon == told.layer_norm_epsilon


@pytest.mark.parametrize(("said", "own_bias"), [({"feed_forward_proj": "gated-silu"}, True), ({}, False)])
def test_another_feed_forward_is_refused(said, own_bias):
    sizes = {name: value for name, value in SIZES.items() if name != "feed_forward_proj"} | said
    with pytest.raises(
        WeightsError, match=r"feed_forward_proj '(gated-silu|relu)'; every published Wan has gated-gelu"
    ):
        TextConfig.from_json(sizes, own_bias=own_bias)
