import pytest
import torch

import swiftwan as sw
from swiftwan.device import pick_device
from swiftwan.errors import PlanError
from swiftwan.guidance import Mode, When
from swiftwan.models.dit import Opening, SelfAttention, WanTransformer
from swiftwan.plan import make_plan

REQUEST = sw.TextToVideo("a red circle moves left over a blue background", seed=1, num_inference_steps=6, num_frames=5)
B, R, A = Mode.BOTH, Mode.REUSE, Mode.ALONE


@pytest.fixture
def forwards(monkeypatch):
    """How many prompts each forward of a transformer served."""
    seen = []
    forward = WanTransformer.forward

    def count(self, latents, timestep, condition, *opening):
        seen.append(len(condition.memories[0].key))
        return forward(self, latents, timestep, condition, *opening)

    monkeypatch.setattr(WanTransformer, "forward", count)
    return seen


def run(*plan):
    return sw.Engine.load("pocket", plan=list(plan), device="cpu", dtype="fp32").run(REQUEST).latents


@pytest.fixture(scope="module")
def plain():
    return run()


def distance(one, other):
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize(
    ("when", "modes"),
    [
        (When(), [B, B, B, B, B]),
        (When(low=0.3, high=0.9), [A, B, B, B, A]),
        (When(every=2), [B, R, B, R, B]),
        (When(every=2, first=2), [B, B, B, R, B]),
        (When(every=3, high=0.9), [A, B, R, R, B]),
    ],
)
def test_modes_follow_noise_levels_and_counts(when, modes):
    assert when.modes([1000.0, 800.0, 600.0, 400.0, 200.0]) == modes


@pytest.mark.parametrize("more", [(), ("batched-cfg",)])
def test_work_left_out_is_not_done(forwards, more, plain):
    latents = run("cfg-skip:every=2,first=2", *more)
    assert 1e-4 < distance(latents, plain) < 0.5
    batched = bool(more)
    both = [2] if batched else [1, 1]
    assert forwards == [*both, *both, *both, 1, *both, 1]


def test_everything_guided_is_the_plain_run(plain, forwards):
    assert torch.equal(run("cfg-interval:from=0,to=1", "cfg-skip:every=1"), plain)
    assert len(forwards) == 12


@pytest.mark.parametrize(
    ("plan", "steps"), [((), 6), (("deepcache:block-num=3",), 3), (("step-cache:threshold=9,first=1,last=0",), 6)]
)
def test_both_predictions_share_the_first_self_attention(monkeypatch, plan, steps):
    calls, forward = [], SelfAttention.forward

    def look(self, *inputs):
        calls.append(self)
        return forward(self, *inputs)

    monkeypatch.setattr(SelfAttention, "forward", look)
    latents = run(*plan)
    assert calls.count(calls[0]) == steps
    calls.clear()
    monkeypatch.setattr(Opening, "once", lambda self, attend: attend())
    assert torch.equal(run(*plan), latents)
    assert calls.count(calls[0]) == 2 * steps


def test_outside_the_interval_one_prediction_does(plain, forwards):
    latents = run("cfg-interval:from=0.5,to=1")
    assert 6 < len(forwards) < 12
    assert distance(latents, plain) > 1e-4


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        (["cfg-interval:from=0.8,to=0.2"], "from 0.8 to 0.2"),
        (["cfg-interval:from=-1"], "from -1.0 to 0.9"),
        (["cfg-interval:form=0"], "Did you mean 'from'"),
        (["cfg-skip:every=0"], "every is 0"),
        (["cfg-skip:first=-1"], "first is -1"),
        (["cfg-skip", "cfg-skip:every=3"], "both decide guidance of reuse"),
    ],
)
def test_bad_options_say_what_and_how(specs, words):
    with pytest.raises(PlanError, match=words):
        make_plan(specs, pick_device("cpu"))


def test_an_interval_is_written_as_it_is_read():
    assert make_plan(["cfg-interval:from=0.2,to=0.8"], pick_device("cpu")).specs == ("cfg-interval:from=0.2,to=0.8",)
