"""A training run's state on disk: whole or not at all, the last good one never lost.

A checkpoint is one safetensors file. It is written beside its name, brought to the disk and renamed, and only
then does an older one go; so whatever happens (a kill, a full disk) the newest whole one is there to go on from.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from swiftwan.errors import WeightsError
from swiftwan.weights import check
from swiftwan.weights.write import write_tensors

log = logging.getLogger(__name__)

KEPT = 2
"""Checkpoints that stay: the newest, and the one before it, should a disk have damaged the newest."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read.

    Attributes:
        step: how many steps it has behind it.
        tensors: by name, on the CPU.
        facts: what else was kept.
    """

    path: Path
    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def paths(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob("step-*.safetensors"))

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
        """Write the state behind ``step`` steps, then let go of the oldest.

        Raises:
            OutputError: it cannot be written; names the last good one.
        """
        path = self.folder / f"step-{step:08d}.safetensors"
        last = self.paths()
        kept = f"the last good one is {last[-1]}" if last else "there is none before it"
        # Copies: bitsandbytes gives all parameters one table, and safetensors refuses memory that names share.
        owned = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        metadata = {"step": str(step), "facts": json.dumps(dict(facts))}
        write_tensors(path, owned, metadata, way_out=f"{kept}: free room, and run the same command again")
        halves = self.folder.glob(".*tmp*")  # of runs that were killed while they wrote
        for old in (*self.paths()[:-KEPT], *halves):
            old.unlink(missing_ok=True)
        return path

    def latest(self) -> Saved | None:
        """Read the newest one that is whole; None where there is none. What is damaged is logged."""
        for path in reversed(self.paths()):
            try:
                check.check_file(path)
                with safe_open(path, framework="pt", device="cpu") as file:
                    metadata = file.metadata()
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return Saved(path, int(metadata["step"]), tensors, json.loads(metadata["facts"]))
            except (WeightsError, SafetensorError, KeyError, ValueError, TypeError) as problem:
                log.warning("%s is damaged and not used: %s", path, problem)
        return None


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """An optimizer's state as tensors by ``optimizer.PARAMETER.KEY``, and the plain values beside them."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{key}"] = value
            else:
                values.setdefault(name, {})[key] = value
    return tensors, values


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], saved: Saved, values: Mapping[str, Any]
) -> None:
    """The inverse of :func:`optimizer_tensors`; tensors go where their parameter is, counters where they were made."""
    for name, parameter in parameters.items():
        prefix = f"optimizer.{name}."
        state: dict[str, Any] = dict(values.get(name, {}))
        for key, tensor in saved.tensors.items():
            if key.startswith(prefix):
                counts = tensor.ndim == 0 and not optimizer.defaults.get("fused")
                state[key.removeprefix(prefix)] = tensor if counts else tensor.to(parameter.device)
        if state:
            optimizer.state[parameter] = state
