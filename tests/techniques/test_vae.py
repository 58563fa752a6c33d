from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import swiftwan as sw
from swiftwan.device import pick_device
from swiftwan.errors import PlanError
from swiftwan.models.config import POCKET
from swiftwan.models.vae import WanVAE
from swiftwan.models.vae_fast import FastDecoder
from swiftwan.plan import make_plan, parse

CPU = pick_device("cpu")
GPU = replace(CPU, name="a GPU", capability=(9, 0))


def test_fast_is_exact_and_needs_a_gpu(monkeypatch):
    fast = parse("vae:fast")
    assert (fast.spec, fast.kind) == ("vae:fast", "exact")
    assert parse("vae:tiling").kind == "approximate"
    with pytest.raises(PlanError, match="'vae:fast' cannot run on .*its kernels need an NVIDIA GPU"):
        make_plan(["vae:fast"], CPU)
    monkeypatch.setattr("swiftwan.techniques.vae.find_spec", lambda name: None)
    with pytest.raises(PlanError, match="pip install triton"):
        make_plan(["vae:fast"], GPU)


def test_fast_and_tiling_run_at_once(monkeypatch):
    monkeypatch.setattr("swiftwan.techniques.vae.find_spec", lambda name: name)
    assert make_plan(["vae:tiling", "vae:fast"], GPU).specs == ("vae:fast", "vae:tiling")
    with pytest.raises(PlanError, match="both decide blocks of vae.layers"):
        make_plan(["vae:fast", "vae:fast"], GPU)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("vae:quick", "vae:quick is not known. Known: bf16, fast"),
        ("vae", "needs a value: fast, tiling, tiny"),
        ("vae:bf61", "Did you mean 'bf16'"),
        ("vae:tiling:sample=8,stride=16", "sample 8 and stride 16"),
        ("vae:fp32:sample=8", "has no option 'sample'"),
        ("vae:fast:sample=3", "has no option 'sample'"),
    ],
)
def test_bad_specs(spec, words):
    with pytest.raises(PlanError, match=words):
        parse(spec)


def test_fast_changes_the_vae():
    parts = SimpleNamespace(vae=WanVAE(POCKET.vae))
    parse("vae:fast").install(parts)
    assert isinstance(parts.vae.make_decoder(parts.vae.decoder), FastDecoder)


def test_the_vae_has_a_format_of_its_own():
    request = sw.TextToVideo("a red circle moves left over a blue background", seed=1, num_frames=5)

    def run(*plan):
        engine = sw.Engine.load("pocket", plan=plan, device="cpu", dtype="fp32")
        return engine, engine.parts.vae.decode(latents).float()

    latents = torch.randn(1, 16, 2, 4, 4)
    _, plain = run()
    engine, rounded = run("vae:bf16")
    assert {p.dtype for p in engine.parts.vae.parameters()} == {torch.bfloat16}
    assert engine.parts.transformer.dtype == torch.float32
    assert 0 < (rounded - plain).norm() / plain.norm() < 0.05
    assert engine.run(replace(request, num_inference_steps=1)).frames.shape == (5, 128, 128, 3)
    with pytest.raises(PlanError, match="both decide weights of vae"):
        make_plan(["vae:bf16", "vae:fp32"], CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last_is_the_same_but_for_rounding(dtype):
    vae = WanVAE(POCKET.vae).to(dtype).eval()
    latents = torch.randn(1, 16, 3, 4, 4)
    plain = vae.decode(latents).float()
    parse("channels-last").install(SimpleNamespace(vae=vae))
    assert vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last_3d)
    error = (vae.decode(latents).float() - plain).norm() / plain.norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.04)


def test_channels_last_says_where_it_gives_nothing():
    with pytest.raises(PlanError, match="channels-last there in any plan"):
        make_plan(["channels-last"], CPU)
    with pytest.raises(PlanError, match=r"both decide blocks of vae\.layers"):
        make_plan(["channels-last", "vae:fast"], GPU)
