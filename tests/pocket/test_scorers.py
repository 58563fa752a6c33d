"""The scorers that come with the package, on held-out scenes; larger numbers are in benchmarks/pocket_scorers.jsonl."""

import random

import pytest
import torch

from swiftwan.pocket.scenes import Scene, Thing, sample_scenes
from swiftwan.pocket.scorers import FILE, TEXT_WORDS, PocketScorers, load_scorers, shrunk, words_of
from swiftwan.pocket.world import draw
from swiftwan.train.pocket_scorers import CHANGES, DISTORTIONS, changed

CPU = torch.device("cpu")


def frames_of(scene: Scene, seed: int) -> torch.Tensor:
    drawn = draw([scene], seed, num_frames=3)[0]
    return ((drawn + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)


@pytest.fixture(scope="module")
def scorers() -> PocketScorers:
    return load_scorers(CPU)


@pytest.fixture(scope="module")
def clips() -> list[tuple[Scene, torch.Tensor]]:
    return [(scene, frames_of(scene, 900 + i)) for i, scene in enumerate(sample_scenes(24, 31, "held-out"))]


def test_they_are_small() -> None:
    assert FILE.stat().st_size < 1_500_000


def test_the_longest_prompt_fits() -> None:
    thing = Thing("orange", "triangle", "stays still", "small")
    words = words_of([Scene((thing, Thing("yellow", "square", "moves right", "large")), "sunset")])
    assert words.shape == (1, TEXT_WORDS)
    assert words[0, -1] == 0


@pytest.mark.parametrize("what", [change for change in CHANGES if change != "size"])
def test_the_right_prompt_scores_higher_than_one_with_a_word_changed(scorers, clips, what) -> None:
    chance = random.Random(1)
    pairs = [(frames, scene, changed(scene, what, chance)) for scene, frames in clips]
    right = [
        scorers.clip_score(frames, scene) > scorers.clip_score(frames, wrong)
        for frames, scene, wrong in pairs
        if wrong is not None
    ]
    assert len(right) > 3
    assert sum(right) / len(right) > 0.9


@pytest.mark.parametrize("kind", DISTORTIONS)
def test_a_stronger_distortion_is_farther(scorers, clips, kind) -> None:
    generator = torch.Generator().manual_seed(0)
    in_order = []
    for _, frames in clips[:6]:
        pictures = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
        far = []
        for degree in (0.05, 0.2, 0.8):
            worse = ((DISTORTIONS[kind](pictures, degree, generator) + 1) * 127.5).clamp(0, 255).to(torch.uint8)
            far.append(scorers.distance(worse.permute(0, 2, 3, 1), frames))
        in_order += [far[0] < far[1], far[1] < far[2]]
    assert sum(in_order) / len(in_order) > 0.9


def test_equal_frames_are_0_apart_and_unrelated_scenes_about_1(scorers, clips) -> None:
    frames = [frames for _, frames in clips]
    assert scorers.distance(frames[0], frames[0]) == 0
    apart = [scorers.distance(a, b) for a, b in zip(frames, frames[1:], strict=False)]
    assert 0.5 < sum(apart) / len(apart) < 2
    assert scorers.temporal(frames[0].repeat_interleave(2, dim=0)) < scorers.temporal(torch.cat((frames[0], frames[1])))


def test_a_score_is_a_mean_of_cosines_over_frames(scorers, clips) -> None:
    scene, frames = clips[0]
    each = [scorers.clip_score(frame[None], scene) for frame in frames]
    assert scorers.clip_score(frames, scene) == pytest.approx(sum(each) / len(each), abs=1e-5)
    assert -1 <= min(each) <= max(each) <= 1


def test_pictures_of_any_size_are_seen_at_the_worlds() -> None:
    assert shrunk(torch.zeros(1, 3, 256, 512)).shape == (1, 3, 128, 256)
    assert shrunk(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 128, 128)
