"""Tensors from files to a device, one at a time, and back.

A module is built on the meta device, so it costs nothing, and each tensor goes from the file straight to
where it will stay: host memory holds one tensor beside the pages of the file being read. Only names that
the module itself has are ever assigned; a file cannot name an attribute.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swiftwan.errors import Cancelled, OutputError
from swiftwan.models.streaming import bring_own, host_memory
from swiftwan.weights import check
from swiftwan.weights.sources import Shards, Tensors
from swiftwan.weights.write import SHARD_BYTES, TYPES, Slot, appearing, write_json, write_shards

_STEM = "diffusion_pytorch_model"
_TYPE_NAMES = {dtype: name for name, dtype in TYPES.items()}


DRAWN_AT_ONCE = 2**27
"""Random numbers: half a GB of float32. UMT5-XXL's embedding would take 4 GB whole."""


AsLoaded = Callable[[nn.Module, str, nn.Module], nn.Module]
"""(the model, path of a layer in it, the layer, its weights just there) to what shall stand in its place."""

Place = Callable[[str], torch.device]
"""Path of a layer, or of a tensor in it, to where it rests."""


@dataclass(frozen=True)
class LoadReport:
    """What was loaded: ``bytes`` on the device, after conversion."""

    component: str
    tensors: int
    bytes: int
    seconds: float


def load_weights(
    module: nn.Module,
    source: Tensors | Sequence[Path],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    component: str,
    keep_fp32: Sequence[str] = (),
    ignore: Sequence[str] = (),
    rest_on: Place | None = None,
    as_loaded: AsLoaded | None = None,
    is_wanted: Callable[[], bool] = lambda: True,
) -> LoadReport:
    """Fill a module built on meta from a source of tensors, or from safetensors shards.

    Floating-point tensors become ``dtype``, those whose name matches a glob of ``keep_fp32`` float32;
    integers stay as they are. Names and shapes must agree exactly, except for names in the source that match
    a glob of ``ignore``. Tied parameters need to be in it once. Afterwards ``module.reset_buffers``
    is called if there is such a method, for buffers that are computed rather than stored. With ``as_loaded`` a
    layer is changed before the next one is read: so a model that fits in 8 bits only need never be there in 16.
    With ``rest_on`` each tensor goes straight there, or moves there as soon as its layer is whole and changed.

    ``is_wanted`` is asked before each tensor.

    Raises WeightsError for damaged files and for anything missing, unexpected or of another shape; Cancelled once it is
    not wanted.
    """
    started = time.perf_counter()
    device = torch.device(device)
    tensors = Shards(source) if isinstance(source, Sequence) else source
    slots = _slots(module)
    stored = {slot: next((n for n in names if n in tensors.shapes), names[0]) for slot, names in slots.items()}
    twins = {name for names in slots.values() for name in names}
    expected = {name: tuple(slot.shape) for slot, name in stored.items()}
    check.compare(
        expected,
        {n: s for n, s in tensors.shapes.items() if n in expected or n not in twins},
        component,
        ignore=ignore,
    )
    by_name = {name: slot for slot, name in stored.items()}
    layers = _Layers(module, by_name, as_loaded, rest_on)
    total = 0
    # In the order of the source: so one shard after the other is opened, read and let go of.
    for name in filter(by_name.__contains__, tensors.shapes):
        if not is_wanted():
            raise Cancelled(f"{component} is not wanted any more")
        # Layers are changed on the device, where it takes a moment, before they go to rest.
        home = device if rest_on is None or as_loaded is not None else rest_on(name)
        tensor = _convert(tensors.read(name, home), _dtype_of(name, dtype, keep_fp32))
        _assign(module, slots[by_name[name]], tensor)
        total += tensor.nbytes
        layers.has(name)
    tensors.close()
    _finish(module, device if rest_on is None else rest_on(""))
    return LoadReport(component, len(stored), total, time.perf_counter() - started)


def randomize(
    module: nn.Module,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    keep_fp32: Sequence[str] = (),
    seed: int = 0,
    rest_on: Place | None = None,
    as_loaded: AsLoaded | None = None,
) -> None:
    """Fill a module built on meta with random weights made on the device, tensor by tensor.

    All are drawn on the device, wherever they rest: a GPU draws 14 billion numbers in seconds, one thread of a CPU in
    minutes. What rests in host memory beside a GPU is written where the GPU can read it from, once.

    Norm weights are 1 and biases 0; the rest is normal with a standard deviation of 1/sqrt(fan-in), so
    activations keep their size. The same seed gives the same weights on the same kind of device, up to rounding in
    every dtype.
    """
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    slots = _slots(module)
    layers = _Layers(module, [names[0] for names in slots.values()], as_loaded, rest_on)
    for slot, names in slots.items():
        name = names[0]
        wanted = _dtype_of(name, dtype, keep_fp32) if slot.is_floating_point() else slot.dtype
        # What nothing changes goes straight to where it rests, and only what is being drawn is on the device.
        home = device if rest_on is None or as_loaded is not None else rest_on(name)
        tensor = _zeros(slot.shape, wanted, home, device)
        owner, _, leaf = name.rpartition(".")
        if "norm" in type(module.get_submodule(owner)).__name__.lower() and leaf in ("weight", "gamma"):
            tensor.fill_(1)
        elif isinstance(slot, nn.Parameter) and leaf != "bias" and slot.is_floating_point():
            # Linear and Conv weights are (out, in, ...); lone tables (scale_shift_table) are (1, n, dim).
            fan_in = math.prod(slot.shape[1:]) if leaf == "weight" else slot.shape[-1]
            # Drawn in float32 and rounded: drawn in 16 bits they would be other numbers, and no dtype's run comparable.
            for piece in tensor.view(-1).split(DRAWN_AT_ONCE):
                drawn = torch.empty(piece.shape, device=device)
                piece.copy_(drawn.normal_(0, max(fan_in, 1) ** -0.5, generator=generator))
        if rest_on is not None and len(names) > 1:  # one tensor of several layers: all of them get the one that rests
            tensor = tensor.to(rest_on(name))
        _assign(module, names, tensor)
        layers.has(name)
    _finish(module, device if rest_on is None else rest_on(""))


def _zeros(shape: torch.Size, dtype: torch.dtype, home: torch.device, device: torch.device) -> Tensor:
    if home.type == device.type:
        return torch.zeros(shape, dtype=dtype, device=home)
    return host_memory(shape.numel() * dtype.itemsize, locked=device.type == "cuda").view(dtype).view(shape)


class _Layers:
    """Counts the tensors that each layer still lacks; changes it, and moves it, when it has all."""

    def __init__(self, model: nn.Module, names: Iterable[str], change: AsLoaded | None, rest_on: Place | None) -> None:
        self.model, self.change, self.rest_on = model, change, rest_on
        self.lacks = Counter(name.rpartition(".")[0] for name in names)

    def has(self, name: str) -> None:
        path = name.rpartition(".")[0]
        self.lacks[path] -= 1
        if self.lacks[path]:
            return
        if self.change is not None:
            parent, _, leaf = path.rpartition(".")
            layer = self.change(self.model, path, self.model.get_submodule(path))
            setattr(self.model.get_submodule(parent), leaf, layer)
        if self.rest_on is not None:
            bring_own(self.model.get_submodule(path), self.rest_on(path))


def save_weights(
    weights: nn.Module | Mapping[str, Tensor],
    folder: Path,
    component_config: Mapping[str, Any],
    *,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a component as diffusers does: ``config.json`` and ``diffusion_pytorch_model*.safetensors``.

    ``folder`` appears whole or not at all: everything is written beside it, synced, and renamed. An earlier
    version of the component there is replaced; a folder holding anything else is refused.

    Raises OutputError: foreign files in ``folder``, not enough space, no permission.
    """
    tensors = _unique(weights.state_dict() if isinstance(weights, nn.Module) else weights)
    slots = [Slot(name, tuple(tensor.shape), _TYPE_NAMES[tensor.dtype]) for name, tensor in tensors.items()]
    _refuse_foreign_files(folder)
    with appearing(folder, sum(slot.nbytes for slot in slots)) as temporary:
        write_json(temporary / "config.json", component_config)
        write_shards(temporary, _STEM, slots, lambda slot: tensors[slot.name].cpu(), shard_bytes=max_shard_bytes)


def _slots(module: nn.Module) -> dict[Tensor, list[str]]:
    """Each stored tensor with its names: more than one where parameters are tied."""
    slots: dict[Tensor, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        slots.setdefault(tensor, []).append(name)
    return slots


def _dtype_of(name: str, dtype: torch.dtype, keep_fp32: Iterable[str]) -> torch.dtype:
    return torch.float32 if any(fnmatchcase(name, glob) for glob in keep_fp32) else dtype


def _convert(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """On its device already, so that a bfloat16 file crosses the bus as bfloat16."""
    converted = tensor.to(dtype) if tensor.is_floating_point() else tensor
    # On the CPU nothing may have been copied yet, and a view would keep the whole file mapped.
    return converted.clone() if converted.device.type == "cpu" and converted is tensor else converted


def _assign(module: nn.Module, names: Sequence[str], tensor: Tensor) -> None:
    """Put one tensor at all its names; ``names`` come from the module, never from a file."""
    shared: nn.Parameter | None = None
    for name in names:
        owner_path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_path)
        old = owner._parameters.get(leaf)
        if old is None:
            owner._buffers[leaf] = tensor
            continue
        if shared is None:
            shared = nn.Parameter(tensor, requires_grad=old.requires_grad and tensor.is_floating_point())
        owner._parameters[leaf] = shared


def _finish(module: nn.Module, device: torch.device) -> None:
    if reset_buffers := getattr(module, "reset_buffers", None):
        reset_buffers(device)
    left = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
    assert not left, f"still on meta: {', '.join(left)}; {type(module).__name__} needs reset_buffers(device)"


def _unique(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tied tensors once, under their first name."""
    seen: set[tuple[Any, ...]] = set()
    unique = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if not tensor.numel() or key not in seen:
            unique[name] = tensor.detach()
        seen.add(key)
    return unique


def _refuse_foreign_files(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise OutputError(f"{folder} is a file; give the name of a folder")
    ours = ("config.json", f"{_STEM}*.safetensors", f"{_STEM}.safetensors.index.json", check.MANIFEST)
    foreign = [p.name for p in folder.iterdir() if not any(fnmatchcase(p.name, glob) for glob in ours)]
    if foreign:
        raise OutputError(f"{folder} holds {foreign[0]!r}, which would be lost; give a new or empty folder")
