"""Changes to a loaded model's weights: merged for good, or live beside them with a strength that can change.

Low-rank: arXiv:2106.09685. Kronecker (LoKr) and Hadamard (LoHa) products: LyCORIS, arXiv:2309.14859. DoRA:
arXiv:2402.09353. Tensors hold their alpha already, so a change is ``strength * dense``, whatever its kind.

A live strength is a tensor, so that another value is neither a reload nor a new compilation, and 0 adds
exact zeros: the output is bit for bit that of the model alone.

Shapes: I and O in- and out-width of a linear, R rank, x (..., I).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftwan.models.streaming import StreamedBlock

# What a weight changes by


class Delta(nn.Module):
    """A change to one weight, kept in the form that its file has."""

    def __init__(self, **factors: Tensor) -> None:
        super().__init__()
        for name, factor in factors.items():
            self.register_buffer(name, factor, persistent=False)

    def dense(self) -> Tensor:
        """The whole change, in the weight's shape or one that reshapes to it."""
        raise NotImplementedError

    def forward(self, x: Tensor, strength: Tensor) -> Tensor:
        """What the change of a linear (O, I) adds to its output (..., O)."""
        return F.linear(x, self.dense()) * strength


class Full(Delta):
    """All of it, as ``diff`` has it."""

    change: Tensor

    def __init__(self, change: Tensor) -> None:
        super().__init__(change=change)

    def dense(self) -> Tensor:
        return self.change


class LowRank(Delta):
    """up (O, R) @ down (R, I); for convolutions down (R, C, kernel...) and up (O, R, 1...)."""

    down: Tensor
    up: Tensor

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__(down=down, up=up)

    def dense(self) -> Tensor:
        return (self.up.flatten(1) @ self.down.flatten(1)).view(self.up.shape[0], *self.down.shape[1:])

    def forward(self, x: Tensor, strength: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down) * strength, self.up)


class Kronecker(Delta):
    """LoKr: outer (o, i) ⊗ inner (p, j), O = o p and I = i j; inner may carry a convolution's kernel."""

    outer: Tensor
    inner: Tensor

    def __init__(self, outer: Tensor, inner: Tensor) -> None:
        super().__init__(outer=outer, inner=inner)

    def dense(self) -> Tensor:
        return torch.kron(self.outer.view(*self.outer.shape, *[1] * (self.inner.ndim - 2)), self.inner)

    def forward(self, x: Tensor, strength: Tensor) -> Tensor:
        # By the mixed product: two small products instead of one with the (O, I) matrix.
        rows = F.linear(x.unflatten(-1, (self.outer.shape[1], -1)), self.inner) * strength
        return (self.outer @ rows).flatten(-2)


class Hadamard(Delta):
    """LoHa: (left_up @ left_down) * (right_up @ right_down), element by element.

    The (O, I) matrix is made anew at each call: that is little work beside the tokens' product with it, and
    keeping it would double the model's memory.
    """

    left_up: Tensor
    left_down: Tensor
    right_up: Tensor
    right_down: Tensor

    def __init__(self, left_up: Tensor, left_down: Tensor, right_up: Tensor, right_down: Tensor) -> None:
        super().__init__(left_up=left_up, left_down=left_down, right_up=right_up, right_down=right_down)

    def dense(self) -> Tensor:
        return (self.left_up @ self.left_down) * (self.right_up @ self.right_down)


@dataclass(frozen=True)
class Change:
    """What one adapter does to one parameter.

    Attributes:
        deltas: added together; most files have one.
        shape: the parameter's.
        linear: whether the parameter is the weight or bias of a linear.
        magnitude: DoRA's lengths of the changed weight's rows (O, 1, ...) or columns (1, I); None without.
    """

    deltas: tuple[Delta, ...]
    shape: tuple[int, ...]
    linear: bool
    magnitude: Tensor | None = None

    def sum(self, device: torch.device) -> Tensor:
        """All deltas together, float32, in the parameter's shape."""
        total = torch.zeros(self.shape, device=device)
        for delta in self.deltas:
            total += fit(delta.to(device, torch.float32).dense(), self.shape)
        return total

    def dense(self, weight: Tensor) -> Tensor:
        """The change of ``weight``, float32, at strength 1."""
        total = self.sum(weight.device)
        if self.magnitude is None:
            return total
        changed = weight + total
        magnitude = self.magnitude.to(weight.device, torch.float32)
        over = [axis for axis in range(changed.ndim) if magnitude.shape[axis] == 1]
        return magnitude * changed / torch.linalg.vector_norm(changed, dim=over, keepdim=True) - weight


def fit(change: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Bring a change to its parameter's shape: reshaped where the sizes agree, and with zeros for the input
    channels that a patch embedding (O, C, t, h, w) has beyond it (a text-to-video adapter on an
    image-to-video model, whose first channels are the video's).

    Raises:
        ValueError: it is of another shape.
    """
    if tuple(change.shape) == shape:
        return change
    if len(shape) == change.ndim == 5 and change.shape[1] < shape[1]:
        change = F.pad(change, (0, 0) * 3 + (0, shape[1] - change.shape[1]))
    if tuple(change.shape) == shape or _same_but_flat(tuple(change.shape), shape):
        return change.reshape(shape)
    raise ValueError(f"{tuple(change.shape)} is not {shape}")


def _same_but_flat(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """(O, C k) for (O, C, k...), and (6, D) or (D,) for (1, 6, D) or (1, D)."""
    if [n for n in one if n != 1] == [n for n in other if n != 1]:
        return True
    return len(one) == 2 and len(other) > 2 and one[0] == other[0] and one[1] == torch.Size(other[1:]).numel()


# Merged


@torch.no_grad()
def merge(model: nn.Module, changes: Mapping[str, Change], strength: float, device: torch.device) -> None:
    """Add ``strength * change`` to parameters, in float32, rounded once to the weight's dtype.

    Args:
        changes: by the name of the parameter in the model as it was loaded.
        device: where to do it; the parameters may rest elsewhere.
    """
    if strength == 0:
        return
    for name, change in changes.items():
        owner, leaf = _owner(model, name)
        parameter = getattr(owner, leaf)
        weight = parameter.to(device, torch.float32)
        parameter.copy_(weight + strength * change.dense(weight))


def quantised(model: nn.Module, changes: Mapping[str, Change]) -> list[str]:
    """Parameters among those to be changed that are not plain floating-point numbers of 16 bits or more."""
    return [name for name, change in changes.items() if not _is_plain(model, name, change.shape)]


def _is_plain(model: nn.Module, name: str, shape: tuple[int, ...]) -> bool:
    owner, leaf = _owner(model, name)
    value = getattr(owner, leaf, None)
    # A quantised linear keeps its bias as it was; the two go together all the same.
    of_owner = (value, getattr(owner, "weight", None)) if leaf == "bias" else (value,)
    return value is not None and tuple(value.shape) == shape and all(map(_is_float, of_owner))


def _is_float(value: object) -> bool:
    # A subclass of Parameter or Tensor holds packed numbers.
    return isinstance(value, Tensor) and (
        type(value) in (nn.Parameter, Tensor) and value.is_floating_point() and value.dtype.itemsize > 1
    )


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, behind the adapters it may have, and the parameter's name there."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    return owner.base if isinstance(owner, AdaptedLinear) else owner, leaf


# Live


class Branch(nn.Module):
    """What one adapter adds to one linear.

    ``strength`` is one tensor for the whole model, and no buffer: where blocks stream from the host, what is
    written to a buffer on the device is lost with the next block's copy.
    """

    bias: Tensor | None

    def __init__(self, key: str, deltas: list[Delta], bias: Tensor | None, strength: Tensor) -> None:
        super().__init__()
        self.key = key
        self.deltas = nn.ModuleList(deltas)
        self.register_buffer("bias", bias, persistent=False)
        self.strength = strength

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for delta in self.deltas:
            y = y + delta(x, self.strength)
        return y if self.bias is None else y + self.bias * self.strength


class AdaptedLinear(nn.Module):
    """A linear, of floats or quantised, and what adapters add to its output. It only calls the linear."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.branches = nn.ModuleList()

    @property
    def weight(self) -> Tensor:
        """The linear's own, whose dtype and device callers ask for."""
        return self.base.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for branch in self.branches:
            y = branch(x, y)
        return y


class AdaptedParameter(nn.Module):
    """A child of the module whose parameter ``leaf`` adapters change: norms, tables, the patch embedding.

    These are small, so the changed parameter is written anew when a strength changes, and a forward pays nothing.
    """

    plain: Tensor

    def __init__(self, leaf: str, parameter: Tensor) -> None:
        super().__init__()
        self.leaf = leaf
        self.register_buffer("plain", parameter.detach().clone(), persistent=False)
        self.changes: dict[str, tuple[Tensor, float]] = {}

    @torch.no_grad()
    def write(self, owner: nn.Module) -> None:
        value = self.plain.float()
        for dense, strength in self.changes.values():
            if strength != 0:
                value = value + strength * dense.to(value.device)
        getattr(owner, self.leaf).copy_(value)


def attach(
    model: nn.Module,
    changes: Mapping[str, Change],
    key: str,
    strength: float,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Put an adapter beside the weights, under a key that :func:`set_strength` finds it by.

    Args:
        changes: by the name of the parameter in the model as it was loaded; none with a magnitude.
        device: where the model computes; its weights may rest elsewhere.
        dtype: in which linears compute whose weight does not tell.
    """
    scalar = torch.tensor(float(strength), device=device)
    linears: dict[str, dict[str, Change]] = {}
    for name, change in changes.items():
        path, _, leaf = name.rpartition(".")
        if change.linear:
            linears.setdefault(path, {})[leaf] = change
        else:
            _attach_to_parameter(*_owner(model, name), change, key, strength)
    for path, of_linear in linears.items():
        _attach_to_linear(model, path, of_linear, key, scalar, dtype)


def _attach_to_linear(
    model: nn.Module, path: str, changes: Mapping[str, Change], key: str, strength: Tensor, dtype: torch.dtype
) -> None:
    adapted = model.get_submodule(path)
    if not isinstance(adapted, AdaptedLinear):
        parent, _, leaf = path.rpartition(".")
        adapted = AdaptedLinear(adapted)
        setattr(model.get_submodule(parent), leaf, adapted)
    own = next(chain(adapted.base.parameters(), adapted.base.buffers()))
    if own.is_floating_point() and own.dtype.itemsize > 1:
        dtype = own.dtype
    deltas = [delta.to(own.device, dtype) for delta in changes["weight"].deltas] if "weight" in changes else []
    bias = changes["bias"].sum(own.device).to(dtype) if "bias" in changes else None
    adapted.branches.append(Branch(key, deltas, bias, strength))


def _attach_to_parameter(owner: nn.Module, leaf: str, change: Change, key: str, strength: float) -> None:
    parameter = getattr(owner, leaf)
    name = f"adapted_{leaf}"
    if not isinstance(getattr(owner, name, None), AdaptedParameter):
        owner.add_module(name, AdaptedParameter(leaf, parameter))
    adapted = getattr(owner, name)
    adapted.changes[key] = change.dense(parameter.float()), strength
    adapted.write(owner)


def set_strength(model: nn.Module, key: str, strength: float) -> bool:
    """Give the live adapter of this key another strength; False if the model has none of it."""
    branches = [module for module in model.modules() if isinstance(module, Branch) and module.key == key]
    for branch in branches:
        branch.strength.fill_(strength)
    return _set_of_parameters(model, key, strength) or bool(branches)


def _set_of_parameters(owner: nn.Module, key: str, strength: float) -> bool:
    found = False
    for child in owner.children():
        if isinstance(child, AdaptedParameter):
            if key in child.changes:
                child.changes[key] = child.changes[key][0], strength
                child.write(owner)
                found = True
        elif not isinstance(child, StreamedBlock):
            found |= _set_of_parameters(child, key, strength)
        elif any(isinstance(module, AdaptedParameter) and key in module.changes for module in child.modules()):
            with child.edited():
                found |= _set_of_parameters(child, key, strength)
    return found
