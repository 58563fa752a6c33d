import pytest
import torch
from safetensors.torch import save_file

import swiftwan as sw
from swiftwan.device import pick_device
from swiftwan.errors import PlanError, WeightsError
from swiftwan.models.vae_blocks import Stream
from swiftwan.models.vae_tiny import TinyDecoder, TinySizes
from swiftwan.plan import make_plan
from swiftwan.weights.tiny import find_tiny, load_tiny

SIZES = TinySizes(16, (8, 6, 4, 4), 1)
CPU = torch.device("cpu")


@pytest.fixture(params=["safetensors", "pth"])
def file(request, tmp_path):
    """A whole checkpoint as it is published, encoder and all, and its decoder."""
    model = TinyDecoder(SIZES)
    tensors = {
        **model.state_dict(),
        "encoder.0.weight": torch.randn(64, 3, 3, 3),
        "encoder.2.conv.weight": torch.ones(3),
    }
    path = tmp_path / f"taew2_1.{request.param}"
    if request.param == "pth":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    return path, model


def test_a_file_loads_and_decodes(file):
    path, model = file
    loaded = load_tiny(path, device=CPU, dtype=torch.float32)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    engine = sw.Engine.load("pocket", plan=[f"vae:tiny={path}"], device="cpu", dtype="fp32")
    assert engine.plan.specs == (f"vae:tiny={path}",)
    request = sw.TextToVideo("a red circle moves left over a blue background", num_frames=9, num_inference_steps=1)
    result = engine.run(request)
    assert result.frames.shape == (9, 128, 128, 3)
    expected = engine.parts.vae.tiny(result.latents, Stream())
    pixels = ((expected[0].permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1) * 255).round()
    assert (result.frames.float() - pixels).abs().max() <= 1


def test_a_file_for_another_vae_is_told_before_anything_loads(file):
    path, _ = file
    with pytest.raises(PlanError, match="decodes 16 latent channels to 8 pixels a side.*48 and 16; take taew2_2"):
        sw.explain("wan2.2-ti2v-5b", sw.TextToVideo("a"), plan=[f"vae:tiny={path}"], device="cpu")
    assert sw.explain("wan2.1-t2v-14b", sw.TextToVideo("a"), plan=[f"vae:tiny={path}"], device="cpu")


def test_what_is_missing_is_told_before_anything_loads(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    request = sw.TextToVideo("a")
    with pytest.raises(PlanError, match="vae: there is no file nowhere.safetensors; give a path, or OWNER/NAME/FILE"):
        sw.explain("pocket", request, plan=["vae:tiny=nowhere.safetensors"], device="cpu")
    for spec in ("vae:tiny", "vae:tiny=", "vae:tiny:bf16"):
        with pytest.raises(PlanError, match=f"{spec} names no file; a tiny decoder is given as vae:tiny=FILE"):
            sw.explain("pocket", request, plan=[spec], device="cpu")
    with pytest.raises(PlanError, match=r"both decide blocks of vae\.frame"):
        make_plan(["vae:tiny=a.safetensors", "vae:tiling"], pick_device("cpu"))
    (tmp_path / "broken.safetensors").write_bytes(b"not a file")
    with pytest.raises(WeightsError, match=r"broken\.safetensors"):
        load_tiny(tmp_path / "broken.safetensors", device=CPU, dtype=torch.float32)


def test_a_file_on_the_hub(monkeypatch, file):
    path, _ = file
    asked = []
    monkeypatch.setattr("swiftwan.weights.tiny.download_file", lambda repo, name: asked.append((repo, name)) or path)
    assert find_tiny("someone/tiny/sub/taew2_1.safetensors") == path
    assert asked == [("someone/tiny", "sub/taew2_1.safetensors")]
