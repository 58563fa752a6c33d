import importlib.util
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import swiftwan as sw
from swiftwan.device import pick_device
from swiftwan.errors import PlanError
from swiftwan.plan import make_plan, parse
from swiftwan.techniques.ends import LinearOtherAtEnds
from swiftwan.techniques.fused import _is_plain

REQUEST = sw.TextToVideo("a red circle moves left over a blue background", seed=1, num_inference_steps=2, num_frames=5)


def run(*plan):
    engine = sw.Engine.load("pocket", plan=["prompt-cache:off", *plan], device="cpu", dtype="fp32")
    return engine, engine.run(REQUEST).latents


@pytest.fixture(scope="module")
def plain():
    return run()[1]


@pytest.mark.parametrize(
    ("spec", "limit"),
    [
        ("quantize:int8", 0.05),
        ("quantize:int8:activations=dynamic", 0.1),
        ("quantize:fp8:activations=none", 0.12),
        ("quantize:int4", 0.6),
        ("quantize:nf4:keep=1", 0.6),
        ("quantize:int8:on=text", 0.02),
    ],
)
def test_fewer_bits_stay_near(spec, limit, plain):
    engine, latents = run(spec)
    error = (latents - plain).norm() / plain.norm()
    assert 0 < error < limit
    assert spec in engine.plan.specs


def test_the_ends_can_be_kept():
    engine, _ = run("quantize:int4:keep=2")
    kinds = [type(block.attn1.to_q) is nn.Linear for block in engine.parts.transformer.blocks]
    assert kinds == [True, True, False, False, False, True, True]


def test_nf4_of_all_blocks_is_refused_with_what_it_costs():
    with pytest.raises(PlanError, match="costs 2 to 3 points .* take quantize:int4, .* quantize:nf4:keep=1"):
        parse("quantize:nf4")


@pytest.mark.parametrize("format_", ["int8", "fp8:activations=none"])
def test_fused_does_not_merge_what_torchao_holds(format_):
    layer = parse(f"quantize:{format_}").linear(nn.Linear(64, 64).requires_grad_(False))
    assert type(layer) is nn.Linear
    assert not _is_plain(layer)
    assert _is_plain(nn.Linear(64, 64))


def test_steps_at_the_ends_can_be_kept(plain):
    engine, all_kept = run("quantize:int4:keep-steps=1")  # of two steps
    layer = engine.parts.transformer.blocks[3].attn1.to_q
    assert isinstance(layer, LinearOtherAtEnds)
    assert type(layer.at_ends) is nn.Linear
    assert type(layer.between) is not nn.Linear
    assert torch.equal(all_kept, plain)
    few = replace(REQUEST, num_inference_steps=4)
    latents = {
        plan: sw.Engine.load("pocket", plan=list(plan), device="cpu", dtype="fp32").run(few).latents
        for plan in ((), ("quantize:int4",), ("quantize:int4:keep-steps=1",))
    }
    whole, rough, ends = latents.values()
    assert 0 < (ends - whole).norm() < (rough - whole).norm()


def test_kept_steps_run_the_same_again():
    engine, first = run("quantize:int4:keep-steps=1")
    assert torch.equal(engine.run(REQUEST).latents, first)


def test_weights_take_less_memory():
    layer = nn.Linear(256, 256).bfloat16()
    bits = {
        spec: sum(t.nbytes for t in parse(spec).linear(layer).buffers()) * 8 / 256**2 for spec in ("quantize:int4",)
    }
    assert bits["quantize:int4"] == pytest.approx(5.0)


def test_both_models_can_be_quantized_and_each_only_once():
    plan = make_plan(["quantize:int8", "quantize:int8:on=text"], pick_device("cpu"))
    assert len(plan.techniques) == 2
    with pytest.raises(PlanError, match="both decide linear of transformer"):
        make_plan(["quantize:int8", "quantize:nf4:keep=1"], pick_device("cpu"))


def test_keeping_every_block_is_refused():
    explain = partial(sw.explain, "pocket", sw.TextToVideo("a red circle"), device="cpu")
    with pytest.raises(PlanError, match="keep is 4 blocks at either end of the 7 of 'pocket': none is left to change"):
        explain(plan=["quantize:int4:keep=4"])
    assert explain(plan=["quantize:int4:keep=3"]).plan.specs == ("quantize:int4:keep=3",)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("quantize", "needs a value"),
        ("quantize:int9", "value is 'int9'. Did you mean 'int"),
        ("quantize:int8:on=txet", "Did you mean 'text'"),
        ("quantize:int8:keep=-1", "keep is -1"),
        ("quantize:int8:keep-steps=-1", "keep-steps is -1; it is a number of steps, 0 or more"),
        ("quantize:int8:on=text,keep-steps=1", "on=text has no steps to keep"),
        ("quantize:nf4:keep=1,activations=dynamic", "no 8-bit activations"),
        ("quantize:fp8", "capability 8.9 or more; take quantize:fp8:activations=none"),
    ],
)
def test_bad_plans_say_what_and_how(spec, words):
    with pytest.raises(PlanError, match=words):
        make_plan([spec], pick_device("cpu"))


def test_a_missing_package_is_told_with_its_install_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlanError, match=r"pip install 'swiftwan\[quantize\]'"):
        make_plan(["quantize:int8"], pick_device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_text_encoder_of_another_format_has_another_place_in_the_cache(dtype):
    one, _ = run()
    other, _ = run("quantize:int8:on=text")
    assert one.parts.text._key("a") != other.parts.text._key("a")


@pytest.mark.parametrize("value", ["int4", "nf4", "int8"])
def test_a_text_encoder_in_few_bits_reads_prompts_nearly_alike(value):
    prompt = "a red circle moves left over a blue background"
    plain, small = (
        sw.Engine.load("pocket", plan=["prompt-cache:off", *more], device="cpu", dtype="fp32").parts.text
        for more in ([], [f"quantize:{value}:on=text"])
    )
    expected = plain.encode(prompt)
    error = (small.encode(prompt) - expected).norm() / expected.norm()
    assert 0 < error < 0.3
