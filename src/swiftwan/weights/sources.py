"""Named tensors that are read one at a time, whatever file they lie in.

A source knows the name, shape and stored type of each tensor before one is read, and reads one when asked.
What a file cannot say (renamed, split or scaled tensors) is a view on another source, so the code that
loads or converts a model knows one interface only.
"""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from swiftwan.errors import UnavailableError, WeightsError
from swiftwan.weights import check

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WEIGHTS_SUFFIXES = (".safetensors", ".gguf", ".pth", ".pt")

_SCALES = (".scale_weight", ".weight_scale")
_BESIDE_SCALES = (*_SCALES, ".scale_input", ".input_scale", ".comfy_quant")
_MARKER = "scaled_fp8"
_SCALABLE = ("F8_E4M3", "F8_E5M2", "F16", "BF16", "F32")


class Tensors(Protocol):
    """A source. ``origin`` is where its tensors come from, for messages; ``paths`` are the files."""

    origin: str
    paths: tuple[Path, ...]

    @property
    def shapes(self) -> Mapping[str, check.Shape]:
        """By name, in the order of the file."""
        ...

    @property
    def dtypes(self) -> Mapping[str, str]:
        """By name: the stored type as safetensors calls it, for example ``BF16``."""
        ...

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """One tensor, on ``device``; on the CPU it may share memory with the file until ``close``."""
        ...

    def close(self) -> None:
        """Let go of files that are held open; reading opens them again."""
        ...


class Shards:
    """The tensors of one or more safetensors files; at most one file is open at a time.

    Raises WeightsError for a damaged file, and for a name that two files have.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.origin = str(self.paths[0] if len(self.paths) == 1 else self.paths[0].parent)
        self.shapes: dict[str, check.Shape] = {}
        self.dtypes: dict[str, str] = {}
        self._homes: dict[str, Path] = {}
        self._open: tuple[Path, Any] | None = None
        for path in self.paths:
            for name, (dtype, shape) in check.read_header(path).items():
                if name in self._homes:
                    raise WeightsError(f"{name!r} is in both {self._homes[name]} and {path}; one of them is stale")
                self.shapes[name], self.dtypes[name], self._homes[name] = shape, dtype, path

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        from safetensors import safe_open

        path = self._homes[name]
        if self._open is None or self._open[0] != path:
            # Opened on the CPU: the pages are read as the copy needs them, and leave with the file.
            self._open = (path, safe_open(path, framework="pt", device="cpu"))
        return self._open[1].get_tensor(name).to(device)

    def close(self) -> None:
        self._open = None


class PthFile:
    """The tensors of a PyTorch file, mapped and never unpickled: ``weights_only=True`` builds tensors alone.

    Raises WeightsError for a file that asks for anything else, is truncated, or holds no plain dict.
    """

    def __init__(self, path: Path) -> None:
        self.origin = str(path)
        self.paths: tuple[Path, ...] = (path,)
        self._path = path
        self._tensors: dict[str, Tensor] | None = self._load()
        self.shapes: dict[str, check.Shape] = {name: tuple(t.shape) for name, t in self._tensors.items()}
        self.dtypes: dict[str, str] = {name: _dtype_name(t) for name, t in self._tensors.items()}

    def _load(self) -> dict[str, Tensor]:
        import torch

        path = self._path
        if not zipfile.is_zipfile(path):
            raise WeightsError(f"{path} is no PyTorch file, or is truncated: its table is missing; download it again")
        try:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # noqa: TID251
        except Exception as error:  # the file decides what goes wrong in there
            asked = re.search(r"GLOBAL (\S+)", str(error))
            why = f"it asks for {asked[1]}" if asked else type(error).__name__
            raise WeightsError(
                f"{path} cannot be read as tensors alone ({why}); swiftwan runs no code from a file: "
                "take the model as safetensors"
            ) from None
        if not isinstance(content, dict) or not content:
            raise WeightsError(f"{path} holds a {type(content).__name__}, not named tensors; take another file")
        for name, tensor in content.items():
            if not isinstance(name, str) or type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
                raise WeightsError(
                    f"{path}: its {name!r} is a {type(tensor).__name__}, not a tensor; take another file"
                )
        return content

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        if self._tensors is None:
            self._tensors = self._load()
        return self._tensors[name].to(device)

    def close(self) -> None:
        self._tensors = None


class GgufFile:
    """The tensors of a GGUF file, dequantised one by one to float32 by the ``gguf`` package.

    Shapes are PyTorch's, outermost axis first. ``comfy.gguf.orig_shape.NAME``, which ComfyUI's packer writes
    for tensors that GGUF could not hold, is followed. ``dtypes`` says BF16 for quantised tensors.

    Raises UnavailableError without that package, WeightsError for a damaged file or an unknown type.
    """

    def __init__(self, path: Path) -> None:
        gguf = _gguf_package(path)
        self.origin = str(path)
        self.paths: tuple[Path, ...] = (path,)
        self._path, self._gguf = path, gguf
        self._entries: dict[str, Any] | None = None
        try:
            reader = gguf.GGUFReader(path)
            self._entries = {entry.name: entry for entry in reader.tensors}
            self.shapes: dict[str, check.Shape] = {n: _gguf_shape(reader, e) for n, e in self._entries.items()}
        except Exception as error:  # gguf names no errors: ValueError, IndexError, KeyError and numpy's own
            raise WeightsError(f"{path} is damaged or truncated ({error}); download it again") from None
        types = {name: entry.tensor_type.name for name, entry in self._entries.items()}
        plain = {"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"}
        self.dtypes: dict[str, str] = {name: kind if kind in plain else "BF16" for name, kind in types.items()}
        field = reader.fields.get("general.architecture")
        self.architecture = str(field.contents()) if field else "unknown"

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        import torch

        if self._entries is None:
            self._entries = {entry.name: entry for entry in self._gguf.GGUFReader(self._path).tensors}
        entry = self._entries[name]
        try:
            values = _dequantize(self._gguf.quants.dequantize, entry)
        except NotImplementedError:
            raise WeightsError(f"{self._path}: {name} is stored as {entry.tensor_type.name}, unknown to gguf") from None
        return torch.from_numpy(values).reshape(self.shapes[name]).to(device)

    def close(self) -> None:
        self._entries = None


@dataclass(frozen=True)
class Piece:
    """Where a tensor of ours lies: ``name`` in the file, part ``part`` of ``of`` along the first axis, after
    ``drop`` leading axes of size 1 are left away."""

    name: str
    part: int = 0
    of: int = 1
    drop: int = 0

    def shape(self, stored: check.Shape) -> check.Shape:
        if self.drop and any(size != 1 for size in stored[: self.drop]):
            return stored
        shape = stored[self.drop :]
        return shape if self.of == 1 or not shape else (shape[0] // self.of, *shape[1:])


class Renamed:
    """Another source under our names; what ``names`` does not mention is not seen."""

    def __init__(self, source: Tensors, names: Mapping[str, Piece]) -> None:
        self.origin, self.paths = source.origin, source.paths
        self._source, self._names = source, names
        self.shapes: dict[str, check.Shape] = {
            ours: piece.shape(source.shapes[piece.name]) for ours, piece in names.items()
        }
        self.dtypes: dict[str, str] = {ours: source.dtypes[piece.name] for ours, piece in names.items()}

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        piece = self._names[name]
        tensor = self._source.read(piece.name, device)
        if piece.of > 1:
            rows = tensor.shape[piece.drop] // piece.of
            tensor = tensor.narrow(piece.drop, piece.part * rows, rows).clone()  # a view would keep the others
        return tensor.reshape(self.shapes[name])

    def close(self) -> None:
        self._source.close()


class Scaled:
    """fp8 tensors as ComfyUI packs them: a weight is its stored value times ``NAME.scale_weight``.

    Newer files call it ``weight_scale``; there is one a tensor or one a row. Scales, input scales and the
    marker ``scaled_fp8`` are not seen. A tensor without a scale is taken as it is.

    Raises WeightsError for weights packed in another type, which a scale alone does not bring back.
    """

    def __init__(self, source: Tensors) -> None:
        self.origin, self.paths = source.origin, source.paths
        self._source = source
        self._scales = {}
        for name in source.shapes:
            if name.endswith(_SCALES):
                self._scales[f"{name.rpartition('.')[0]}.weight"] = name
        self.shapes: dict[str, check.Shape] = {n: s for n, s in source.shapes.items() if not _is_beside(n)}
        self.dtypes: dict[str, str] = {name: source.dtypes[name] for name in self.shapes}
        for name, scale in self._scales.items():
            stored = self.dtypes.get(name)
            rows = self.shapes.get(name, (0,))[0]
            size = math.prod(source.shapes[scale])
            if stored is not None and stored not in _SCALABLE:
                raise WeightsError(f"{self.origin}: {name} is packed as {stored}; of packed files only fp8 is read")
            if size not in (1, rows):
                raise WeightsError(f"{self.origin}: {scale} has {size} scales for {rows} rows; it needs 1 or {rows}")

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        tensor = self._source.read(name, device)
        if name not in self._scales:
            return tensor
        scale = self._source.read(self._scales[name], device).float()
        return tensor.float() * scale.reshape(-1, *[1] * (tensor.ndim - 1))

    def close(self) -> None:
        self._source.close()


def open_file(path: Path) -> Tensors:
    """The tensors of a weights file; its first bytes say which format it has, not its name.

    Raises WeightsError: missing, damaged, of no known format, or asking for code to run; UnavailableError
    for a GGUF without the ``gguf`` package.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
    openers: dict[bytes, Callable[[Path], Tensors]] = {b"PK\x03\x04": PthFile, b"GGUF": GgufFile}
    source = openers.get(start, lambda path: Shards((path,)))(path)
    return Scaled(source) if any(map(_is_beside, source.shapes)) else source


def _is_beside(name: str) -> bool:
    return name.endswith(_BESIDE_SCALES) or name.rpartition(".")[2] == _MARKER


def _dtype_name(tensor: Tensor) -> str:
    names = {
        "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
        "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
        "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    }  # fmt: skip
    return names.get(str(tensor.dtype).removeprefix("torch."), str(tensor.dtype))


def _gguf_package(path: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise UnavailableError(
            f"{path} is a GGUF file, and the package that reads it is not installed: pip install 'swiftwan[gguf]'"
        ) from None
    return gguf


def _dequantize(dequantize: Callable[..., Any], entry: Any) -> Any:
    """Rows in blocks and threads: gguf makes several temporaries of a whole tensor, which leave the cache.

    Q8_0, 5120 x 13,824, two busy cores: 36 million values a second at once, 199 in blocks of 64 rows.
    """
    import numpy as np

    rows = entry.data.reshape(-1, entry.data.shape[-1]) if entry.data.ndim else entry.data.reshape(1, 1)
    values = np.empty((len(rows), math.prod(entry.shape.tolist()) // max(len(rows), 1)), np.float32)

    def fill(start: int) -> None:
        values[start : start + 64] = dequantize(rows[start : start + 64], entry.tensor_type)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, range(0, len(rows), 64)))
    return values


def _gguf_shape(reader: Any, entry: Any) -> check.Shape:
    shape = tuple(int(n) for n in reversed(entry.shape.tolist()))
    if field := reader.fields.get(f"comfy.gguf.orig_shape.{entry.name}"):
        told = tuple(int(n) for n in field.contents())
        if math.prod(told) != math.prod(shape):
            raise ValueError(f"{entry.name} has {math.prod(shape)} values for a shape of {told}")
        return told
    return shape
