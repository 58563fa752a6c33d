"""From the tensors of one module's keys to a change of its parameters, with the scale that its family means."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swiftwan.errors import WeightsError
from swiftwan.models.adapter import Change, Delta, Full, Hadamard, Kronecker, LowRank, fit
from swiftwan.weights import check
from swiftwan.weights.lora_names import Names


@dataclass(frozen=True)
class Target:
    """The keys that together change one module or lone parameter, by their part."""

    path: str
    keys: Mapping[str, str]
    base: str


class Unfit(Exception):
    """Why the keys of one target cannot be used; ``misshaped`` if it is their shapes."""

    def __init__(self, why: str, misshaped: bool = False) -> None:
        super().__init__(why)
        self.misshaped = misshaped


@dataclass(frozen=True)
class Scales:
    """alpha / rank, by the rules of each family.

    kohya, LyCORIS and lightx2v store an ``alpha`` for each module. peft and diffusers keep ``lora_alpha`` beside
    the tensors: in the file's metadata, or in an ``adapter_config.json``. Files with neither mean 1.
    """

    alpha: float | None = None
    rank: int | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)
    rank_stabilized: bool = False

    @classmethod
    def read(cls, path: Path, metadata: Mapping[str, str]) -> Scales:
        """Find the settings of peft; no alpha where there are none.

        Raises:
            WeightsError: they are damaged, so the scale is unknown.
        """
        try:
            config: dict[str, Any] = {}
            if "lora_adapter_metadata" in metadata:  # diffusers: every name begins with its component
                packed = json.loads(metadata["lora_adapter_metadata"])
                config = {name.partition(".")[2]: value for name, value in packed.items()}
            elif "adapter_config" in metadata:
                config = json.loads(metadata["adapter_config"])
            elif path.name == "adapter_model.safetensors":
                config = check.read_json(path.with_name("adapter_config.json")) or {}
            alpha = config.get("lora_alpha", config.get("alpha"))  # LoRA, and LoKr and LoHa
            return cls(
                alpha=None if alpha is None else float(alpha),
                rank=int(config.get("r") or 0) or None,
                alphas={str(name): float(value) for name, value in (config.get("alpha_pattern") or {}).items()},
                rank_stabilized=bool(config.get("use_rslora")),
            )
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise WeightsError(f"{path} has damaged settings in its metadata, so its scale is unknown") from None

    def scale(self, base: str, alpha: Tensor | None, rank: int | None) -> float:
        """The factor of a module's change; ``rank`` is None where both of LoKr's factors are whole."""
        if alpha is not None:
            # LyCORIS stores an alpha with whole factors too, and does not use it.
            return 1.0 if alpha.is_meta or rank is None else float(alpha) / rank
        value = next((v for name, v in self.alphas.items() if f".{base}".endswith(f".{name.strip('^$')}")), self.alpha)
        rank = rank or self.rank
        if value is None or rank is None:
            return 1.0
        return value / (math.sqrt(rank) if self.rank_stabilized else rank)


def make_changes(
    target: Target, parts: Mapping[str, Tensor], scales: Scales, names: Names
) -> tuple[dict[str, Change], list[str]]:
    """The changes of a target's weight and bias, with notes; from numbers, or from shapes on the meta device."""
    parts = dict(parts)
    alpha, magnitude = parts.pop("alpha", None), parts.pop("magnitude", None)
    if alpha is not None and alpha.numel() != 1:
        raise Unfit(f"alpha is {in_words(alpha.shape)}, not one number", misshaped=True)
    bias = [parts.pop("diff_b")] if "diff_b" in parts else []
    deltas: list[Delta] = [Full(parts.pop("diff"))] if "diff" in parts else []

    def scale(rank: int | None) -> float:
        return scales.scale(target.base, alpha, rank)

    try:
        if parts:
            up_bias = parts.pop("up_bias", None)
            deltas.append(_product(parts, scale))
            if up_bias is not None:
                bias.append(up_bias.float() * scale(parts["down"].shape[0]))
    except KeyError as missing:
        raise Unfit(f"{missing.args[0]} is missing") from None
    except (RuntimeError, IndexError):
        shapes = ", ".join(f"{part} {in_words(tensor.shape)}" for part, tensor in parts.items())
        raise Unfit(f"its factors do not fit each other: {shapes}", misshaped=True) from None
    changes, notes = {}, []
    weight = names.weight(target.path)
    if deltas:
        shape = names.shapes[weight]
        for delta in deltas:
            notes += _check_shape(weight, delta, shape, linear=target.path in names.linears)
        if magnitude is not None:
            magnitude = _magnitude(magnitude, shape)
        changes[weight] = Change(tuple(deltas), shape, target.path in names.linears, magnitude)
    elif alpha is not None or magnitude is not None:
        raise Unfit("there are no factors to go with it")
    if bias:
        name = f"{target.path}.bias"
        if name not in names.shapes:
            raise Unfit(f"'{target.path}' has no bias in this model")
        for delta in (biases := tuple(Full(tensor) for tensor in bias)):
            _check_shape(name, delta, names.shapes[name], linear=False)
        changes[name] = Change(biases, names.shapes[name], target.path in names.linears)
    return changes, notes


def _product(parts: Mapping[str, Tensor], scale: Callable[[int | None], float]) -> Delta:
    """The change that factors make, its scale in one of them.

    Raises KeyError for a missing factor, RuntimeError for factors that do not fit each other.
    """
    form = next((form for form in ("lokr", "hada") if any(part.startswith(form) for part in parts)), "lora")
    known, make = _FORMS[form]
    if strange := parts.keys() - known:
        raise Unfit(f"'{min(strange)}' is of no form of LoRA known here")
    if not all(tensor.numel() for tensor in parts.values()):
        raise Unfit("its factors are empty", misshaped=True)
    delta = make({part: tensor.float() for part, tensor in parts.items()}, scale)
    _dense_on_meta(delta)
    return delta


def _dense_on_meta(delta: Delta) -> Tensor:
    """The whole change's shape, found without its numbers: 30 blocks' products would take a CPU seconds.

    Raises RuntimeError for factors that do not fit each other.
    """
    return type(delta)(**{name: factor.to("meta") for name, factor in delta.named_buffers()}).dense()


def _lora(of: Mapping[str, Tensor], scale: Callable[[int | None], float]) -> Delta:
    return LowRank(of["down"], of["up"] * scale(of["down"].shape[0]))


def _lokr(of: Mapping[str, Tensor], scale: Callable[[int | None], float]) -> Delta:
    outer = of["lokr_w1"] if "lokr_w1" in of else of["lokr_w1_a"] @ of["lokr_w1_b"]
    inner = of["lokr_w2"] if "lokr_w2" in of else _tucker(of, "lokr_t2", "lokr_w2_a", "lokr_w2_b")
    ranks = [of[name].shape[0] for name in ("lokr_w2_b", "lokr_w1_b") if name in of]
    return Kronecker(outer * scale(ranks[0] if ranks else None), inner)


def _loha(of: Mapping[str, Tensor], scale: Callable[[int | None], float]) -> Delta:
    factor = scale(of["hada_w1_b"].shape[0])
    if "hada_t1" in of or "hada_t2" in of:
        left = _tucker(of, "hada_t1", "hada_w1_a", "hada_w1_b")
        return Full(left * _tucker(of, "hada_t2", "hada_w2_a", "hada_w2_b") * factor)
    return Hadamard(of["hada_w1_a"] * factor, of["hada_w1_b"], of["hada_w2_a"], of["hada_w2_b"])


_FORMS = {
    "lora": ({"down", "up"}, _lora),
    "lokr": ({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}, _lokr),
    "hada": ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}, _loha),
}


def _tucker(of: Mapping[str, Tensor], core: str, first: str, second: str) -> Tensor:
    """first @ second, or LyCORIS' form for kernels: a core (R, R, k...), and first (R, O), second (R, I)."""
    if core not in of:
        return of[first] @ of[second]
    return torch.einsum("ij...,ip,jr->pr...", of[core], of[first], of[second]).contiguous()


def _check_shape(name: str, delta: Delta, shape: check.Shape, *, linear: bool) -> list[str]:
    dense = _dense_on_meta(delta)
    try:
        fit(dense, shape)
    except ValueError:
        fits = False
    else:
        fits = tuple(dense.shape) == shape or not linear
    if not fits:
        raise Unfit(f"{in_words(dense.shape)}, in this model {in_words(shape)}", misshaped=True)
    if dense.ndim == len(shape) and dense.shape[1:2] != shape[1:2]:
        return [f"{name}: zeros for input channels {dense.shape[1]} to {shape[1] - 1}, which the file does not know"]
    return []


def _magnitude(magnitude: Tensor, shape: check.Shape) -> Tensor:
    """DoRA's lengths as (O, 1, ...) or (1, I, ...): peft stores (O,), LyCORIS either with its ones."""
    rows, columns = (shape[0], *[1] * (len(shape) - 1)), (1, *shape[1:2], *[1] * (len(shape) - 2))
    if magnitude.ndim == 1 and magnitude.shape[0] == shape[0]:
        return magnitude.reshape(rows)
    if tuple(magnitude.shape) in (rows, columns):
        return magnitude
    raise Unfit(f"DoRA's magnitude is {in_words(magnitude.shape)}, in this model {in_words(rows)}", misshaped=True)


def in_words(shape: Sequence[int]) -> str:
    """``5120x1536``."""
    return "x".join(map(str, shape)) or "scalar"
