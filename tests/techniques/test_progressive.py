import pytest
import torch
from PIL import Image

import swiftwan as sw
from swiftwan.device import pick_device
from swiftwan.errors import PlanError
from swiftwan.models.dit import WanTransformer
from swiftwan.plan import make_plan
from swiftwan.progressive import Progressive
from swiftwan.sampling import SCHEDULERS

PROMPT = "a red circle moves left over a blue background"
CPU = pick_device("cpu")


def request(**changes):
    return sw.TextToVideo(PROMPT, seed=1, num_frames=5, **({"num_inference_steps": 4} | changes))


@pytest.fixture
def sizes(monkeypatch):
    """Height and width of the latents of all forwards."""
    seen = []
    forward = WanTransformer.forward

    def look(self, latents, *others):
        seen.append(tuple(latents.shape[3:]))
        return forward(self, latents, *others)

    monkeypatch.setattr(WanTransformer, "forward", look)
    return seen


@pytest.mark.parametrize("size", [(16, 16), (12, 20), (15, 26)])
def test_shrunk_noise_is_white_and_keeps_the_low_frequencies(size):
    noise = torch.randn(1, 16, 9, *size)
    small = Progressive(0.5, 0.9).shrink(noise, 2)
    assert small.shape[3] % 2 == small.shape[4] % 2 == 0
    assert small.std(correction=0).item() == pytest.approx(1, abs=0.05)
    assert small.mean().item() == pytest.approx(0, abs=0.05)
    whole, part = noise.mean((3, 4)).flatten(), small.mean((3, 4)).flatten()
    assert torch.corrcoef(torch.stack((whole, part)))[0, 1] > 0.85


def test_enlarged_latents_stand_at_their_noise_level():
    clean, noise = torch.full((1, 2, 3, 4, 4), 5.0), torch.randn(1, 2, 3, 8, 8)
    large = Progressive(0.5, 0.9).enlarge(clean, noise, 0.25)
    assert torch.allclose(large, 0.75 * 5 + 0.25 * noise, atol=1e-5)


@pytest.mark.parametrize(("until", "count"), [(0.5, 2), (0.3, 3), (0.01, 3), (0.99, 1)])
def test_steps_above_the_level_are_small_and_the_last_never_is(until, count):
    assert Progressive(0.5, until).small_steps([1.0, 0.75, 0.5, 0.25]) == count


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_solver_changes_size_once(scheduler, sizes):
    engine = sw.Engine.load("pocket", plan=["progressive-resolution:until=0.9"], device="cpu", dtype="fp32")
    steps = []
    result = engine.run(request(scheduler=scheduler, guidance_scale=1.0), on_step=steps.append)
    assert result.frames.shape == (5, 128, 128, 3)
    assert torch.isfinite(result.latents).all()
    assert result.latents.std() > 0.1
    small = sizes.count((8, 8))
    assert sizes == [(8, 8)] * small + [(16, 16)] * (len(sizes) - small)
    assert 0 < small < len(sizes)
    told = [event for event in steps if event.phase == "denoise"]
    assert told[-1].step == told[-1].steps == len(sizes)


def test_no_small_step_is_the_plain_run(sizes):
    def latents(*plan):
        return sw.Engine.load("pocket", plan=plan, device="cpu", dtype="fp32").run(request(flow_shift=0.1)).latents

    # All noise levels behind the first lie under 0.25 with this shift; the first is 1.
    plain, small = latents(), latents("progressive-resolution:until=0.999,scale=0.75")
    assert sizes[8:] == [(12, 12)] * 2 + [(16, 16)] * 6
    assert plain.shape == small.shape


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("progressive-resolution:scale=1", "scale is 1.0; it is a share of a side, 0.25 to below 1"),
        ("progressive-resolution:scale=0.1", "scale is 0.1"),
        ("progressive-resolution:until=1", "until is 1.0; it is a noise level between 0 and 1"),
        ("progressive-resolution:untl=0.5", "no option 'untl'. Did you mean 'until'"),
        ("progressive-resolution:scale=half", "scale is 'half'; it must be a number"),
        ("progressive-resolution:0.5", "takes no value '0.5'"),
    ],
)
def test_bad_options_say_what_and_how(spec, words):
    with pytest.raises(PlanError, match=words):
        make_plan([spec], CPU)


def test_pixels_given_at_the_full_size_are_refused_before_loading():
    pixels = sw.ImageToVideo(PROMPT, image=Image.new("RGB", (128, 128)))
    with pytest.raises(PlanError, match="a ImageToVideo begins with pixels at the full size; take it for words alone"):
        sw.explain("pocket", pixels, plan=["progressive-resolution"], device="cpu")
