"""What every training run shares: a folder, a log, a schedule, an average of the weights, and exact resume.

All randomness of a step is drawn from (seed, step), so a run that is killed and started again goes on as
if nothing had happened; no generator state needs saving.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from swiftwan.weights.write import write_tensors


@dataclass(frozen=True)
class Schedule:
    """Warm up, hold, then a cosine down to zero (arXiv 2405.18392: as good as a full cosine, and extendable)."""

    steps: int
    learning_rate: float
    warmup: int = 500
    hold_until: float = 0.5

    def at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup)
        fall = max(0.0, (step / self.steps - self.hold_until) / (1 - self.hold_until))
        return self.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, fall)))


def seed_of(seed: int, step: int) -> int:
    """A seed for one step of one run."""
    return (seed * 1_000_003 + step) % 2**63


class Run:
    """A training run that lives in a folder: ``state.safetensors`` and ``log.jsonl``.

    Args:
        folder: made if it is not there; a state in it is resumed.
        model: those of its parameters that take gradients are trained in place.
        schedule: learning rate by step.
        ema_decay: of the averaged weights, which are what a run delivers.
    """

    def __init__(self, folder: Path, model: nn.Module, schedule: Schedule, *, ema_decay: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.schedule = schedule
        self.ema_decay = ema_decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        device = next(iter(self.parameters.values())).device
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=0.0,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            fused=device.type == "cuda",
        )
        self.step = 0
        self._started = time.monotonic()
        if self.state_path.exists():
            self._resume(device)

    @property
    def state_path(self) -> Path:
        return self.folder / "state.safetensors"

    def update(self, loss: Tensor) -> Tensor:
        """Back-propagate and :meth:`descend`; returns the gradient's norm before clipping (no host sync)."""
        return self.descend(torch.autograd.grad(loss, list(self.parameters.values())))

    def descend(self, gradients: Sequence[Tensor]) -> Tensor:
        """Clip the gradients, in place, step and average; returns their norm before clipping (no host sync)."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.at(self.step)
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        # A short average at first, so that it does not carry the random start for long.
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)
        return norm

    def log(self, **values: float) -> None:
        """Append one JSON line with the step and the seconds since this process began."""
        row = {"step": self.step, "seconds": round(time.monotonic() - self._started, 2)}
        row |= {name: float(f"{value:.6g}") for name, value in values.items()}
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")

    @torch.no_grad()
    def deliver(self) -> None:
        """Put the averaged weights into the model; the run itself goes on from the saved state only."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.average[name])

    def save(self) -> None:
        """Write the state whole or not at all; raises OutputError where it cannot."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"model.{name}"] = parameter.detach()
            tensors[f"average.{name}"] = self.average[name]
            for key in ("exp_avg", "exp_avg_sq"):
                if parameter in self.optimizer.state:
                    tensors[f"{key}.{name}"] = self.optimizer.state[parameter][key]
        write_tensors(self.state_path, tensors, {"step": str(self.step)})

    @torch.no_grad()
    def _resume(self, device: torch.device) -> None:
        with safe_open(self.state_path, framework="pt", device=str(device)) as state:
            self.step = int(state.metadata()["step"])
            for name, parameter in self.parameters.items():
                parameter.copy_(state.get_tensor(f"model.{name}"))
                self.average[name].copy_(state.get_tensor(f"average.{name}"))
                if self.step:
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(float(self.step), device=device if device.type == "cuda" else "cpu"),
                        "exp_avg": state.get_tensor(f"exp_avg.{name}"),
                        "exp_avg_sq": state.get_tensor(f"exp_avg_sq.{name}"),
                    }
