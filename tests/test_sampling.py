import pytest
import torch

from swiftwan.errors import RequestError
from swiftwan.models.config import KNOWN_MODELS
from swiftwan.sampling import REFUSED, SCHEDULERS, FewStep, check_scheduler, make_scheduler

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_sigmas_fall_from_one_to_zero(name, shift):
    sigmas = make_scheduler(name, num_inference_steps=6, flow_shift=shift, device=CPU).sigmas
    assert sigmas[0] == pytest.approx(1.0, abs=1e-3)
    assert sigmas[-1] == 0
    assert (sigmas.diff() <= 0).all()


@pytest.mark.parametrize("name", ["unipc", "dpm++"])
def test_the_shift_is_the_published_warp(name):
    plain = make_scheduler(name, num_inference_steps=8, flow_shift=1.0, device=CPU).sigmas[:-1]
    shifted = make_scheduler(name, num_inference_steps=8, flow_shift=4.0, device=CPU).sigmas[:-1]
    assert torch.allclose(shifted, 4 * plain / (1 + 3 * plain), atol=3e-3)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_constant_flow_ends_at_its_data(name):
    """With flow = noise - data everywhere, the exact solution at sigma 0 is the data."""
    data, noise = torch.randn(1, 4, 2, 3, 3), torch.randn(1, 4, 2, 3, 3)
    scheduler = make_scheduler(name, num_inference_steps=5, flow_shift=3.0, device=CPU)
    sample, start = noise, noise
    for index, timestep in enumerate(scheduler.timesteps):
        # The few-step solver draws new noise at each step; the flow towards the data follows it.
        sigma = scheduler.sigmas[index]
        flow = (sample - data) / sigma if name == "lcm" else start - data
        sample = scheduler.step(flow, timestep, sample, return_dict=False)[0]
    assert (sample - data).abs().max() < 5e-3  # unipc and dpm++ begin at sigma 0.9998, not at 1


@pytest.mark.parametrize("name", [*REFUSED, "DDIMScheduler", "euler-ancestral", "EulerAncestralDiscreteScheduler"])
def test_epsilon_schedulers_are_refused_with_the_reason(name):
    with pytest.raises(RequestError, match="the model predicts flow"):
        check_scheduler(name)


# Few steps

FEW = FewStep(4, "lcm", 5.0, (0.9, 0.7, 0.5, 0.2))


def test_fewer_steps_take_the_first_levels_and_more_take_even_ones():
    assert FEW.levels_for(4, 5.0) == FEW.levels
    assert FEW.levels_for(2, 5.0) == (0.9, 0.7)
    assert FEW.levels_for(5, 5.0) == pytest.approx([1, 5 * 0.8 / 4.2, 5 * 0.6 / 3.4, 5 * 0.4 / 2.6, 5 * 0.2 / 1.8])
    assert FEW.levels_for(4, 1.0) == pytest.approx([1, 0.75, 0.5, 0.25])


def test_a_distillation_changes_what_it_fixes_and_nothing_else():
    defaults = KNOWN_MODELS["wan2.2-t2v-a14b"].defaults
    changed = FEW.over(defaults)
    assert (changed.num_inference_steps, changed.scheduler, changed.flow_shift) == (4, "lcm", 5.0)
    assert (changed.guidance_scale, changed.guidance_scale_2) == (1.0, 1.0)
    assert FEW.over(KNOWN_MODELS["wan2.1-t2v-1.3b"].defaults).guidance_scale_2 is None
    assert (changed.width, changed.num_frames, changed.fps) == (defaults.width, defaults.num_frames, defaults.fps)


@pytest.mark.parametrize("name", ["euler", "lcm"])
def test_levels_are_where_the_model_is_evaluated(name):
    scheduler = make_scheduler(name, num_inference_steps=4, flow_shift=5.0, device=CPU, levels=FEW.levels)
    assert scheduler.timesteps.tolist() == pytest.approx([900, 700, 500, 200])
    assert scheduler.sigmas.tolist() == pytest.approx([0.9, 0.7, 0.5, 0.2, 0])


def test_levels_leave_a_solver_alone_that_has_its_own():
    plain = make_scheduler("unipc", num_inference_steps=4, flow_shift=5.0, device=CPU)
    given = make_scheduler("unipc", num_inference_steps=4, flow_shift=5.0, device=CPU, levels=FEW.levels)
    assert torch.equal(plain.sigmas, given.sigmas)


def test_steps_are_those_of_the_published_few_step_samplers():
    """x0 = x - level flow; then LightX2V for Wan2.1, FastVideo and rCM add fresh noise, LightX2V for Wan2.2 its own."""
    sample, flow, noise = (torch.randn(1, 4, 2, 3, 3) for _ in range(3))
    data = sample - 0.9 * flow
    euler = make_scheduler("euler", num_inference_steps=4, flow_shift=5.0, device=CPU, levels=FEW.levels)
    stepped = euler.step(flow, euler.timesteps[0], sample, return_dict=False)[0]
    assert torch.allclose(stepped, data + 0.7 * flow, atol=1e-5)
    lcm = make_scheduler("lcm", num_inference_steps=4, flow_shift=5.0, device=CPU, levels=FEW.levels)
    generator = torch.Generator().manual_seed(3)
    stepped = lcm.step(flow, lcm.timesteps[0], sample, generator=generator, return_dict=False)[0]
    noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(stepped, 0.3 * data + 0.7 * noise, atol=1e-5)
