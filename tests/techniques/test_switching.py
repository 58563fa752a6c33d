"""A plan switched on a loaded engine gives the bits of an engine that was loaded with it."""

import pytest
import torch

import swiftwan as sw
from swiftwan.device import pick_device
from swiftwan.errors import PlanError
from swiftwan.techniques import TECHNIQUES
from swiftwan.techniques.base import RELOAD

REQUEST = sw.TextToVideo("a red circle", seed=1, num_inference_steps=3, num_frames=5, width=64, height=64)
SPECS = {
    "attention": "attention:sdpa",
    "deepcache": "deepcache:block-num=3",
    "vae": "vae:tiling:sample=32,stride=16",
    "prompt-cache": "prompt-cache:memory",
}
SWITCHED = [SPECS.get(name, name) for name, kind in TECHNIQUES.items() if kind.switch != RELOAD and name != "compile"]


@pytest.fixture(scope="module")
def engine():
    return sw.Engine.load("pocket", plan=[], device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def plain(engine):
    return engine.run(REQUEST)


@pytest.mark.parametrize("spec", SWITCHED)
def test_a_switch_there_and_back(engine, plain, spec):
    if TECHNIQUES[spec.partition(":")[0]].read(spec.partition(":")[2]).missing_on(pick_device("cpu")):
        pytest.skip(f"{spec} does not run here")
    engine.switch([spec])
    switched = engine.run(REQUEST)
    assert switched.plan == (spec,)
    loaded = sw.Engine.load("pocket", plan=[spec], device="cpu", dtype="fp32").run(REQUEST)
    assert torch.equal(switched.latents, loaded.latents)
    assert torch.equal(switched.frames, loaded.frames)
    engine.switch([])
    assert torch.equal(engine.run(REQUEST).frames, plain.frames)


def test_one_plan_after_another(engine, plain):
    for plan in (
        ["step-cache:threshold=9,first=1,last=0", "cfg-skip:first=1"],
        ["sparse-attention:keep=0.5,block=8"],
        ["deepcache:block-num=3"],
    ):
        engine.switch(plan)
        assert not torch.equal(engine.run(REQUEST).latents, plain.latents)
    engine.switch([])
    assert torch.equal(engine.run(REQUEST).latents, plain.latents)


def test_what_decides_how_weights_load_is_refused_and_changes_nothing(engine, plain):
    with pytest.raises(PlanError, match="'quantize:int4' cannot be switched on a loaded model; load it anew"):
        engine.switch(["quantize:int4", "cfg-skip"])
    assert engine.plan.specs == ()
    assert torch.equal(engine.run(REQUEST).latents, plain.latents)


def test_blocks_are_no_longer_compiled(engine):
    engine.switch(["compile"])
    assert all(block._compiled_call_impl for block in engine.parts.transformer.blocks)
    assert not engine.parts.transformer.takes_opening
    engine.switch([])
    assert not any(block._compiled_call_impl for block in engine.parts.transformer.blocks)
    assert engine.parts.transformer.takes_opening


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("plan", [["fused"], ["cuda-graphs"], ["vae:fast"], ["fused", "attention:cudnn", "vae:fast"]])
def test_a_switch_on_a_gpu(plan):
    engine = sw.Engine.load("pocket", plan=[], device="cuda", dtype="bf16")
    plain = engine.run(REQUEST).latents
    engine.switch(plan)
    loaded = sw.Engine.load("pocket", plan=plan, device="cuda", dtype="bf16").run(REQUEST).latents
    assert torch.equal(engine.run(REQUEST).latents, loaded)
    engine.switch([])
    assert torch.equal(engine.run(REQUEST).latents, plain)
