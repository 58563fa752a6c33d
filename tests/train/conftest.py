"""A folder of tiny clips of the pocket world, the pocket model to train beside, and a whole LoRA run of it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from swiftwan import media
from swiftwan.engine import Engine
from swiftwan.pocket.scenes import sample_scenes
from swiftwan.pocket.world import draw
from swiftwan.train.lora import train
from swiftwan.train.settings import Settings

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


def write_clips(folder: Path, count: int, *, frames: int = 9, seed: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    scenes = sample_scenes(count, seed)
    for i, (scene, clip) in enumerate(zip(scenes, draw(scenes, seed, frames, 64, 64), strict=True)):
        pixels = ((clip.permute(1, 2, 3, 0) + 1) * 127.5).round().byte()
        media.write(folder / f"clip{i}.mp4", pixels, fps=16, record={"request": {}})
        (folder / f"clip{i}.txt").write_text(scene.prompt)
    return folder


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clips of 64x64 with 9 frames at 16 a second; do not change them."""
    return write_clips(tmp_path_factory.mktemp("clips"), 5)


@pytest.fixture
def engine() -> Engine:
    """Fresh: training changes it."""
    return Engine.load("pocket", plan=[], device="cpu", dtype="fp32")


@pytest.fixture(scope="session")
def whole(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run with SMALL; do not change it."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(Engine.load("pocket", plan=[], device="cpu", dtype="fp32"), str(clips), out, SMALL)
    return out


def rows(out: Path) -> list[dict[str, float]]:
    """Of a run's log."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def same(one: Path, other: Path) -> bool:
    """Whether two runs delivered the same to the bit."""
    ours, theirs = load_file(one / "lora.safetensors"), load_file(other / "lora.safetensors")
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
