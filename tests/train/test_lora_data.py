"""What a LoRA run refuses, and what becomes of data and cache that changed."""

import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tests.train.conftest import SMALL, rows, same, write_clips

from swiftwan.errors import OutputError, RequestError
from swiftwan.train.lora import train


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
        ({"clip": -1.0}, "clip is -1.0; it must be above 0"),
        ({"shift": float("inf")}, "shift is inf"),
        ({"batch_tokens": -5}, "batch_tokens is -5; it must be at least 0"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_settings_that_cannot_be_met(clips, tmp_path, engine, changes, told):
    with pytest.raises(RequestError, match=told):
        train(engine, str(clips), tmp_path, replace(SMALL, **changes))
    assert not (tmp_path / "run.json").exists()
    assert not (tmp_path / "cache").exists()  # told before anything is encoded


def test_a_run_s_folder_that_cannot_be_made(clips, tmp_path, engine):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot hold a run: .*; give another --out"):
        train(engine, str(clips), tmp_path / "file" / "run", SMALL)


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
