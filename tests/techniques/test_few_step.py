"""The technique: which schedule a file gets, who stands above whom, and the embedded model's own students."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

import swiftwan as sw
from swiftwan.device import pick_device
from swiftwan.errors import PlanError
from swiftwan.models.config import POCKET
from swiftwan.plan import describe, make_plan, parse
from swiftwan.sampling import FewStep
from swiftwan.techniques.few_step import METADATA_KEY, RECIPES, to_metadata
from swiftwan.techniques.lora import shipped

CPU = pick_device("cpu")
PROMPT = "a red circle moves left over a blue background"


@pytest.fixture
def lora(tmp_path):
    """A LoRA for the embedded model by a name, with or without a header."""

    def make(name, header=None):
        generator = torch.Generator().manual_seed(len(name))
        tensors = {
            "transformer.blocks.0.attn1.to_q.lora_A.weight": torch.randn(2, 256, generator=generator) * 0.1,
            "transformer.blocks.0.attn1.to_q.lora_B.weight": torch.randn(256, 2, generator=generator) * 0.1,
        }
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path, metadata={METADATA_KEY: header} if header else None)
        return path

    return make


def schedule(spec):
    return parse(spec).schedule()[0]


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32", "lightx2v"),
        ("wan2.2_t2v_A14b_high_noise_lora_rank64_lightx2v_4step_1217", "lightning"),
        ("Wan2.2-Lightning_T2V-A14B-4steps-lora_LOW_fp16", "lightning"),
        ("FastWan_T2V_14B_480p_lora_rank_128_bf16", "fastwan"),
        ("Wan_2_1_T2V_14B_480p_rCM_lora_average_rank_83_bf16", "rcm"),
        ("TurboWan2.1-T2V-14B", "rcm"),
        ("Wan21_CausVid_14B_T2V_lora_rank32_v2", "causvid"),
    ],
)
def test_a_published_file_is_known_by_its_name(lora, name, family):
    found, source = parse(f"few-step:{lora(name)}").schedule()
    assert found == RECIPES[family]
    assert family in source


def test_a_files_header_stands_above_its_name_and_a_recipe_above_both(lora):
    own = FewStep(6, "lcm", 2.0, (1.0, 0.8, 0.6, 0.4, 0.3, 0.1))
    path = lora("lightx2v", to_metadata(own))
    assert schedule(f"few-step:{path}") == own
    assert schedule(f"few-step:{path}:recipe=rcm") == RECIPES["rcm"]
    assert schedule(f"few-step:{path}:recipe=rcm:steps=2").steps == 2


def test_an_unknown_file_says_what_to_add(lora):
    with pytest.raises(PlanError, match=r"does not say how it is sampled; add recipe=NAME, one of lightx2v"):
        make_plan([f"few-step:{lora('mine')}"], CPU)


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        "no json",
        '{"steps": 4}',
        '{"steps": 0, "scheduler": "euler", "flow_shift": 3}',
        '{"steps": 4, "scheduler": "ddim", "flow_shift": 3}',
        '{"steps": 2, "scheduler": "euler", "flow_shift": 3, "levels": [0.5, 0.9]}',
        '{"steps": 2, "scheduler": "euler", "flow_shift": 3, "levels": [NaN, 0.9]}',
    ],
)
def test_a_header_that_is_no_schedule_is_refused(lora, header):
    with pytest.raises(PlanError, match="is no schedule"):
        make_plan([f"few-step:{lora('mine', header)}"], CPU)


@pytest.mark.parametrize("spec", ["few-step", "few-step:steps=8", "few-step:recipe=rcm", "few-step:recipe=rcm:steps=2"])
def test_a_spec_reads_back(spec):
    assert parse(spec).spec == spec


def test_a_spec_with_a_file_reads_back(tmp_path):
    for tail in ("", "=0.5", "=0.5:expert=low", ":recipe=lightx2v", "=-1:expert=high:recipe=lightx2v:steps=6"):
        spec = f"few-step:{tmp_path}/a=b:c.safetensors{tail}"
        assert parse(spec).spec == spec
    assert parse("few-step:recipe=rcm,steps=2").spec == "few-step:recipe=rcm:steps=2"


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("few-step:steps=5", "the embedded model's own LoRAs are for 4 or 8"),
        ("few-step:steps=four", "must be a number"),
        ("few-step:recipe=rcm:steps=0", "steps is 0"),
        ("few-step:recipe=lighting", "Did you mean|lightning"),
        ("few-step:a.safetensors:mode=live", "lora:a.safetensors:mode=live few-step:recipe=NAME"),
        ("few-step:a.safetensors:strong=1", "no option 'strong'"),
        ("few-step:nothing", "does not name a .safetensors file"),
        ("few-step:/no/such.safetensors", "/no/such.safetensors"),
    ],
)
def test_a_wrong_spec_says_the_way_out(spec, told):
    with pytest.raises(PlanError, match=told):
        make_plan([spec], CPU)


def test_it_refuses_what_needs_guidance_or_many_steps():
    for other in ("batched-cfg", "cfg-interval", "cfg-skip"):
        with pytest.raises(PlanError, match="runs without guidance"):
            make_plan(["few-step", other], CPU, facts=describe("pocket"))
    for other in ("step-cache", "deepcache:block-num=2"):
        with pytest.raises(PlanError, match="differ too much"):
            make_plan(["few-step", other], CPU, facts=describe("pocket"))
    with pytest.raises(PlanError, match="two schedules"):
        make_plan(["few-step", "few-step:recipe=rcm"], CPU, facts=describe("pocket"))


def test_each_expert_may_have_a_file_of_its_own(lora):
    high, low = lora("lightning_high"), lora("lightning_low")
    both = parse(f"few-step:{high}").conflict(parse(f"few-step:{low}"))
    assert both == ""
    assert parse(f"few-step:{high}").conflict(parse(f"few-step:{high}:steps=8")).startswith("two schedules")


def test_the_shipped_students_are_for_the_embedded_model():
    with pytest.raises(PlanError, match=r"no few-step LoRA for 'wan2.1-t2v-1.3b' comes with swiftwan"):
        make_plan(["few-step"], CPU, facts=describe("wan2.1-t2v-1.3b"))


# What it changes


def test_what_the_request_says_stands_above_the_recipe():
    def explained(**asked):
        return sw.explain("pocket", sw.TextToVideo(PROMPT, **asked), plan=["few-step"], device="cpu")

    own = explained().request
    assert (own.num_inference_steps, own.scheduler, own.guidance_scale, own.flow_shift) == (4, "euler", 1.0, 5.0)
    asked = explained(num_inference_steps=6, guidance_scale=2.0, scheduler="unipc", flow_shift=3.0)
    assert (asked.request.num_inference_steps, asked.request.guidance_scale) == (6, 2.0)
    assert (asked.request.scheduler, asked.request.flow_shift) == ("unipc", 3.0)
    assert "scheduler and steps and guidance and shift as asked for" in "\n".join(asked.lines())
    told = "\n".join(explained().lines())
    assert "sets 4 steps of euler at timesteps 1000, 938, 833, 625, no guidance (from the file's header)" in told
    assert "as asked for" not in told


def test_two_experts_lose_both_guidances():
    request = sw.TextToVideo(PROMPT)
    told = sw.explain("random:wan2.2-t2v-a14b", request, plan=["few-step:recipe=lightning"], device="cpu").request
    assert (told.guidance_scale, told.guidance_scale_2, told.num_inference_steps) == (1.0, 1.0, 4)


def test_a_run_calls_the_student_once_a_step_at_its_own_levels(monkeypatch):
    engine = sw.Engine.load("pocket", plan=["few-step", "prompt-cache:off"], device="cpu", dtype="fp32")
    seen, forward = [], engine.parts.transformer.forward

    def counted(latents, timestep, *others):
        seen.append(timestep.item())
        return forward(latents, timestep, *others)

    monkeypatch.setattr(engine.parts.transformer, "forward", counted)
    result = engine.run(sw.TextToVideo(PROMPT, seed=1, num_frames=5, width=64, height=64))
    assert seen == pytest.approx([1000, 937.5, 833.333, 625])
    assert result.request.num_inference_steps == 4
    seen.clear()
    engine.run(sw.TextToVideo(PROMPT, seed=1, num_frames=5, width=64, height=64, num_inference_steps=2))
    assert seen == pytest.approx([1000, 833.333])


def test_a_run_begins_with_as_much_noise_as_its_first_level(monkeypatch):
    seen = []
    engine = sw.Engine.load("pocket", plan=["few-step:recipe=rcm", "prompt-cache:off"], device="cpu", dtype="fp32")
    forward = engine.parts.transformer.forward

    def looked(latents, *others):
        seen.append(latents)
        return forward(latents, *others)

    monkeypatch.setattr(engine.parts.transformer, "forward", looked)
    engine.run(sw.TextToVideo(PROMPT, seed=1, num_frames=5, width=64, height=64, num_inference_steps=1))
    noise = torch.randn((1, 16, 2, 8, 8), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(seen[0], 80 / 81 * noise)


def test_a_live_lora_takes_a_recipe_of_its_own(lora):
    plan = [f"lora:{lora('lightx2v')}:mode=live", "few-step:recipe=lightx2v", "prompt-cache:off"]
    merged = [f"few-step:{lora('lightx2v')}", "prompt-cache:off"]
    request = sw.TextToVideo(PROMPT, seed=1, num_frames=5, width=64, height=64)
    one, other = (sw.Engine.load("pocket", plan=p, device="cpu", dtype="fp32").run(request) for p in (plan, merged))
    assert one.request.scheduler == "lcm"
    assert ((one.latents - other.latents).norm() / other.latents.norm()).item() < 1e-3


@pytest.mark.parametrize("steps", [4, 8])
def test_the_shipped_students_are_small_and_say_what_they_are(steps):
    path = shipped(f"few_step_{steps}")
    assert path.stat().st_size < 1_000_000
    assert schedule(f"few-step:steps={steps}").steps == steps
    told = "\n".join(parse(f"few-step:steps={steps}").fit(POCKET))
    assert "unmatched" not in told
    assert "mis-shaped" not in told


def test_all_of_the_embedded_model_stays_under_its_limit():
    folder = shipped("few_step_4").parents[1]
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.suffix != ".py" and f.is_file()) < 24e6


def test_the_published_levels_are_those_of_their_own_code():
    # rCM: angles, and the share of noise at an angle
    angles = (math.atan(80), 1.5, 1.4, 1.0)
    assert RECIPES["rcm"].levels == pytest.approx([math.sin(a) / (math.sin(a) + math.cos(a)) for a in angles], abs=1e-6)
    # LightX2V: places 0, 250, 500, 750 of a table of 1000 shifted levels
    table = torch.linspace(1, 0, 1001)[:-1]
    table = 5 * table / (1 + 4 * table)
    found = RECIPES["lightx2v"].levels_for(4, 5.0)
    assert found == pytest.approx(table[[0, 250, 500, 750]].tolist(), abs=1e-6)
    # Wan2.2: its second expert begins at index 2, as our boundary has it
    assert [level >= 0.875 for level in found] == [True, True, False, False]
    assert json.loads(to_metadata(RECIPES["fastwan"]))["levels"] == [1.0, 0.757, 0.522]
