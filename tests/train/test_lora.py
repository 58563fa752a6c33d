"""A whole LoRA run on the pocket model: learning, stopping anywhere, output, and what is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import swiftwan.pocket
from swiftwan.engine import Engine
from swiftwan.errors import OutputError, RequestError, SwiftwanError, UnavailableError
from swiftwan.models.config import POCKET
from swiftwan.models.dit import WanTransformer
from swiftwan.pipelines.request import TextToVideo
from swiftwan.train import adapter
from swiftwan.train.checkpoint import KEPT, Checkpoints
from swiftwan.train.lora import trackers, train
from swiftwan.train.settings import Settings
from swiftwan.weights.lora import LoraFile

SMALL = Settings(
    steps=6,
    rank=2,
    targets=("self", "ffn-out"),
    frames=9,
    learning_rate=3e-3,
    warmup=1,
    held_out=0.2,
    ema=0.9,
    validate_every=3,
    checkpoint_every=2,
)
ARGUMENTS = [
    "--steps",
    "6",
    "--rank",
    "2",
    "--targets",
    "self,ffn-out",
    "--frames",
    "9",
    "--learning-rate",
    "3e-3",
    "--warmup",
    "1",
    "--held-out",
    "0.2",
    "--ema",
    "0.9",
    "--validate-every",
    "3",
    "--checkpoint-every",
    "2",
    "--device",
    "cpu",
    "--dtype",
    "fp32",
]


@pytest.fixture(scope="module")
def whole(clips, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(Engine.load("pocket", plan=[], device="cpu", dtype="fp32"), str(clips), out, SMALL)
    return out


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def without_times(out):
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows(out)]


def same(one, other):
    ours, theirs = load_file(one / "lora.safetensors"), load_file(other / "lora.safetensors")
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_s_folder(whole):
    assert {path.name for path in whole.iterdir()} >= {
        "run.json",
        "data.txt",
        "log.jsonl",
        "loss.svg",
        "lora.safetensors",
    }
    assert "4 items of" in (whole / "data.txt").read_text()
    assert [row["step"] for row in rows(whole)] == [0, 3, 6, 6]
    losses = [row["held_out"] for row in rows(whole) if "held_out" in row]
    assert losses[0] != losses[-1]
    assert len(Checkpoints(whole / "checkpoints").paths()) == KEPT
    assert (whole / "loss.svg").read_text().count("<polyline") == 2


def test_training_lowers_the_loss_on_what_it_sees(clips, tmp_path, engine):
    settings = replace(SMALL, steps=40, held_out=0.0, drop_caption=0.0, accumulate=4, rank=8, targets=("all",))
    engine.parts.transformer.proj_out.bias += 0.3  # a fault that the adapter can mend
    train(engine, str(clips), tmp_path, settings)
    losses = [row["loss"] for row in rows(tmp_path) if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]


# Stopping


@pytest.mark.parametrize("step", [1, 5])
def test_a_run_that_was_killed_goes_on_to_the_bit(clips, tmp_path, whole, step):
    command = [sys.executable, "-c", "from swiftwan.cli import main; raise SystemExit(main())"]
    killer = (
        "import os, signal; from swiftwan.train.run import Run; update = Run.update\n"
        "def killed(run):\n"
        f"    if run.step == {step}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    update(run)\n"
        "Run.update = killed\n"
    )
    command[2] = killer + command[2]
    arguments = ["train", "lora", str(clips), "--out", str(tmp_path), *ARGUMENTS]
    # Warnings of a child are not this test's.
    ended = subprocess.run([*command, *arguments], env={**os.environ, "PYTHONWARNINGS": "ignore"}, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert not (tmp_path / "lora.safetensors").exists()
    train(Engine.load("pocket", plan=[], device="cpu", dtype="fp32"), str(clips), tmp_path, SMALL)
    assert same(tmp_path, whole)
    resumed = [row for row in without_times(tmp_path) if "held_out" in row]
    assert resumed == [row for row in without_times(whole) if "held_out" in row]


def test_a_checkpoint_is_the_whole_state_with_eight_bit_adam_too(clips, tmp_path):
    settings = replace(SMALL, optimizer="adamw8bit", rank=32, targets=("ffn",))
    for out, stops in (("whole", (6,)), ("parts", (4, 6))):
        for steps in stops:
            engine = Engine.load("pocket", plan=[], device="cpu", dtype="fp32")
            stopped = replace(settings, steps=6)
            if steps < 6:
                with pytest.raises(KeyboardInterrupt):
                    train(engine, str(clips), tmp_path / out, stopped, on_step=interrupt_at(steps))
            else:
                train(engine, str(clips), tmp_path / out, stopped)
    assert same(tmp_path / "whole", tmp_path / "parts")


def interrupt_at(step):
    def on_step(phase, done, of):
        if (phase, done) == ("train", step + 1):
            raise KeyboardInterrupt

    return on_step


def test_a_full_disk_keeps_the_last_good_checkpoint(clips, tmp_path, engine, monkeypatch):
    from swiftwan.train import checkpoint

    written = []
    save_file = checkpoint.save_file

    def full(tensors, path, **options):
        if written:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        written.append(path)
        save_file(tensors, path, **options)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OutputError, match=r"step 4 cannot be written: .*No space.*step-00000002.*same command"):
        train(engine, str(clips), tmp_path, SMALL)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002.safetensors"]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(whole, tmp_path, caplog):
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    newest = checkpoints.paths()[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    assert checkpoints.latest().step == 4
    assert "is damaged and not used" in caplog.text


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(clips, tmp_path, engine, monkeypatch):
    from swiftwan.train import flow

    real, calls = flow.loss, []

    def broken(*arguments):
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(flow, "loss", broken)
    settings = replace(SMALL, held_out=0.0)
    with pytest.raises(SwiftwanError, match=r"not finite from step 4 on.*last good checkpoint is .*step-00000002"):
        train(engine, str(clips), tmp_path, settings)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002.safetensors"]
    assert not (tmp_path / "lora.safetensors").exists()


# Output


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


# What is refused


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rank": 1000}, "rank is 1000, and attn1.to_q is 256 wide"),
        ({"rank": 0}, "rank is 0"),
        ({"targets": ("selfish",)}, "target 'selfish' is unknown. Did you mean 'self'"),
        ({"experts": "high"}, "'pocket' has one transformer; leave out --experts high"),
        ({"format": "a1111"}, "format is 'a1111'"),
        ({"frames": 10}, "frames is 10"),
        ({"frames": 81}, "nothing to train on; .*too short: 9 frames at 16 a second; the shortest item has 21"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_settings_that_cannot_be_met(clips, tmp_path, engine, changes, told):
    with pytest.raises(RequestError, match=told):
        train(engine, str(clips), tmp_path, replace(SMALL, **changes))
    assert not (tmp_path / "run.json").exists()


def test_a_folder_holds_one_run(clips, tmp_path, whole, engine):
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(RequestError, match=r"holds a run with rank 2 \(now 3\)"):
        train(engine, str(clips), tmp_path / "run", replace(SMALL, rank=3))
    changed = shutil.copytree(clips, tmp_path / "data")
    (changed / "clip0.txt").write_text("other words")
    with pytest.raises(RequestError, match="the data changed since the run in .* began"):
        train(engine, str(changed), tmp_path / "run", SMALL)
    assert same(tmp_path / "run", whole)


def test_another_model_s_cache_is_refused(clips, tmp_path, whole, engine):
    with torch.no_grad():
        engine.parts.vae.quant_conv.weight[0, 0] += 1
    with pytest.raises(RequestError, match=r"is a cache of 'pocket', not of 'pocket' as it is loaded; give another"):
        train(engine, str(clips), tmp_path, SMALL, cache=whole / "cache")


def test_a_changed_clip_is_encoded_again_and_the_others_are_not(clips, tmp_path, whole, engine):
    from tests.train.conftest import write_clips

    data = shutil.copytree(clips, tmp_path / "data")
    cache = shutil.copytree(whole / "cache", tmp_path / "cache")
    shutil.copy(write_clips(tmp_path / "other", 1, seed=99) / "clip0.mp4", data / "clip2.mp4")
    encoded = []
    train(
        engine, str(data), tmp_path / "out", replace(SMALL, steps=1), cache=cache, on_step=lambda *s: encoded.append(s)
    )
    assert [step for step in encoded if step[0] == "encode"] == [("encode", 1, 1)]


def test_a_damaged_cache_is_made_again(clips, tmp_path, whole, engine, caplog):
    cache = shutil.copytree(whole / "cache", tmp_path / "cache")
    (shard,) = cache.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-50])
    train(engine, str(clips), tmp_path / "out", SMALL, cache=cache)
    assert "encoded again" in caplog.text
    assert same(tmp_path / "out", whole)


def test_stills_and_clips_train_together_in_batches(clips, tmp_path, engine):
    data = shutil.copytree(clips, tmp_path / "data")
    for i, colour in enumerate(("red", "blue", "green")):
        Image.new("RGB", (64, 64), colour).save(data / f"still{i}.png")
        (data / f"still{i}.txt").write_text(f"a {colour} picture")
    settings = replace(SMALL, steps=3, batch_tokens=48, first_frame=0.5, timesteps="uniform", weighting="bell")
    train(engine, str(data), tmp_path / "out", settings)
    assert "64x64x1: " in (tmp_path / "out" / "data.txt").read_text()
    assert torch.isfinite(torch.tensor([row["loss"] for row in rows(tmp_path / "out") if "loss" in row])).all()


# Where the log goes


def test_tensorboard_gets_every_row(tmp_path):
    pytest.importorskip("tensorboard")
    (tracker,) = trackers(["tensorboard"], tmp_path / "run")
    tracker.log({"loss": 0.5}, step=3)
    tracker.finish()
    (events,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    assert b"loss" in events.read_bytes()


def test_a_tracker_without_its_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(UnavailableError, match="logging to wandb needs its package: pip install wandb"):
        trackers(["wandb"], tmp_path)
