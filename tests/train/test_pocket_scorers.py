import random

import pytest
import torch

from swiftwan.pocket.scenes import Scene, Thing
from swiftwan.pocket.scorers import FILE, PocketScorers
from swiftwan.train.pocket_scorers import CHANGES, DISTORTIONS, MOMENTS, WRONG, changed, make_pool, train, wrong_scenes

CPU = torch.device("cpu")
RED, BLUE = Thing("red", "circle", "grows"), Thing("blue", "star", "spins", "large")


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr("swiftwan.train.pocket_scorers.GROUP", 2)


@pytest.fixture(scope="module")
def pool():
    return make_pool(16, 3, CPU)


def test_a_pool_has_clips_their_words_and_changes(pool) -> None:
    assert pool.pictures.shape == pool.others.shape == (16, MOMENTS, 3, 128, 128)
    assert pool.wrong.shape == (16, WRONG, pool.words.shape[1])
    assert not (pool.wrong == pool.words[:, None]).all(-1).any(), "a wrong prompt is never the right one"
    assert (pool.pictures != pool.others).flatten(1).any(1).all(), "a changed word shows"


def test_a_change_is_one_word_or_a_trade() -> None:
    chance = random.Random(0)
    scene = Scene((RED, BLUE), "pink")
    for what in CHANGES:
        for _ in range(20):
            other = changed(scene, what, chance)
            if other is None:
                assert what == "size"
                continue
            before, after = scene.prompt.split(), other.prompt.split()
            if what == "traded":
                assert sorted(before) == sorted(after)
                assert [thing.shape for thing in other.things] == ["star", "circle"]
            elif what != "size":
                assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
    assert changed(Scene((RED,), "pink"), "size", chance) is None, "a thing that grows has every size"
    assert changed(Scene((RED,), "pink"), "traded", chance) is None
    assert len(wrong_scenes(Scene((RED,), "pink"), 5, chance)) == 5


@pytest.mark.parametrize("kind", DISTORTIONS)
def test_distortions_grow_with_their_degree_in_pixels(kind) -> None:
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    x = torch.nn.functional.avg_pool2d(x, 5, 1, 2)
    far = []
    for degree in (0.1, 0.9):
        generator = torch.Generator().manual_seed(0)
        far.append((DISTORTIONS[kind](x, degree, generator) - x).square().mean().item())
    assert 0 < far[0] < far[1]


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, pool, monkeypatch) -> None:
    settings = {"batch": 8, "device": CPU, "seed": 1, "learning_rate": 1e-3}
    whole = train(tmp_path / "whole", pool, steps=3, **settings).state_dict()

    monkeypatch.setattr("swiftwan.train.pocket_scorers.SAVE_EVERY", 1)

    class Killed(BaseException):
        pass

    steps = []

    def kill(model, *arguments):
        steps.append(model)
        if len(steps) == 3:
            raise Killed
        return contrast(model, *arguments)

    from swiftwan.train.pocket_scorers import contrast

    with monkeypatch.context() as patch:
        patch.setattr("swiftwan.train.pocket_scorers.contrast", kill)
        with pytest.raises(Killed):
            train(tmp_path / "killed", pool, steps=3, **settings)
    resumed = train(tmp_path / "killed", pool, steps=3, **settings).state_dict()

    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0)


def test_the_command_writes_the_packages_file(tmp_path, capsys) -> None:
    from safetensors.torch import load_file

    from swiftwan.cli import main

    words = ["--steps", "2", "--batch", "4", "--clips", "34", "--device", "cpu"]
    assert main(["train", "pocket-scorers", "--out", str(tmp_path), *words]) == 0
    written = load_file(tmp_path / FILE.name)
    assert capsys.readouterr().out.strip() == str(tmp_path / FILE.name)
    assert {name: tuple(w.shape) for name, w in written.items()} == {
        name: tuple(w.shape) for name, w in PocketScorers().state_dict().items()
    }
    assert {weight.dtype for weight in written.values()} == {torch.float16}
