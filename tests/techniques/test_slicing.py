import pytest
import torch

import swiftwan as sw
from swiftwan.device import pick_device
from swiftwan.errors import PlanError
from swiftwan.ops.attention import sdpa
from swiftwan.plan import make_plan, parse
from swiftwan.techniques.slicing import Sliced

REQUEST = sw.TextToVideo("a red circle moves left over a blue background", seed=1, num_inference_steps=2, num_frames=5)


@pytest.mark.parametrize("size", [1, 7, 20, 64])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_slices_are_the_whole(size, dtype, limit):
    q, k, v = (torch.randn(2, 20, 3, 8, dtype=dtype) for _ in range(3))
    seen = []

    def attend(q, k, v):
        seen.append((q.shape[1], k.shape[1]))
        return sdpa(q, k, v)

    sliced = Sliced(attend, size)(q, k, v)
    assert (sliced.float() - sdpa(q, k, v).float()).abs().max() <= limit
    assert max(count for count, _ in seen) <= size
    assert sum(count for count, _ in seen) == 20
    assert {keys for _, keys in seen} == {20}


def test_a_run_stays_the_same():
    def latents(*plan):
        return sw.Engine.load("pocket", plan=plan, device="cpu", dtype="fp32").run(REQUEST).latents

    plain, sliced = latents(), latents("attention-slicing:size=50")
    assert (sliced - plain).norm() / plain.norm() < 1e-5


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        (["attention-slicing:size=0"], "size is 0; it is a number of queries, 1 or more"),
        (["attention-slicing:size=many"], "size is 'many'; it must be a whole number"),
        (["attention-slicing:sise=2"], "Did you mean 'size'"),
        (["attention-slicing", "sparse-attention"], "both decide blocks of transformer.self-attention"),
    ],
)
def test_bad_plans_say_what_and_how(specs, words):
    with pytest.raises(PlanError, match=words):
        make_plan(specs, pick_device("cpu"))


def test_what_it_does_not_save_is_said():
    assert "flash, cudnn do not" in parse("attention-slicing").reason
