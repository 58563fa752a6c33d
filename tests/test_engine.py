"""The engine on the embedded model: what a new user meets first."""

from dataclasses import replace

import pytest
import torch

import swiftwan as sw
from swiftwan.errors import MemoryLimitError, OutputError, RequestError
from swiftwan.media import read_frames
from swiftwan.memory import WillNotFitError
from swiftwan.plan import complete
from swiftwan.pocket.judge import judge
from swiftwan.pocket.scenes import parse_prompt

PROMPT = "a red circle moves left over a blue background"


@pytest.fixture(scope="module")
def engine():
    return sw.Engine.load("pocket", device="cpu")


def test_the_embedded_model_shows_its_prompt(engine, tmp_path):
    result = engine.run(sw.TextToVideo(PROMPT, seed=7))
    verdict = judge(result.frames, parse_prompt(PROMPT))
    assert verdict.background, verdict.seen
    assert verdict.things[0].colour, verdict.seen
    assert verdict.things[0].motion, verdict.seen
    assert result.frames.shape == (33, 128, 128, 3)
    assert result.latents.shape == (1, 16, 9, 16, 16)
    assert set(result.seconds) == {"text", "denoise", "decode", "total"}
    assert len(result.step_seconds) == 20
    assert result.save(tmp_path / "out.mp4").stat().st_size > 2000


def test_like_repeats_the_bytes(tmp_path):
    from swiftwan.cli import main

    first, second = tmp_path / "a.mp4", tmp_path / "b.mp4"
    asked = ["generate", PROMPT, "--seed", "3", "--frames", "5", "--steps", "2", "--out", str(first)]
    assert main(asked) == 0
    assert main(["generate", "--like", str(first), "--out", str(second)]) == 0
    assert first.read_bytes() == second.read_bytes()


def test_a_picture(engine, tmp_path):
    result = engine.run(sw.TextToImage("a green star over a pink background", seed=1))
    assert result.frames.shape == (1, 128, 128, 3)
    assert result.save(tmp_path / "out.png").exists()


@pytest.mark.parametrize(("name", "frames"), [("beside.mp4", 33), ("beside.png", 1)])
def test_a_file_written_beside_the_decoder_is_the_one_that_save_writes(engine, tmp_path, name, frames):
    out = tmp_path / name
    request = sw.TextToVideo(PROMPT, seed=5, num_frames=frames, num_inference_steps=1)
    result = engine.run(request, out=out, quality=6)
    assert out.read_bytes() == result.save(tmp_path / f"after{out.suffix}", quality=6).read_bytes()
    assert read_frames(out).shape == result.frames.shape


def test_a_file_that_cannot_be_is_told_before_anything_runs(engine, tmp_path):
    steps = []
    request = sw.TextToVideo(PROMPT, seed=5, num_frames=5, num_inference_steps=1)
    with pytest.raises(OutputError, match="cannot hold 5 frames"):
        engine.run(request, out=tmp_path / "x.png", on_step=steps.append)
    assert steps == []


def test_a_run_that_is_ended_while_it_decodes_leaves_no_file(engine, tmp_path):
    def end(event):
        if event.phase == "decode" and event.step == 2:
            raise KeyboardInterrupt

    request = sw.TextToVideo(PROMPT, seed=5, num_frames=33, num_inference_steps=1)
    with pytest.raises(KeyboardInterrupt):
        engine.run(request, out=tmp_path / "x.mp4", on_step=end)
    assert list(tmp_path.iterdir()) == []


def test_run_many_yields_in_order(engine):
    requests = [sw.TextToVideo(PROMPT, seed=s, num_frames=5, num_inference_steps=2) for s in (1, 2)]
    assert [result.request.seed for result in engine.run_many(requests)] == [1, 2]


def test_a_long_prompt_says_what_would_be_cut(engine):
    with pytest.raises(RequestError, match="It would be cut before: '.*word.*Shorten it"):
        engine.run(sw.TextToVideo("word " * 600))


def test_out_of_memory_says_what_would_fit(engine, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("swiftwan.pipelines.generate.denoise", full)
    with pytest.raises(MemoryLimitError, match="64x64 should fit, or a plan") as problem:
        engine.run(sw.TextToVideo(PROMPT, seed=1))
    assert "\n" not in str(problem.value)
    assert problem.value.__cause__ is None
    monkeypatch.undo()
    assert engine.run(sw.TextToVideo(PROMPT, num_frames=5, num_inference_steps=1)).frames.shape[0] == 5


def test_what_no_memory_can_hold_is_refused_before_it_runs(engine):
    steps = []
    with pytest.raises(WillNotFitError, match=r"will not fit: 128x128, 1000001 frames take about .* frames should fit"):
        engine.run(sw.TextToVideo(PROMPT, num_frames=1_000_001), on_step=steps.append)
    assert steps == []


def test_a_text_encoder_that_is_not_needed_takes_no_room():
    request = sw.TextToVideo(PROMPT, seed=1, num_frames=5, num_inference_steps=1)
    engine = sw.Engine.load("pocket", plan=["prompt-cache:memory"], device="cpu")
    full = complete(request, engine.facts)
    needs = [engine._explain(full, new_prompt=new).load.peak_bytes for new in (True, False)]
    assert needs[0] > needs[1]
    roomy, engine.device = engine.device, replace(engine.device, total_bytes=int(sum(needs) / 2 / 1.1))
    with pytest.raises(WillNotFitError):
        engine.run(request)
    engine.device = roomy
    engine.run(request)
    small = sw.Engine.load("pocket", plan=["prompt-cache:memory"], device="cpu")
    small.parts.text.cache = engine.parts.text.cache
    small.device = replace(roomy, total_bytes=int(sum(needs) / 2 / 1.1))
    assert small.run(request).frames.shape[0] == 5
    assert not small.parts.text.is_loaded


def test_diffusers_runs_the_same_weights():
    from importlib.resources import files

    from diffusers import WanPipeline

    peer = WanPipeline.from_pretrained(str(files("swiftwan.pocket") / "model"), dtype=torch.float32)
    peer.set_progress_bar_config(disable=True)
    ours = sw.Engine.load("pocket", device="cpu", dtype="fp32").run(
        sw.TextToVideo(PROMPT, seed=3, num_inference_steps=3, num_frames=9)
    )
    expected = peer(
        PROMPT,
        width=128,
        height=128,
        num_frames=9,
        num_inference_steps=3,
        guidance_scale=ours.request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(3),
        output_type="latent",
    ).frames
    assert ((ours.latents - expected).norm() / expected.norm()).item() < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_shows_the_prompt_too(tmp_path):
    request = sw.TextToVideo(PROMPT, seed=7)
    result = sw.Engine.load("pocket", request=request).run(request, out=tmp_path / "beside.mp4")
    # Chunks that were handed on before their copy had ended would be other frames.
    assert (tmp_path / "beside.mp4").read_bytes() == result.save(tmp_path / "after.mp4").read_bytes()
    assert result.dtype == "bf16"
    assert judge(result.frames, parse_prompt(PROMPT)).background


def test_techniques_begin_before_weights_load_and_install_after(monkeypatch):
    from swiftwan import engine
    from swiftwan.techniques.caches import StepCache

    order = []
    build, install = engine.build, StepCache.install
    monkeypatch.setattr(StepCache, "begin", lambda self, device: order.append(f"begin on {device}"))
    monkeypatch.setattr(StepCache, "install", lambda self, parts: order.append("install") or install(self, parts))
    monkeypatch.setattr(engine, "build", lambda *given, **more: order.append("build") or build(*given, **more))
    sw.Engine.load("pocket", device="cpu", plan=["step-cache"])
    assert order == ["begin on cpu", "build", "install"]
