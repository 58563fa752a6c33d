"""On the embedded model every solver of the flow's equation comes to the same picture as its steps grow.

The orders show only so far: DPM++ and UniPC start and end with steps of order one, and Euler and Heun take their
sigmas from another diffusers class that ends at another small sigma. `lcm` is no such solver: it renoises after each
step, so it has no limit to come to; it serves models that were trained for it.
"""

import functools

import pytest
import torch

import swiftwan as sw

FEW, MORE, MOST = 5, 12, 30


@pytest.fixture(scope="module")
def latents():
    engine = sw.Engine.load("pocket", plan=[], dtype="fp32", device="cpu")

    @functools.cache
    def run(scheduler: str, steps: int) -> torch.Tensor:
        prompt = "a red circle stays still over a blue background"
        request = sw.TextToImage(prompt, seed=3, scheduler=scheduler, num_inference_steps=steps)
        return engine.run(request).latents

    return run


@pytest.mark.parametrize("scheduler", ["unipc", "euler", "heun", "dpm++"])
def test_more_steps_come_nearer_to_one_picture(latents, scheduler):
    limit = latents("euler", 90)

    def away(steps: int) -> float:
        return float((latents(scheduler, steps) - limit).norm() / limit.norm())

    assert away(FEW) > 2 * away(MORE) > 2 * 1.5 * away(MOST)
    assert away(MOST) < 0.06
