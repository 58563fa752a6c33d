"""``random:`` models: the peer holds the very weights that swiftwan makes."""

from dataclasses import replace

import torch

import swiftwan as sw
from swiftwan.bench import peers
from swiftwan.device import pick_device
from swiftwan.facts import complete, describe
from swiftwan.models.config import POCKET, TransformerConfig
from swiftwan.weights import build
from swiftwan.weights.find import RandomModel

UMT5 = {"vocab_size": 9000, "d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 64, "num_layers": 2}
KNOWN = replace(
    POCKET,
    transformer=TransformerConfig(num_attention_heads=2, attention_head_dim=32, text_dim=64, ffn_dim=64, num_layers=2),
    boundary_ratio=0.9,
    expand_timesteps=False,
)


def test_the_peer_has_our_random_weights_and_predicts_the_same(monkeypatch) -> None:
    sizes = UMT5 | {"feed_forward_proj": "gated-gelu"}
    monkeypatch.setattr(build, "UMT5_XXL", sizes)
    monkeypatch.setattr(peers, "UMT5_XXL", sizes)
    cpu = torch.device("cpu")

    pipe = peers._random_pipeline(KNOWN, cpu, torch.float32)
    ours = build.build(RandomModel(KNOWN), device=cpu, dtype=torch.float32)

    for theirs, mine in ((pipe.transformer, ours.transformer), (pipe.transformer_2, ours.transformer_2)):
        assert mine is not None
        weights = mine.state_dict()
        assert weights.keys() == theirs.state_dict().keys()
        assert all(torch.equal(weight, weights[name]) for name, weight in theirs.state_dict().items())
    latents, text = torch.randn(1, 16, 2, 8, 8), torch.randn(1, 512, 64)
    with torch.no_grad():
        wanted = pipe.transformer(latents, torch.tensor([500.0]), text, return_dict=False)[0]
        found = ours.transformer(latents, torch.tensor([500.0]), ours.transformer.condition(text, latents.shape))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert pipe.config.boundary_ratio == 0.9


def test_the_peer_keeps_nothing_for_gradients():
    peer = peers.DiffusersPeer("pocket", pick_device("cpu"), "fp32", compile=False)
    asked = sw.TextToVideo("a red circle", width=64, height=64, num_frames=1, num_inference_steps=1, seed=1)
    encode, seen = peer.pipe.encode_prompt, []

    def watched(*args, **options):
        texts = encode(*args, **options)
        seen.extend(texts)
        return texts

    peer.pipe.encode_prompt = watched
    run = peer.run(complete(asked, describe("pocket")))
    assert run.frames.shape == (1, 64, 64, 3)
    assert len(seen) >= 2
    assert not any(text.requires_grad for text in seen)
