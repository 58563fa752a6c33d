import pytest
import torch

import swiftwan as sw
from swiftwan.device import pick_device
from swiftwan.errors import PlanError
from swiftwan.plan import make_plan
from swiftwan.techniques.caches import DeepCache, EarlyBlocksCached, StepsCached

REQUEST = sw.TextToVideo("a red circle moves left over a blue background", seed=1, num_inference_steps=6, num_frames=5)


def run(*plan):
    return sw.Engine.load("pocket", plan=list(plan), device="cpu", dtype="fp32").run(REQUEST).latents


@pytest.fixture(scope="module")
def plain():
    return run()


def distance(one, other):
    return ((one - other).norm() / other.norm()).item()


class Blocks:
    """Blocks that add a number, and a record of which ran."""

    def __init__(self, *adds):
        self.adds, self.ran = adds, []

    def __call__(self, number, x):
        self.ran.append(number)
        return x + self.adds[number]


class Branch:
    """Stands for a guidance branch's condition."""

    def __init__(self, calls=0):
        self.calls = calls


def test_early_blocks_run_every_other_step_and_branches_do_not_mix():
    walk, one, other = EarlyBlocksCached(2, 2), Branch(), Branch()
    blocks = Blocks(1.0, 2.0, 4.0)
    for branch in (one, other, one, other, one):
        assert walk(blocks, 3, torch.zeros(1), branch).item() == 7
    assert blocks.ran == [0, 1, 2, 0, 1, 2, 2, 2, 0, 1, 2]


def test_a_step_like_the_one_before_is_skipped_but_for_the_ends():
    walk, branch = StepsCached(0.1, first=2, last=1), Branch(calls=6)
    blocks = Blocks(1.0, 2.0, 4.0)
    assert [walk(blocks, 3, torch.zeros(1), branch).item() for _ in range(6)] == [7] * 6
    assert blocks.ran == [0, 1, 2] * 2 + [0] * 3 + [0, 1, 2]


def test_differences_add_up_until_a_step_is_computed():
    walk, branch, ran = StepsCached(0.1, first=1, last=0), Branch(), []
    for step in range(8):
        blocks = Blocks(1.0 + 0.04 * step, 2.0)
        walk(blocks, 2, torch.zeros(1), branch)
        ran.append(len(blocks.ran))
    assert ran == [2, 1, 2, 1, 2, 1, 2, 1]  # 0.04, then 0.04 + 0.08 > 0.1; afterwards against the newer step


@pytest.mark.parametrize("spec", ["deepcache:interval=1", "step-cache:threshold=0"])
def test_nothing_skipped_is_the_plain_run(spec, plain):
    assert distance(run(spec.replace("interval=1", "interval=1,block-num=3")), plain) < 1e-5


def test_skipping_changes_the_run_and_more_of_it_changes_more(plain):
    assert 1e-4 < distance(run("deepcache:interval=2,block-num=1"), plain) < 2
    near, far = (distance(run(f"step-cache:threshold={t},first=1"), plain) for t in (0.01, 2))
    assert near < far


def test_guidance_in_one_batch_caches_alike(plain):
    one = run("deepcache:interval=2,block-num=3")
    assert distance(run("deepcache:interval=2,block-num=3", "batched-cfg"), one) < 1e-4


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        (["deepcache:interval=0"], "interval is 0"),
        (["deepcache:block-num=-1"], "block-num is -1"),
        (["step-cache:threshold=-1"], "threshold is -1"),
        (["step-cache:first=-1"], "first is -1"),
        (["step-cache", "deepcache"], "both decide schedule of blocks"),
    ],
)
def test_bad_plans_say_what_and_how(specs, words):
    with pytest.raises(PlanError, match=words):
        make_plan(specs, pick_device("cpu"))


def test_more_cached_blocks_than_there_are_is_told():
    with pytest.raises(PlanError, match="block-num is 7, and 'pocket' has 7 blocks; take fewer"):
        sw.explain("pocket", REQUEST, plan=["deepcache:block-num=7"], device="cpu")


@pytest.mark.parametrize(("layers", "cached"), [(7, 2), (30, 10), (40, 13), (2, 1)])
def test_a_third_of_the_blocks_is_cached_unless_said(layers, cached):
    assert DeepCache().blocks_of(layers) == cached
    assert DeepCache(block_num=5).blocks_of(layers) == 5
