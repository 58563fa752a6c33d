"""What is refused before it is queued, by a plan's own memory."""

import pytest
import torch

import swiftwan as sw
from swiftwan.device import Device
from swiftwan.memory import WillNotFitError
from swiftwan.serve.jobs.admission import Admission

GPU = Device("cuda:0", "a GPU", 16 * 10**9, 16 * 10**9, (9, 0), 100, torch.bfloat16, "for the test")
REQUEST = sw.TextToVideo("a cat", width=832, height=480, num_frames=81)


def admission(*plan):
    return Admission("random:wan2.1-t2v-14b", list(plan), GPU)


def test_14b_does_not_fit_16_gb_as_it_is():
    with pytest.raises(WillNotFitError, match=r"the weights alone are 4\d\.\d GB.*--plan auto"):
        admission().check(REQUEST)


@pytest.mark.parametrize(
    "plan",
    [
        ["offload:blocks", "text-encoder:cpu"],
        ["offload:auto:budget=6", "text-encoder:cpu"],
        ["quantize:int4", "offload:model"],
        ["quantize:int4", "offload:blocks", "text-encoder:unload"],
    ],
)
def test_what_fits_by_its_plan_is_let_in(plan):
    explanation = admission(*plan).check(REQUEST)
    assert 5e9 < explanation.load.peak_bytes < 16e9


def test_the_clients_plan_counts_instead_of_the_servers():
    assert admission().check(REQUEST, ["offload:blocks", "text-encoder:cpu"]).plan.specs[0] == "offload:blocks"
    with pytest.raises(WillNotFitError):
        admission("offload:blocks", "text-encoder:cpu").check(REQUEST, [])


def test_what_is_too_large_for_its_plan_is_told_a_size_that_fits():
    plan = ["offload:blocks", "text-encoder:cpu"]
    with pytest.raises(WillNotFitError, match="; 960x544 should fit"):
        admission(*plan).check(sw.TextToVideo("a cat", width=1920, height=1088, num_frames=161))
