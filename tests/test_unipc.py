"""Wan's own solver against diffusers', from which its numbers come."""

import pytest
import torch

from swiftwan.sampling import diffusers_scheduler
from swiftwan.unipc import UniPC

CPU = torch.device("cpu")


@pytest.mark.parametrize("begin", [0, 1, 3])
@pytest.mark.parametrize("shift", [0.7, 1.0, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 50])
def test_each_step_is_diffusers_to_the_bit(steps, shift, begin):
    begin = min(begin, steps - 1)
    ours = UniPC(steps, shift, CPU)
    theirs = diffusers_scheduler("unipc", num_inference_steps=steps, flow_shift=shift, device=CPU)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    ours.set_begin_index(begin)
    theirs.set_begin_index(begin)
    weight = torch.randn(4, 4, 1, 1, 1) / 2
    here = there = torch.randn(1, 4, 2, 3, 3)
    for timestep in ours.timesteps[begin:]:
        (here,) = ours.step(flow(weight, here), timestep, here)
        (there,) = theirs.step(flow(weight, there), timestep, there, return_dict=False)
        assert torch.equal(here, there)
        assert ours.step_index == theirs.step_index


def flow(weight, latents):
    """Anything that bends the walk."""
    return torch.tanh(torch.nn.functional.conv3d(latents, weight)) - 0.3 * latents


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_walk_on_the_gpu_is_that_of_the_cpu_and_never_waits():
    weight, start = torch.randn(4, 4, 1, 1, 1) / 2, torch.randn(1, 4, 2, 3, 3)
    ends = []
    for device in ("cpu", "cuda"):
        solver, at, w = UniPC(8, 5.0, torch.device(device)), start.to(device), weight.to(device)
        flow(w, at)  # cuDNN chooses its kernel
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            for timestep in solver.timesteps:
                (at,) = solver.step(flow(w, at), timestep, at)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        ends.append(at.cpu())
    assert (ends[1] - ends[0]).norm() < 1e-3 * ends[0].norm()  # the convolution may run in TF32
