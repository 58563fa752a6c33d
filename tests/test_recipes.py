"""Named plans on machines that are not here."""

from dataclasses import replace

import pytest
import torch

import swiftwan as sw
from swiftwan.device import Device
from swiftwan.errors import PlanError
from swiftwan.estimate import estimate
from swiftwan.facts import complete, describe
from swiftwan.plan import make_plan
from swiftwan.recipes import NAMES, RECIPES, SPARE


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    """As if Triton and FlashAttention-4 were installed."""
    for module in ("fused", "vae"):
        monkeypatch.setattr(f"swiftwan.techniques.{module}.find_spec", lambda name: object())
    monkeypatch.setattr("swiftwan.ops.attention._installed", lambda package: package == "flash-attn-4")


def gpu(gigabytes, capability=(9, 0)):
    size = int(gigabytes * 1e9)
    return Device("cuda:0", "a GPU", size, size, capability, 100, torch.bfloat16, "for the test")


def load_of(model, plan, device, request=None):
    facts = describe(f"random:{model}")
    chosen = make_plan(plan, device, None, facts, request)
    request = complete(request or sw.TextToVideo("a cat"), facts)
    return chosen, estimate(request, facts, chosen, device.total_bytes)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_memory(name):
    recipe, device = RECIPES[name], gpu(float(name.removesuffix("gb")))
    request = sw.TextToVideo("a cat", width=recipe.width, height=recipe.height, num_frames=recipe.num_frames)
    plan, load = load_of(recipe.model, name, device, request)
    assert load.peak_bytes < (1 - SPARE / 2) * device.total_bytes
    assert {technique.kind for technique in plan.techniques} == {"exact"}


@pytest.mark.parametrize("quality", ["exact", "near", "fast"])
@pytest.mark.parametrize("model", ["wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.2-ti2v-5b", "wan2.2-t2v-a14b"])
@pytest.mark.parametrize("gigabytes", [24, 48, 80, 141])
def test_auto_fits_and_keeps_its_word(model, gigabytes, quality):
    plan, load = load_of(model, f"auto:{quality}", gpu(gigabytes))
    assert load.peak_bytes <= (1 - SPARE) * gigabytes * 1e9
    allowed = {"exact": {"exact"}, "near": {"exact", "near"}, "fast": {"exact", "near", "approximate"}}[quality]
    kinds = {technique.kind for technique in plan.techniques}
    assert kinds <= allowed
    assert max(allowed, key=["exact", "near", "approximate"].index) in kinds


def test_auto_is_exact_unless_told():
    device = gpu(141)
    assert load_of("wan2.1-t2v-14b", "auto", device)[0] == load_of("wan2.1-t2v-14b", "auto:exact", device)[0]
    assert load_of("wan2.1-t2v-14b", "auto", device)[0].specs == ("attention:flash4", "fused", "vae:fast")


@pytest.mark.parametrize("quality", ["near", "fast"])
def test_auto_takes_8_bits_of_attention_where_the_gpu_and_the_model_have_them(quality, monkeypatch):
    monkeypatch.setattr("swiftwan.ops.attention._installed", lambda package: package in ("flash-attn-4", "triton"))
    assert "attention:fp8" in load_of("wan2.1-t2v-1.3b", f"auto:{quality}", gpu(141))[0].specs
    assert "attention:flash4" in load_of("wan2.1-t2v-1.3b", f"auto:{quality}", gpu(141, (10, 0)))[0].specs
    assert "attention:flash4" in load_of("wan2.1-t2v-1.3b", "auto:exact", gpu(141))[0].specs
    # The embedded model's heads are of 64.
    assert "attention:flash4" in make_plan(f"auto:{quality}", gpu(141), None, describe("pocket")).specs


@pytest.mark.parametrize("quality", ["exact", "near", "fast"])
def test_auto_records_forwards_where_launches_take_most_of_the_time(quality):
    at_once = {"batched-cfg", "cuda-graphs"}
    picture = sw.TextToVideo("a cat", width=832, height=480, num_frames=1)
    clip = sw.TextToVideo("a cat", width=832, height=480, num_frames=17)
    model, device = "wan2.1-t2v-1.3b", gpu(141)
    specs = load_of(model, f"auto:{quality}", device, picture)[0].specs
    assert at_once <= set(specs)
    assert not {"step-cache", "cfg-skip", "attention:flash4"} & set(specs)
    for request in (clip, None):
        assert not at_once & set(load_of(model, f"auto:{quality}", device, request)[0].specs)
    # A 14B picture computes for longer than its launches take; and nothing is recorded of weights that move.
    assert not at_once & set(load_of("wan2.1-t2v-14b", f"auto:{quality}", device, picture)[0].specs)
    assert not at_once & set(load_of(model, f"auto:{quality}", gpu(5), picture)[0].specs)


@pytest.mark.parametrize(("size", "spec"), [(3.3, "offload:blocks"), (3.5, "offload:auto:budget=0.4")])
def test_a_budget_that_holds_no_block_is_none(size, spec):
    chosen, load = load_of("wan2.1-t2v-1.3b", "auto", gpu(size), sw.TextToVideo("a cat", num_frames=1))
    assert spec in chosen.specs
    assert load.peak_bytes < (1 - SPARE) * size * 1e9


def test_auto_moves_less_where_there_is_more_memory():
    specs = {size: load_of("wan2.1-t2v-14b", "auto", gpu(size))[0].specs for size in (24, 44, 50, 141)}
    assert any(spec.startswith("offload:auto:budget=") for spec in specs[24])
    assert "offload:model" in specs[44]
    assert not any("offload" in spec for spec in specs[141])


def test_auto_looks_at_the_request():
    small = sw.TextToVideo("a cat", width=832, height=480, num_frames=17)
    large, less = (load_of("wan2.1-t2v-14b", "auto", gpu(38), request)[0].specs for request in (None, small))
    assert large != less


def test_an_older_gpu_gets_what_it_can_run():
    plan, load = load_of("wan2.1-t2v-14b", "auto:near", gpu(24, (8, 6)))
    assert "quantize:int4" in plan.specs
    assert not any(spec.startswith("attention") for spec in plan.specs)
    assert load.peak_bytes < 24e9


def test_14b_in_16_gb_and_1_3b_in_6():
    request = sw.TextToVideo("a cat", width=832, height=480, num_frames=81)
    assert load_of("wan2.1-t2v-14b", "auto", gpu(16), request)[1].peak_bytes < 15.1e9
    lean = ["offload:blocks", "text-encoder:blocks", "fused", "attention:flash4"]
    assert load_of("wan2.1-t2v-1.3b", lean, gpu(6))[1].peak_bytes < 5.7e9


def test_what_does_not_fit_gets_what_takes_least():
    plan, load = load_of("wan2.1-t2v-14b", "auto:fast", gpu(5))
    assert {"offload:blocks", "text-encoder:blocks", "vae:tiling"} <= set(plan.specs)
    assert load.peak_bytes > 5e9


def test_without_facts_auto_is_the_machines_kernels():
    assert make_plan("auto", gpu(8)).specs == ("attention:flash4", "fused", "vae:fast")
    assert make_plan("none", gpu(8)).specs == ()
    cpu = replace(gpu(8), torch_device="cpu", capability=None, dtype=torch.float32)
    assert make_plan("auto", cpu, None, describe("pocket")).specs == ()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("atuo", "Did you mean 'auto'"),
        ("16GB", "Did you mean '16gb'"),
        ("auto:nearly", "unknown quality 'nearly'. Did you mean 'near'"),
    ],
)
def test_an_unknown_name_is_told(name, words):
    with pytest.raises(PlanError, match=words):
        make_plan(name, gpu(16))
    assert name not in NAMES


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("offload:auto", "say how much of the device's memory"),
        ("offload:auto:budget=-1", "say how much"),
        ("offload:blocks:budget=3", "has no budget; that is for offload:auto"),
        ("offload:autp:budget=3", "Did you mean 'auto'"),
    ],
)
def test_a_budget_is_checked(spec, words):
    with pytest.raises(PlanError, match=words):
        make_plan([spec], gpu(16))


def test_a_budget_below_what_cannot_stream_is_told():
    with pytest.raises(PlanError, match=r"budget is 0.5 GB, and the two blocks at work .* take 1.\d\d GB"):
        load_of("wan2.1-t2v-14b", ["offload:auto:budget=0.5"], gpu(16))
