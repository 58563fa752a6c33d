import json
from dataclasses import asdict

import torch

import swiftwan as sw
from swiftwan.models.vae_blocks import Stream
from swiftwan.models.vae_tiny import TinyDecoder
from swiftwan.train.pocket_tiny import SIZES, train
from swiftwan.weights.load import save_weights


def test_what_is_trained_is_a_file_that_a_plan_takes(tmp_path):
    vae = sw.Engine.load("pocket", plan=[], device="cpu", dtype="fp32").parts.vae
    decoder = train(tmp_path / "run", vae, steps=2, batch=1, seed=1, learning_rate=1e-2, num_frames=5)
    torch.manual_seed(1)
    untrained = TinyDecoder(SIZES)
    moved = [not torch.equal(a, b) for a, b in zip(decoder.parameters(), untrained.parameters(), strict=True)]
    assert all(moved)
    assert (tmp_path / "run" / "state.safetensors").exists()
    save_weights(decoder.state_dict(), tmp_path / "vae_tiny", {"_class_name": "TAEHV"} | asdict(SIZES))
    assert json.loads((tmp_path / "vae_tiny" / "config.json").read_text())["widths"] == list(SIZES.widths)

    path = tmp_path / "vae_tiny" / "diffusion_pytorch_model.safetensors"
    loaded = sw.Engine.load("pocket", plan=[f"vae:tiny={path}"], device="cpu", dtype="fp32").parts.vae
    latents = torch.randn(1, 16, 2, 4, 4)
    assert torch.allclose(loaded.decode(latents), decoder(latents, Stream()).clamp(-1, 1), atol=1e-5)
