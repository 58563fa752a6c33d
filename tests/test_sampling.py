import pytest
import torch

from swiftwan.errors import RequestError
from swiftwan.sampling import REFUSED, SCHEDULERS, check_scheduler, make_scheduler

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
