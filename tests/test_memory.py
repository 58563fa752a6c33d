"""What cannot fit is refused with what would, by few estimates."""

from dataclasses import replace

import pytest
import torch

import swiftwan as sw
from swiftwan.device import Device
from swiftwan.memory import WillNotFitError, refuse_what_cannot_fit, what_would_fit
from swiftwan.plan import Explanation, complete, describe, estimate, make_plan


def explained(request, gigabytes, plan=()):
    size = int(gigabytes * 1e9)
    device = Device("cuda:0", "a GPU", size, size, (9, 0), 100, torch.bfloat16, "for the test")
    facts = describe("random:wan2.1-t2v-1.3b")
    chosen = make_plan(list(plan), device, None, facts)
    full = complete(request, facts)
    return Explanation(facts, full, chosen, device, estimate(full, facts, chosen, size))


def test_the_frames_that_it_tells_fit_and_four_more_do_not():
    request = sw.TextToVideo("a cat", num_frames=1001)
    explanation = explained(request, 24)
    with pytest.raises(
        WillNotFitError, match=r"^will not fit: 832x480, 1001 frames take about \d+\.\d GB, and a GPU"
    ) as e:
        refuse_what_cannot_fit(explanation)
    frames = int(str(e.value).split("; ")[1].split()[0])
    assert frames % 4 == 1
    refuse_what_cannot_fit(explained(replace(request, num_frames=frames), 24))
    with pytest.raises(WillNotFitError):
        refuse_what_cannot_fit(explained(replace(request, num_frames=frames + 4), 24))


def test_a_tenth_is_left_to_the_estimate():
    request = sw.TextToVideo("a cat", num_frames=81)
    peak = explained(request, 1000).load.peak_bytes / 1e9
    refuse_what_cannot_fit(explained(request, peak / 1.09))
    with pytest.raises(WillNotFitError):
        refuse_what_cannot_fit(explained(request, peak / 1.11))
    with pytest.raises(WillNotFitError):
        refuse_what_cannot_fit(explained(request, peak / 1.01), slack=1)


def test_advice_takes_few_estimates():
    asked = []

    def fits(request):
        asked.append(request.num_frames)
        return request.num_frames <= 77

    explanation = explained(sw.TextToVideo("a cat", num_frames=100_001), 24)
    assert what_would_fit(explanation, fits).startswith("77 frames should fit")
    assert len(asked) < 20


def test_where_no_frames_fit_a_size_does_and_then_nothing():
    film, picture = explained(sw.TextToVideo("a cat"), 24), explained(sw.TextToImage("a cat"), 24)
    assert what_would_fit(film, lambda r: r.width <= 416).startswith("416x240 should fit")
    one = what_would_fit(film, lambda r: r.width <= 208 and r.num_frames == 1)
    assert one.startswith("208x112 and one frame should fit")
    assert what_would_fit(picture, lambda r: r.width <= 208).startswith("208x112 should fit")
    assert what_would_fit(film, lambda r: False).startswith("free memory on the device, or take a smaller model")


def test_weights_alone_that_do_not_fit_are_told():
    with pytest.raises(WillNotFitError, match=r"the weights alone are 14\.\d GB: take a smaller model, or --plan auto"):
        refuse_what_cannot_fit(explained(sw.TextToVideo("a cat"), 8))
