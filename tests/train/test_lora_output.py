"""What a LoRA run delivers, and who reads it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file
from tests.train.conftest import SMALL

import swiftwan.pocket
from swiftwan.engine import Engine
from swiftwan.models.config import POCKET
from swiftwan.models.dit import WanTransformer
from swiftwan.pipelines.request import TextToVideo
from swiftwan.train import adapter
from swiftwan.train.checkpoint import Checkpoints
from swiftwan.train.lora import train
from swiftwan.weights.lora import LoraFile


def weights_with(file, expert=None):
    """The pocket transformer's weights with a LoRA merged, by our own reader."""
    engine = Engine.load("pocket", plan=[f"lora:{file}:mode=merged"], device="cpu", dtype="fp32")
    return engine.parts.transformer.state_dict()


@pytest.mark.parametrize("form", ["diffusers", "comfyui", "kohya"])
def test_every_form_loads_as_what_was_trained(clips, tmp_path, whole, form):
    # Alpha other than the rank, so that a scale that is lost shows.
    out = tmp_path / form
    settings = replace(SMALL, steps=2, alpha=6.0, format=form)
    engine = Engine.load("pocket", plan=[], device="cpu", dtype="fp32")
    (file,) = train(engine, str(clips), out, settings)
    fit = LoraFile.open(file).fit(POCKET.transformer)
    assert fit.report.unmatched == fit.report.misshaped == {}
    changed = weights_with(file)
    checkpoint = Checkpoints(out / "checkpoints").latest().tensors
    for name in ("blocks.0.attn1.to_q", "blocks.6.ffn.net.2"):
        down, up = (checkpoint[f"average.model.{name}.lora_{part}.weight"] for part in "AB")
        plain = Engine.load("pocket", plan=[], device="cpu", dtype="fp32").parts.transformer.state_dict()
        torch.testing.assert_close(changed[f"{name}.weight"], plain[f"{name}.weight"] + 3.0 * up @ down)


KEYS = {
    "diffusers": r"transformer\.blocks\.\d\.(attn1\.to_(q|k|v|out\.0)|ffn\.net\.2)\.lora_[AB]\.weight",
    # ComfyUI, comfy/lora.py: "diffusion_model." and the original names.
    "comfyui": r"diffusion_model\.blocks\.\d\.(self_attn\.[qkvo]|ffn\.2)\.(lora_[AB]\.weight|alpha)",
    # musubi-tuner, networks/lora_wan.py: dots of the original names as underscores.
    "kohya": r"lora_unet_blocks_\d_(self_attn_[qkvo]|ffn_2)\.(lora_down\.weight|lora_up\.weight|alpha)",
}


@pytest.mark.parametrize("form", KEYS)
def test_names_are_those_that_others_read(whole, tmp_path, form):
    from swiftwan.weights.lora_write import write_lora

    factors = {n.removeprefix("transformer."): t for n, t in load_file(whole / "lora.safetensors").items()}
    config = adapter.lora_config(2, 2.0, adapter.chosen_targets(("self",))).to_dict()
    options = {"peft_config": {"r": 2, "lora_alpha": config["lora_alpha"]}, "metadata": {"steps": "6"}, "form": form}
    (file,) = write_lora(tmp_path / "a.safetensors", {None: factors}, **options)
    with safe_open(file, framework="pt") as opened:
        assert all(re.fullmatch(KEYS[form], key) for key in opened.keys())  # noqa: SIM118
        assert opened.metadata()["steps"] == "6"
    files = write_lora(tmp_path / "b.safetensors", {"high": factors, "low": factors}, **options)
    assert len(files) == (1 if form == "diffusers" else 2)
    found = [LoraFile.open(path) for path in files]
    assert sum(len(file.shapes) for file in found) == 2 * len(LoraFile.open(file).shapes)
    if form == "diffusers":
        assert found[0].experts == {"high", "low"}
    else:
        assert [path.name for path in files] == ["b-high_noise.safetensors", "b-low_noise.safetensors"]


def test_diffusers_loads_it(whole):
    folder = Path(swiftwan.pocket.__file__).parent / "model" / "transformer"
    model = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32)
    latents, text = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 512, 192)
    timestep = torch.tensor([500.0])
    plain = model(latents, timestep, text, return_dict=False)[0]
    model.load_lora_adapter(whole / "lora.safetensors", prefix="transformer")
    changed = model(latents, timestep, text, return_dict=False)[0]
    ours = WanTransformer(POCKET.transformer).eval()
    ours.load_state_dict(weights_with(whole / "lora.safetensors"))
    with torch.no_grad():
        expected = ours(latents, timestep, ours.condition(text, latents.shape))
    assert not torch.equal(plain, changed)
    torch.testing.assert_close(changed, expected, rtol=1e-4, atol=1e-5)


def test_the_file_says_what_it_is(whole):
    with safe_open(whole / "lora.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["base_model"] == "pocket"
    assert metadata["steps"] == "6"
    assert json.loads(metadata["settings"])["rank"] == 2
    assert len(metadata["data_sha256"]) == 64


def test_generate_runs_with_it(whole):
    request = TextToVideo("a red circle", width=64, height=64, num_frames=5, num_inference_steps=2, seed=1)
    spec = f"lora:{whole / 'lora.safetensors'}"
    plain = Engine.load("pocket", plan=[], device="cpu", dtype="fp32").run(request)
    changed = Engine.load("pocket", plan=[spec], device="cpu", dtype="fp32").run(request)
    assert not torch.equal(plain.latents, changed.latents)


def test_samples_on_a_schedule_change_with_training(clips, tmp_path, engine):
    settings = replace(SMALL, steps=4, sample_every=2, prompts=("a red circle moves left over a blue background",))
    engine.facts = replace(
        engine.facts, known=replace(POCKET, defaults=replace(POCKET.defaults, num_inference_steps=2))
    )
    train(engine, str(clips), tmp_path, settings)
    first, second = sorted((tmp_path / "samples").iterdir())
    assert [first.name, second.name] == ["step-000002-0.mp4", "step-000004-0.mp4"]
    assert first.read_bytes() != second.read_bytes()
