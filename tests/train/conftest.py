"""A folder of tiny clips of the pocket world, and the pocket model to train beside."""

from pathlib import Path

import pytest

from swiftwan import media
from swiftwan.engine import Engine
from swiftwan.pocket.world import draw, sample_scenes


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
