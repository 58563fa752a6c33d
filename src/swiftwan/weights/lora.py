"""LoRA files of every family, read into changes of our transformer's parameters.

What a file's keys mean is in ``lora_names``, what a change does in ``models.adapter``. Here: which keys a model
can take, at which scale, and the report of those it cannot. Shapes are checked from the header, before a
tensor is read: each change is first put together on the meta device, by the code that later does it with numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open

from swiftwan.errors import WeightsError
from swiftwan.models.adapter import Change
from swiftwan.models.config import KNOWN_MODELS, POCKET, TransformerConfig
from swiftwan.weights import check
from swiftwan.weights.lora_changes import Scales, Target, Unfit, make_changes
from swiftwan.weights.lora_names import Key, Names, family, names_of, split

Expert = Literal["high", "low"]

PICKLES = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class Report:
    """What became of a file's keys.

    Attributes:
        matched: keys that change the model.
        unmatched: keys that do not, each with the reason.
        misshaped: keys of a module that the model has in another shape, each with both shapes.
        notes: what was done to make a change fit.
    """

    matched: tuple[str, ...]
    unmatched: dict[str, str]
    misshaped: dict[str, str]
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """``matched`` as a count, all else by name, a line each."""
        lines = [f"{len(self.matched)} keys matched", *self.notes]
        lines += [f"unmatched: {key}: {why}" for key, why in self.unmatched.items()]
        return lines + [f"mis-shaped: {key}: {why}" for key, why in self.misshaped.items()]

    def left_out(self) -> str:
        """The keys that do not change the model, shortened to a line; empty if there are none."""
        told = [f"{key} ({why})" for key, why in (self.misshaped | self.unmatched).items()]
        more = f" and {len(told) - 3} more" if len(told) > 3 else ""
        return f"{len(told)} keys left out: {', '.join(told[:3])}{more}" if told else ""


@dataclass(frozen=True)
class Fit:
    """What of a file a transformer takes: from the header alone."""

    file: LoraFile
    names: Names
    targets: tuple[Target, ...]
    report: Report

    @property
    def is_dora(self) -> bool:
        return any("magnitude" in target.keys for target in self.targets)

    def load(self) -> dict[str, Change]:
        """Read the tensors; return the changes by parameter, on the CPU.

        Raises:
            WeightsError: the file is damaged, or holds numbers that are not finite.
        """
        changes: dict[str, Change] = {}
        with safe_open(self.file.path, framework="pt", device="cpu") as tensors:
            for target in self.targets:
                parts = {part: tensors.get_tensor(key) for part, key in target.keys.items()}
                for part, tensor in parts.items():
                    if not torch.isfinite(tensor.float()).all():
                        raise WeightsError(
                            f"{self.file.path}: {target.keys[part]} holds NaN or infinity; its training failed "
                            "or the file is damaged: take another"
                        )
                changes |= make_changes(target, parts, self.file.scales, self.names)[0]
        return changes


@dataclass(frozen=True)
class LoraFile:
    """An adapter's file, its header read and checked; make one with :meth:`open`."""

    path: Path
    shapes: Mapping[str, check.Shape]
    scales: Scales
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> LoraFile:
        """Check a file and read its header.

        Raises:
            WeightsError: it is missing, damaged, or of another format (pickles are never opened).
        """
        if path.suffix.lower() in PICKLES:
            raise WeightsError(
                f"{path} is a pickle, which swiftwan never opens: it may run code; take its .safetensors"
            )
        shapes = check.check_file(path)
        if not shapes:
            raise WeightsError(f"{path} holds no tensors; download it again, or ask who made it")
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
        return cls(path, shapes, Scales.read(path, metadata), metadata)

    @cached_property
    def experts(self) -> frozenset[Expert]:
        """Whose keys it holds, if it names the low-noise expert: then all others are the high one's. Else empty."""
        low = {found.low for key in self.shapes if (found := split(key))}
        return frozenset({"high", "low"} if len(low) == 2 else {"low"} if True in low else ())

    def fit(self, config: TransformerConfig, expert: Expert | None = None) -> Fit:
        """Find what of it a transformer can take.

        Args:
            config: sizes of the transformer.
            expert: whose keys to take from a file that holds both; None for a model with one transformer.

        Raises:
            WeightsError: nothing fits; says which model it looks made for.
        """
        fitted = _fit(self, config, expert)
        if not fitted.report.matched:
            raise WeightsError(_nothing_fits(self, fitted.report))
        return fitted

    def made_for(self) -> list[str]:
        """Known models that can take all of it."""
        found = []
        for model in (*KNOWN_MODELS.values(), POCKET):
            experts = sorted(self.experts or ("high", "low")) if model.boundary_ratio else (None,)
            reports = [_fit(self, model.transformer, expert).report for expert in experts]
            if all(r.matched and not r.unmatched and not r.misshaped for r in reports):
                found.append(model.name)
        return found


# Which keys


def _fit(file: LoraFile, config: TransformerConfig, expert: Expert | None) -> Fit:
    names = names_of(config)
    both = len(file.experts) == 2
    groups: dict[str, tuple[str, dict[str, str]]] = {}
    unmatched: dict[str, str] = {}
    for key in file.shapes:
        found = split(key)
        if found and both and expert and found.low != (expert == "low"):
            continue
        if found and found.low and not expert:
            unmatched[key] = "of the low-noise expert; this model has one transformer"
            continue
        path = names.aliases.get(found.base) if found else None
        if found is None or path is None:
            unmatched[key] = _why_unknown(found, config)
            continue
        _, parts = groups.setdefault(path, (found.base, {}))
        if found.part in parts:
            unmatched[key] = f"says the same as {parts[found.part]}"
        else:
            parts[found.part] = key
    misshaped: dict[str, str] = {}
    notes: list[str] = []
    targets = []
    for path, (base, keys) in groups.items():
        target = Target(path, keys, base)
        on_meta = {part: torch.empty(file.shapes[key], device="meta") for part, key in keys.items()}
        try:
            notes += make_changes(target, on_meta, file.scales, names)[1]
        except Unfit as problem:
            (misshaped if problem.misshaped else unmatched).update(dict.fromkeys(keys.values(), str(problem)))
        else:
            targets.append(target)
    matched = tuple(key for target in targets for key in target.keys.values())
    return Fit(file, names, tuple(targets), Report(matched, unmatched, misshaped, tuple(notes)))


def _why_unknown(found: Key | None, config: TransformerConfig) -> str:
    if found is None:
        return "no part of a LoRA that is known"
    block = re.match(r"blocks[._](\d+)[._]", found.base)
    if block and int(block[1]) >= config.num_layers:
        return f"block {block[1]}; this model has {config.num_layers}"
    return f"this model has no '{found.base}'"


# Words


def _nothing_fits(file: LoraFile, report: Report) -> str:
    if not report.misshaped:
        return f"{file.path} changes nothing in this model; {report.left_out()}. Is it a LoRA for Wan?"
    key, why = next(iter(report.misshaped.items()))
    module = found.base if (found := split(key)) else key
    told = f"{file.path} is for another model: its {module} is {why}"
    if made_for := file.made_for():
        return f"{told}; it is for {_few(made_for)}"
    widths = {size for key in report.misshaped for size in file.shapes[key]}
    like = [model.name for model in KNOWN_MODELS.values() if model.transformer.dim in widths]
    return f"{told}; its widths are those of {_few(like)}" if like else told


def describe(path: Path) -> dict[str, str]:
    """What a LoRA file is, in words, from its header: family, rank, targets, and the models it fits.

    Raises:
        WeightsError: it is damaged, or no LoRA.
    """
    file = LoraFile.open(path)
    found = [(key, parts) for key in file.shapes if (parts := split(key))]
    if not found:
        raise WeightsError(f"{path} is no LoRA: its keys are of no family known ({_few(list(file.shapes))})")
    ranks = sorted({file.shapes[key][0] for key, parts in found if parts.part in ("down", "lokr_w2_b", "hada_w1_b")})
    modules = {re.sub(r"blocks[._]\d+[._]", "", parts.base) for _, parts in found}
    return {
        "family": family(file.shapes),
        "rank": ", ".join(map(str, ranks)) or "none",
        "targets": f"{len({(parts.low, parts.base) for _, parts in found})}: {', '.join(sorted(modules))}",
        "experts": " and ".join(sorted(file.experts)) or "not said in the file",
        "for": ", ".join(file.made_for()) or "no model known here",
    }


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
