"""UniPC, Wan's own solver."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

TRAIN_TIMESTEPS = 1000


class UniPC:
    """UniPC of order 2 with B2(h) (arXiv 2302.04867) along a flow; to the bit diffusers' ``UniPCMultistepScheduler``.

    Each step goes on from the last two clean videos that the model pointed at, and once the next one is known, the
    latents that it left are corrected by it. The coefficients are numbers of the host: diffusers solves for them on the
    device and waits for it at each step. To import its schedulers takes 1.3 s, torch's compiler among them.

    Args:
        num_inference_steps: one call of the model each.
        flow_shift: warps the even noise levels, as in :func:`swiftwan.sampling.warped`.
        device: of the timesteps.

    Attributes:
        sigmas: noise levels (steps + 1,), float32, on the CPU; the last is 0.
        timesteps: (steps,), int64.
        begin_index, step_index: where the walk begins, and where it is; None before its first step.
        order: model calls a step.
    """

    order = 1

    def __init__(self, num_inference_steps: int, flow_shift: float, device: torch.device) -> None:
        even = np.linspace(1, 1 / TRAIN_TIMESTEPS, num_inference_steps + 1)[:-1]
        sigmas = flow_shift * even / (1 + (flow_shift - 1) * even)
        sigmas[0] -= 1e-6  # it is 1, where the logarithm of the data's share is infinite
        self.timesteps = torch.from_numpy(sigmas * TRAIN_TIMESTEPS).to(device=device, dtype=torch.int64)
        self.sigmas = torch.from_numpy(np.append(sigmas, 0).astype(np.float32))
        self.begin_index = 0
        self.step_index: int | None = None
        self._cleans: list[Tensor] = []
        self._latents: Tensor | None = None
        self._order = 1

    def set_begin_index(self, index: int) -> None:
        """Begin at this step of the schedule instead of the first."""
        self.begin_index = index

    def step(self, flow: Tensor, timestep: Tensor, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """The latents of the next noise level; called, and answering, as diffusers' schedulers without ``return_dict``.

        Args:
            flow: the model's prediction at ``latents``; of the same shape, on the same device.
            timestep: not read, since the walk knows where it is.
        """
        index = self.begin_index if self.step_index is None else self.step_index
        clean = latents - self.sigmas[index] * flow
        if self._latents is not None:
            latents = self._corrected(index, clean)
        self._cleans = [*self._cleans[-1:], clean]
        self._latents = latents
        self._order = min(len(self._cleans), len(self.timesteps) - index)
        self.step_index = index + 1
        return (self._predicted(index + 1),)

    def _predicted(self, end: int) -> Tensor:
        ahead, scale, _ = self._straight(end)
        if self._order == 1:
            return ahead
        bend = (self._cleans[-2] - self._cleans[-1]) / self._spacing(end)
        return ahead - scale * (0.5 * bend)

    def _corrected(self, end: int, clean: Tensor) -> Tensor:
        """The latents that the last step should have left, now that the clean video behind it is known."""
        ahead, scale, h = self._straight(end)
        last, change = self._cleans[-1], clean - self._cleans[-1]
        if self._order == 1:
            return ahead - scale * (0.5 * change)
        spacing = self._spacing(end)
        first = torch.expm1(-h) / -h - 1
        second = first / -h - 0.5
        wanted = torch.stack((first, 2 * second)) / torch.expm1(-h)
        one = torch.ones(())
        matrix = torch.stack((torch.stack((one, one)), torch.stack((spacing, one))))
        before, now = torch.linalg.solve(matrix, wanted)
        return ahead - scale * (before * ((self._cleans[-2] - last) / spacing) + now * change)

    def _straight(self, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents at level ``end`` if the last clean video stayed the same; what to scale its change by; the step's
        length in half the logarithm of the signal-to-noise ratio."""
        assert self._latents is not None
        sigma, start = self.sigmas[end], self.sigmas[end - 1]
        h = self._log_ratio(end) - self._log_ratio(end - 1)
        scale = (1 - sigma) * torch.expm1(-h)
        return sigma / start * self._latents - scale * self._cleans[-1], scale, h

    def _spacing(self, end: int) -> Tensor:
        """The step before the one that goes to ``end``, backwards, in lengths of that one."""
        start = self._log_ratio(end - 1)
        return (self._log_ratio(end - 2) - start) / (self._log_ratio(end) - start)

    def _log_ratio(self, index: int) -> Tensor:
        return torch.log(1 - self.sigmas[index]) - torch.log(self.sigmas[index])
