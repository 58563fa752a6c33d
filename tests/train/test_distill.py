"""Distillation: its formulas against plain ones, who learns from what, and a run that is killed and goes on."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import swiftwan as sw
from swiftwan.cli import main
from swiftwan.errors import RequestError, WeightsError
from swiftwan.models.config import KNOWN_MODELS, POCKET, TransformerConfig
from swiftwan.models.dit import WanTransformer
from swiftwan.plan import parse
from swiftwan.pocket.world import draw
from swiftwan.train import distill, distill_run, distill_stages, distill_world
from swiftwan.train.distill import Phases, Roles
from swiftwan.train.distill_settings import Settings, refuse_unfit
from swiftwan.train.distill_world import drawn, read_prompts, world

TINY = TransformerConfig(
    num_attention_heads=2, attention_head_dim=32, text_dim=20, freq_dim=32, ffn_dim=56, num_layers=2
)
PROMPTS = [f"a red circle moves {way} over a blue background" for way in ("left", "right", "up", "down")] * 2


@pytest.fixture
def roles():
    roles = Roles(WanTransformer(TINY).eval(), guidance_scale=4.0, rank=2, seed=0)
    for role in ("student", "average", "critic"):
        for name, parameter in roles.parameters(role).items():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return roles


@pytest.fixture
def batch():
    """Clips, noise, text, negative text."""
    return torch.randn(3, 16, 2, 4, 4), torch.randn(3, 16, 2, 4, 4), torch.randn(3, 5, 20), torch.zeros(3, 5, 20)


def level(*values):
    return torch.tensor(values)


def test_phases_end_where_a_sampler_steps():
    phases = Phases.of(4, 3.0, 48)
    assert phases.edges == pytest.approx((1, 0.9, 0.75, 0.5, 0))
    assert len(phases.levels) == 49
    assert phases.edges[1] == phases.levels[12]


def test_roles_share_the_weights_and_nothing_else(roles, batch):
    clips, _, text, _ = batch
    flows = {role: roles.flow(role, clips, level(0.3, 0.5, 0.9), text) for role in distill.ROLES}
    assert all(not torch.equal(flows["teacher"], flows[role]) for role in ("student", "average", "critic"))
    roles.flow("student", clips, level(0.3, 0.5, 0.9), text).sum().backward()
    touched = {name for name, p in roles.transformer.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched
    assert all(".student." in name for name in touched)


def test_the_teacher_is_the_model_without_adapters(roles, batch):
    clips, _, text, _ = batch
    plain = WanTransformer(TINY).eval()
    names = {name.replace(".base_layer", ""): p for name, p in roles.transformer.state_dict().items()}
    plain.load_state_dict({name: p for name, p in names.items() if "lora_" not in name})
    wanted = plain(clips, torch.tensor([300.0, 500.0, 900.0]), plain.condition(text, clips.shape))
    assert torch.equal(roles.flow("teacher", clips, level(0.3, 0.5, 0.9), text), wanted)


@torch.no_grad()
def test_a_walk_is_eulers_method_with_guidance(roles, batch):
    _, noise, text, negative = batch
    phases = Phases.of(2, 5.0, 4)
    places = distill.walk(roles, phases, noise, text, negative)
    x, wanted = noise, [noise]
    for i, (here, there) in enumerate(zip(phases.levels[:-1], phases.levels[1:], strict=True), 1):
        at = torch.full((3,), here)
        given, free = (roles.flow("teacher", x, at, words) for words in (text, negative))
        x = x + (there - here) * (free + 4 * (given - free))
        if i % 2 == 0:
            wanted.append(x)
    assert torch.allclose(places, torch.stack(wanted), atol=1e-5)


def test_the_consistency_loss_is_the_students_distance_from_teacher_and_average(roles, batch):
    clips, noise, text, negative = batch
    here, near, edge = level(0.9, 0.7, 0.5), level(0.8, 0.6, 0.4), level(0.75, 0.6, 0.0)
    loss = distill.consistency(roles, clips, noise, text, negative, here, near, edge)
    errors = []
    for i in range(3):
        x = (1 - here[i]) * clips[i] + here[i] * noise[i]
        one = (x[None], here[i : i + 1])
        given, free = (roles.flow("teacher", *one, words[i : i + 1])[0] for words in (text, negative))
        stepped = x + (near[i] - here[i]) * (free + 4 * (given - free))
        ahead = roles.flow("average", stepped[None], near[i : i + 1], text[i : i + 1])[0]
        end = stepped + (edge[i] - near[i]) * ahead
        student = x + (edge[i] - here[i]) * roles.flow("student", *one, text[i : i + 1])[0]
        mean = ((student - end) / (edge[i] - here[i])).square().mean()
        errors.append((mean + 1e-4).sqrt() - 0.01)
    assert torch.allclose(loss, torch.stack(errors).mean(), rtol=1e-4)
    loss.backward()
    assert all(p.grad is not None for name, p in roles.parameters("student").items() if "lora_B" in name)
    assert all(p.grad is None for p in roles.parameters("average").values())


@pytest.mark.parametrize(("here", "there"), [(0.0, 0.3), (0.0, 0.8), (0.5, 0.7), (0.75, 0.9)])
def test_a_noised_clips_flow_has_the_mean_that_a_model_learns(here, there):
    """Of Gaussian data the flow at each level is known: it is linear."""
    count = 400_000
    generator = torch.Generator().manual_seed(1)
    data, first, second = torch.randn(3, count, 1, generator=generator)
    clips = (1 - here) * data + here * first
    noisy, flow = distill.noised(clips, second, torch.full((count,), here), torch.full((count,), there))
    assert noisy.var().item() == pytest.approx((1 - there) ** 2 + there**2, rel=0.01)
    slope = ((flow * noisy).sum() / noisy.square().sum()).item()
    assert slope == pytest.approx((there - (1 - there)) / ((1 - there) ** 2 + there**2), abs=0.02)


def test_matching_moves_what_was_made_from_the_critics_mind_to_the_teachers(roles, batch):
    clips, noise, text, negative = batch
    made = clips.clone().requires_grad_()
    here, there = level(0.0, 0.0, 0.0), level(0.2, 0.5, 0.8)
    distill.matching(roles, made, noise, text, negative, here, there).backward()
    noisy = torch.lerp(clips, noise, distill.like(there, clips))
    with torch.no_grad():
        real = noisy - distill.like(there, clips) * roles.guided(noisy, there, text, negative)
        fake = noisy - distill.like(there, clips) * roles.flow("critic", noisy, there, text)
    size = (clips - real).abs().flatten(1).mean(1)
    wanted = (fake - real) / distill.like(size, clips) / clips.numel()
    assert torch.allclose(made.grad, wanted, atol=1e-6)


def test_a_critic_that_knows_the_flow_is_not_criticised():
    data, noise = torch.zeros(4, 2, 1, 3, 3), torch.randn(4, 2, 1, 3, 3)

    class Knows:
        def flow(self, role, latents, at, text):
            assert role == "critic"
            return latents / distill.like(at, latents)  # all data are 0, so the noise is what is there

    loss = distill.criticism(Knows(), data, noise, None, torch.zeros(4), level(0.1, 0.4, 0.7, 0.95))
    assert loss < 1e-10


# Runs


def settings(**changes):
    values = {
        "steps": 2, "flow_shift": 3.0, "guidance_scale": 2.0, "walk": 4, "rank": 2, "batch": 2, "walks": 0,
        "regression": 2, "consistency": 2, "matching": 1, "learning_rate": 1e-3, "seed": 3,
    }  # fmt: skip
    return Settings(**values | changes)


@pytest.fixture(scope="module")
def embedded():
    return sw.Engine.load("pocket", plan=["prompt-cache:off"], device="cpu", dtype="fp32").parts


@pytest.fixture
def distilled(monkeypatch, embedded):
    """Distill on four prompts, at a size that takes a second; stop at the ``dies``-th word.

    The student is tiny and of random weights, but for ``whole``, which takes the embedded model.
    """
    each = dict.fromkeys(("regression", "consistency", "matching"), 1)
    monkeypatch.setattr(distill_stages, "LOG_EVERY", each)
    monkeypatch.setattr(distill_stages, "SAVE_EVERY", each)

    def run(folder, dies=None, prompts=PROMPTS[:4], start=None, clips=None, two=False, whole=False, **changes):
        said = []

        def say(line):
            said.append(line)
            if len(said) == dies:
                raise KeyboardInterrupt

        text = copy.copy(embedded.text)
        text.encoder = embedded.text.encoder  # a run lets go of its own
        torch.manual_seed(5)
        sized = POCKET.transformer if whole else replace(TINY, text_dim=192)
        parts = replace(embedded, text=text, transformer=WanTransformer(sized).eval())
        if two:
            parts.transformer_2 = WanTransformer(sized).eval()
        beside = {"base": "pocket", "clips": clips, "start": start, "say": say}
        return distill_run.run(folder, parts, prompts, "", (16, 2, 4, 4), settings(**changes), **beside), said

    return run


def test_a_run_leaves_a_lora_that_the_few_step_technique_reads(tmp_path, distilled):
    path, said = distilled(tmp_path / "run", whole=True)
    assert [line.split(":")[0] for line in said] == [
        *["walks"] * 2,
        *["regression"] * 2,
        *["consistency"] * 2,
        "matching",
    ]
    factors = load_file(path)
    assert any(factors[name].any() for name in factors if "lora_B" in name)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert header["base_model"] == "pocket"
    assert json.loads(header["settings"])["guidance_scale"] == 2.0
    told = sw.explain("pocket", sw.TextToVideo("a red circle"), plan=[f"few-step:{path}"], device="cpu").request
    assert (told.num_inference_steps, told.scheduler, told.guidance_scale, told.flow_shift) == (2, "euler", 1.0, 3.0)
    gaps = [json.loads(row)["gap"] for row in (path.parent / "regression" / "log.jsonl").read_text().splitlines()[1::2]]
    assert all(math.isfinite(gap) and gap > 0 for gap in gaps)


def test_diffusers_reads_the_lora(tmp_path, distilled):
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    path, _ = distilled(tmp_path / "run", regression=1, consistency=0, matching=0)
    state, header = WanLoraLoaderMixin.lora_state_dict(str(path), return_lora_metadata=True)
    assert set(state) == set(load_file(path))
    assert header["transformer.lora_alpha"] == header["transformer.r"] == 2


@pytest.mark.parametrize("dies", [1, 3, 5, 7])
def test_a_killed_run_goes_on_to_the_same_file(tmp_path, distilled, dies):
    whole, _ = distilled(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        distilled(tmp_path / "killed", dies=dies)
    path, said = distilled(tmp_path / "killed")
    assert len(said) < 7 + (dies == 7)
    one, other = load_file(path), load_file(whole)
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def test_a_run_may_start_from_a_student(tmp_path, distilled):
    first, _ = distilled(tmp_path / "first", consistency=0, matching=0)
    again, _ = distilled(tmp_path / "again", regression=0, consistency=0, matching=0, start=first)
    one, other = load_file(first), load_file(again)
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())
    with pytest.raises(RequestError, match=r"not a student of this model with rank 3.* 0 fit"):
        distilled(tmp_path / "other", start=first, rank=3)
    with pytest.raises(WeightsError, match="is missing"):
        distilled(tmp_path / "other", start=tmp_path / "none.safetensors")
    with pytest.raises(RequestError, match="rank is 9999, and the transformer is"):
        distilled(tmp_path / "other", rank=9999)
    assert not (tmp_path / "other").exists()  # what was refused holds no run


def test_clips_may_be_given_beside_the_walks(tmp_path, distilled):
    clips = torch.randn(4, 16, 2, 4, 4)
    path, said = distilled(tmp_path / "clips", regression=0, matching=0, walks=2, clips=clips)
    assert said[0] == "walks: 2 of 2"
    assert len(list((tmp_path / "clips" / "walks").iterdir())) == 1
    other, _ = distilled(tmp_path / "none", regression=0, matching=0, walks=2)
    name = "transformer.blocks.0.attn1.to_q.lora_B.weight"
    assert not torch.equal(load_file(path)[name], load_file(other)[name])


def test_the_world_draws_a_clip_for_each_prompt(monkeypatch):
    monkeypatch.setattr(distill_world, "WORLD_CLIPS", 3)
    scenes = world(POCKET, 1)
    vae = sw.Engine.load("pocket", plan=[], device="cpu", dtype="fp32").parts.vae
    request = sw.TextToVideo("a", num_frames=5, width=128, height=128)
    latents = drawn(vae, scenes, request, 7, batch=2)
    assert latents.shape == (3, 16, 2, 16, 16)
    video = draw(scenes[2:], 9, num_frames=5, device=torch.device("cpu"))
    assert torch.allclose(latents[2:].float(), vae.encode(video), atol=0.02)


def test_another_run_in_the_folder_is_refused(tmp_path, distilled):
    distilled(tmp_path, regression=1, consistency=0, matching=0)
    with pytest.raises(RequestError, match=r"holds a run with rank 2, and this one has 3"):
        distilled(tmp_path, regression=1, consistency=0, matching=0, rank=3)
    with pytest.raises(RequestError, match="prompts"):
        distilled(tmp_path, regression=1, consistency=0, matching=0, prompts=PROMPTS[1:5])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"walk": 5}, "walk is 5; it must be a multiple of steps, 2: take 4"),
        ({"steps": 0}, "steps is 0"),
        ({"rank": 0}, "rank is 0"),
        ({"consistency": -1}, "consistency is -1"),
        ({"learning_rate": 0.0}, "learning rate is 0.0"),
        ({"flow_shift": 0.0}, "flow shift is 0.0"),
        ({"guidance_scale": -1.0}, "guidance is -1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, told):
    with pytest.raises(RequestError, match=told):
        settings(**changes)


def test_models_that_cannot_be_distilled_are_refused():
    with pytest.raises(RequestError, match="makes videos from images.*wan2.1-t2v-1.3b"):
        refuse_unfit(KNOWN_MODELS["wan2.1-i2v-14b-480p"], "")
    with pytest.raises(RequestError, match="give --expert high, and in another run --expert low"):
        refuse_unfit(KNOWN_MODELS["wan2.2-t2v-a14b"], "")
    with pytest.raises(RequestError, match="has one transformer"):
        refuse_unfit(KNOWN_MODELS["wan2.1-t2v-14b"], "low")
    refuse_unfit(KNOWN_MODELS["wan2.2-ti2v-5b"], "")
    refuse_unfit(KNOWN_MODELS["wan2.2-t2v-a14b"], "low")


# Two experts


def test_each_expert_owns_the_phases_that_begin_at_its_levels():
    halves = {
        expert: settings(steps=4, walk=8, flow_shift=5.0, expert=expert, boundary=0.875) for expert in ("high", "low")
    }
    assert (halves["high"].own, halves["low"].own) == (range(2), range(2, 4))
    with pytest.raises(RequestError, match="none of 1 steps begins at the low-noise expert's levels"):
        settings(steps=1, expert="low", boundary=0.875)


@torch.no_grad()
def test_each_level_has_its_own_teacher(batch):
    clips, _, text, negative = batch
    torch.manual_seed(1)
    high, low = WanTransformer(TINY).eval(), WanTransformer(TINY).eval()
    levels = level(0.9, 0.875, 0.3)
    wanted = [distill.predicted(high, clips, levels, text)[:2], distill.predicted(low, clips, levels, text)[2:]]
    roles = Roles(high, guidance_scale=3.0, rank=2, seed=0, beside=distill.Expert(low, 0.0, 0.875, 5.0))
    assert torch.allclose(roles.flow("teacher", clips, levels, text), torch.cat(wanted), atol=1e-5)
    with_text, without = (roles.flow("teacher", clips, levels, words) for words in (text, negative))
    scale = distill.like(level(3.0, 3.0, 5.0), clips)
    guided = roles.guided(clips, levels, text, negative)
    assert torch.allclose(guided, without + scale * (with_text - without), atol=1e-5)


@pytest.mark.parametrize("expert", ["high", "low"])
def test_an_expert_is_distilled_beside_the_other(tmp_path, distilled, expert):
    path, _ = distilled(tmp_path, expert=expert, boundary=0.875, two=True)
    assert path.name == f"few_step_2-{expert}_noise.safetensors"
    assert parse(f"few-step:{path}").lora._experts(two=True) == (expert,)
    assert any(tensor.any() for name, tensor in load_file(path).items() if "lora_B" in name)


def test_prompts_come_from_a_file_or_the_world(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n  two \n")
    assert read_prompts(file) == ["one", "two"]
    with pytest.raises(RequestError, match="needs prompts"):
        world(KNOWN_MODELS["wan2.1-t2v-1.3b"], 1)
    file.write_text("\n")
    with pytest.raises(RequestError, match="holds no prompt"):
        read_prompts(file)
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(RequestError, match="cannot be read as text"):
        read_prompts(file)
    with pytest.raises(RequestError, match="none.txt' cannot be read as text: No such file or directory; give"):
        read_prompts(tmp_path / "none.txt")


def test_prompts_may_be_the_captions_of_clips(tmp_path):
    for number, caption in enumerate(("a cat", "a dog")):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(caption)
    assert read_prompts(tmp_path) == ["a cat", "a dog"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="nothing in"):
        read_prompts(tmp_path / "empty")


def test_the_file_may_have_other_programs_names(tmp_path, distilled):
    plain, _ = distilled(tmp_path / "plain", regression=1, consistency=0, matching=0)
    path, _ = distilled(tmp_path / "comfyui", regression=1, consistency=0, matching=0, format="comfyui")
    name = "diffusion_model.blocks.0.self_attn.q.lora_B.weight"
    assert torch.equal(load_file(path)[name], load_file(plain)["transformer.blocks.0.attn1.to_q.lora_B.weight"])
    assert parse(f"few-step:{path}").schedule()[0] == parse(f"few-step:{plain}").schedule()[0]
    with pytest.raises(RequestError, match="format is 'a1111'"):
        settings(format="a1111")


def test_the_command_tells_a_users_mistake_in_a_line(tmp_path, capsys):
    assert main(["train", "distill", str(tmp_path / "none.txt"), "--out", str(tmp_path / "out")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_makes_a_student(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
    words = "--steps 2 --walk 2 --batch 2 --regression 1 --consistency 1 --width 32 --height 32 --frames 5 --device cpu"
    out = tmp_path / "out"
    assert main(["train", "distill", str(tmp_path / "prompts.txt"), "--out", str(out), *words.split()]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {
        "lora": str(out / "few_step_2.safetensors"),
        "bytes": (out / "few_step_2.safetensors").stat().st_size,
    }
    kept = json.loads((out / "run.json").read_text())
    own = POCKET.defaults
    assert (kept["rank"], kept["base"]) == (10, "pocket")
    assert (kept["guidance_scale"], kept["flow_shift"]) == (own.guidance_scale, own.flow_shift)
