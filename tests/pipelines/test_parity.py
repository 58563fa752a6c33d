"""Whole runs against diffusers' WanPipeline: the same tiny random checkpoint, prompt, seed and settings."""

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import UMT5Config, UMT5EncoderModel

import swiftwan as sw
from swiftwan.train.pocket_tokenizer import build

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SOLVERS = {
    "unipc": lambda shift: UniPCMultistepScheduler(flow_shift=shift, **FLOW),
    "euler": lambda shift: FlowMatchEulerDiscreteScheduler(shift=shift),
    "dpm++": lambda shift: DPMSolverMultistepScheduler(flow_shift=shift, **FLOW),
}


def transformer():
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        in_channels=16,
        out_channels=16,
    )


def pipeline(experts, **config):
    torch.manual_seed(0)
    tokenizer = build()
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=16, num_heads=2, d_ff=48, num_layers=2)
        ).eval(),
        vae=AutoencoderKLWan(base_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1).eval(),
        scheduler=SOLVERS["unipc"](3.0),
        transformer=transformer().eval(),
        transformer_2=transformer().eval() if experts == 2 else None,
        **config,
    )


@pytest.fixture(scope="module")
def one_expert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    peer = pipeline(1)
    peer.save_pretrained(folder, max_shard_size="60KB")
    return peer, sw.Engine.load(str(folder), plan=[], device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def two_experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    peer = pipeline(2, boundary_ratio=0.9)
    peer.save_pretrained(folder)
    return peer, sw.Engine.load(str(folder), plan=[], device="cpu", dtype="fp32")


def both(pair, request, solver="unipc"):
    peer, engine = pair
    peer.scheduler = SOLVERS[solver](request.flow_shift)
    peer.set_progress_bar_config(disable=True)
    expected = {}
    settings = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "width": request.width,
        "height": request.height,
        "num_frames": request.num_frames,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "guidance_scale_2": request.guidance_scale_2,
    }
    for kind in ("latent", "pt"):
        generator = torch.Generator("cpu").manual_seed(request.seed)
        expected[kind] = peer(**settings, generator=generator, output_type=kind).frames
    return expected, engine.run(request)


def request(**changes):
    values = {
        "negative_prompt": "blurry",
        "width": 48,
        "height": 32,
        "num_frames": 9,
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
        "flow_shift": 3.0,
        "seed": 11,
    }
    return sw.TextToVideo("a red circle moves left", **values | changes)


def assert_equal(expected, result):
    error = ((result.latents - expected["latent"]).norm() / expected["latent"].norm()).item()
    assert error < 1e-3, f"latents differ by {error:.1e}"
    frames = (expected["pt"][0] * 255).round().permute(0, 2, 3, 1)
    off = (result.frames.float() - frames).abs()
    assert off.max() <= 2
    assert off.mean() < 0.05


@pytest.mark.parametrize("solver", SOLVERS)
def test_each_solver_equals_diffusers(one_expert, solver):
    expected, result = both(one_expert, request(scheduler=solver), solver)
    assert_equal(expected, result)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_frames": 1},
        {"width": 80, "height": 16, "num_frames": 13},  # odd counts of patches
        {"guidance_scale": 1.0},
        {"negative_prompt": ""},
        {"flow_shift": 8.0, "num_inference_steps": 7},
    ],
    ids=str,
)
def test_shapes_and_settings_equal_diffusers(one_expert, changes):
    expected, result = both(one_expert, request(**changes))
    assert_equal(expected, result)


def test_two_experts_across_the_boundary_equal_diffusers(two_experts):
    asked = request(guidance_scale=4.0, guidance_scale_2=3.0, num_inference_steps=6)
    expected, result = both(two_experts, asked)
    assert_equal(expected, result)
    alone = two_experts[1].run(request(guidance_scale=4.0, guidance_scale_2=1.0, num_inference_steps=6))
    assert not torch.equal(alone.latents, result.latents), "the second expert's guidance must matter"


def test_batched_guidance_is_exact(one_expert, tmp_path):
    peer, engine = one_expert
    peer.save_pretrained(tmp_path)
    batched = sw.Engine.load(str(tmp_path), plan=["batched-cfg"], device="cpu", dtype="fp32")
    asked = request(negative_prompt="a much longer negative prompt than the prompt itself is, of many words")
    a, b = engine.run(asked), batched.run(asked)
    assert ((a.latents - b.latents).norm() / a.latents.norm()).item() < 1e-5
    assert b.plan == ("batched-cfg",)


def test_the_same_request_gives_the_same_result(one_expert):
    first, second = (one_expert[1].run(request()) for _ in range(2))
    assert torch.equal(first.latents, second.latents)
    assert torch.equal(first.frames, second.frames)


def test_a_drawn_seed_is_recorded(one_expert):
    result = one_expert[1].run(request(seed=None))
    again = one_expert[1].run(result.request)
    assert torch.equal(result.latents, again.latents)


@pytest.mark.parametrize("scheduler", ["heun", "lcm"])
def test_the_other_solvers_run(one_expert, scheduler):
    result = one_expert[1].run(request(scheduler=scheduler, guidance_scale=1.0))
    assert result.frames.shape == (9, 32, 48, 3)
    assert result.latents.isfinite().all()
    assert len(result.step_seconds) == (7 if scheduler == "heun" else 4)


def test_events_tell_every_unit_of_work(one_expert):
    events = []
    one_expert[1].run(request(), on_step=events.append)
    assert [(e.phase, e.step, e.steps) for e in events] == [
        ("text", 1, 1),
        *(("denoise", k, 4) for k in range(1, 5)),
        *(("decode", k, 3) for k in range(1, 4)),
    ]


def test_steps_show_the_latents_they_leave_and_how_noisy_these_are(one_expert):
    events = []
    result = one_expert[1].run(request(), on_step=events.append)
    steps = [event for event in events if event.phase == "denoise"]
    timesteps = [event.timestep for event in steps]
    assert timesteps == sorted(timesteps, reverse=True)
    assert timesteps[-1] == 0
    assert torch.equal(steps[-1].latents.cpu(), result.latents)
    assert all(event.latents.shape == result.latents.shape for event in steps)
    assert all(event.latents is None for event in events if event.phase != "denoise")


def test_what_on_step_raises_ends_the_run(one_expert):
    def stop(event):
        if event.phase == "denoise":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one_expert[1].run(request(), on_step=stop)
