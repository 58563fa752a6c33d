"""FlashAttention-4 for inference; on Hopper without its compiler, once that has done its work.

``import flash_attn.cute`` takes 5 s of a cold start beside an H200, most of it CuTe DSL, which only compiling needs. So
the first process compiles, links what it got as NVIDIA documents it (docs.nvidia.com/cutlass, "Exporting Compiled
Module") and keeps that library, 60 KB, in the user's cache. Later ones load it by apache-tvm-ffi alone: 0.1 s. It is
the same kernel with the same options: the same bits; and a launch takes 0.06 ms of Python instead of 1.6. Without a C
compiler, or without a folder in the cache that is this user's alone (what lies there is executed), every process
imports.

Shapes as in :mod:`swiftwan.ops.attention`.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swiftwan.collector import uncollected
from swiftwan.places import cache_folder
from swiftwan.whole_file import replacing

log = logging.getLogger(__name__)

Attend = Callable[[Tensor, Tensor, Tensor], Any]


class Options(NamedTuple):
    """Of FlashAttention-4's forward pass for heads of 128 on Hopper."""

    tile_mn: tuple[int, int]
    mma_pv_is_rs: bool = False


WIDE = Options((192, 128))
"""The package would take 128 x 128, and a forward longer: TI2V-5B at 1280x704x121 796 instead of 784 ms, 1.3B at
832x480x81 441 instead of 438 (H200, at its limit of 700 W)."""

NARROW = Options((192, 112))
"""Slower at 32,760 keys (10.2 instead of 9.8 ms a block of 1.3B), but a picture's 1560 fill 14 such tiles to 99 % and
13 wide ones to 94: 61 instead of 64 us."""

WIDTH = 128
TYPES = (torch.bfloat16, torch.float16)
PACKAGES = ("flash-attn-4", "nvidia-cutlass-dsl", "apache-tvm-ffi")


@cache
def package() -> Any:
    """``flash_attn.cute.interface``, told to keep what it compiles on disk."""
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(cache_folder() / "flash4"))
    # Said once a compilation, about an argument that we do not pass (flash-attn-4 4.0.0b36, cutlass-dsl 4.8.1).
    warnings.filterwarnings("ignore", message="Argument aux_data .* cannot be converted", category=UserWarning)
    with uncollected():
        return importlib.import_module("flash_attn.cute.interface")


def load() -> Attend:
    """The function for this GPU. Imports the package now unless a kernel is kept: that takes seconds.

    Raises:
        ImportError, AttributeError, OSError: the package cannot be imported.
    """
    if torch.cuda.get_device_capability()[0] != 9:
        attend: Attend = package().flash_attn_func
        return attend
    kernels = {kind: kernel for kind in product(TYPES, (WIDE, NARROW)) if (kernel := kept(*kind))}
    if not kernels:
        package()

    def hopper(q: Tensor, k: Tensor, v: Tensor) -> Any:
        if not _is_ordinary(q, k, v):
            return package().flash_attn_func(q, k, v)
        kind = q.dtype, options_for(k.shape[1])
        if kind not in kernels:
            kernels[kind] = keep(*kind) or partial(imported, kind[1])
        return kernels[kind](q, k, v)

    return hopper


def options_for(keys: int) -> Options:
    """Narrow tiles where they hold so many keys with at least 4 % less to spare, which is what they are slower by."""
    wide, narrow = (-(-keys // tile) * tile for tile in (WIDE.tile_mn[1], NARROW.tile_mn[1]))
    return NARROW if narrow < 0.96 * wide else WIDE


def imported(options: Options, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """What :func:`kept` stands for: the package's own function."""
    return package()._flash_attn_fwd(q, k, v, **options._asdict())


def _is_ordinary(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the one kernel that we keep is for this; for all else the package chooses, or says what is wrong."""
    return (
        q.ndim == k.ndim == 4
        and q.shape[-1] == WIDTH
        and (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:])
        and v.shape == k.shape
        and q.dtype in TYPES
        and q.dtype == k.dtype == v.dtype
        and q.numel() > 0
        and k.numel() > 0
    )


# A kernel in the cache


def kept(dtype: torch.dtype, options: Options) -> Attend | None:
    """The kernel that an earlier process left; None if none did. One that does not load is thrown away."""
    if (file := _file(dtype, options)) is None or not file.is_file():
        return None
    try:
        _check(file)
        # It needs libcute_dsl_runtime.so, whose place it knows, and libtvm_ffi.so, which this import makes global.
        return _calling(importlib.import_module("tvm_ffi").load_module(str(file))["attend"])
    except Exception:  # of the loader; it names no kind
        file.unlink(missing_ok=True)
        return None


def keep(dtype: torch.dtype, options: Options) -> Attend | None:
    """Compile the kernel, leave it for later processes, and load it; None where that cannot be done.

    It is kept only if it has the bits of the package's own call.
    """
    # Triton looks for its compiler in the same places.
    file, compiler = _file(dtype, options), os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if file is None or compiler is None:
        return None
    tokens = torch.linspace(-2, 2, 256 * 2 * WIDTH, device="cuda").to(dtype).view(1, 256, 2, WIDTH)
    sample = (tokens, tokens.flip(1), -tokens)
    try:
        compiled, expected = _compile(options, *sample)
        _link(compiled, file, compiler)
        if (kernel := kept(dtype, options)) is not None and torch.equal(kernel(*sample), expected):
            return kernel
        log.info("FlashAttention-4's kernel does not load, or not as the same, and is not kept")
    except Exception as problem:  # whatever a version of the package lacks for this, it has its own function
        log.info("FlashAttention-4's kernel cannot be kept (%s)", problem)
    file.unlink(missing_ok=True)
    return None


def _compile(options: Options, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, Tensor]:
    """What the package compiles in a first call, and what that call gives."""
    forward = package()._flash_attn_fwd
    theirs, ours = forward.compile_cache, {}  # type: ignore[var-annotated]
    forward.compile_cache = ours
    try:
        out = forward(q, k, v, **options._asdict())[0]
    finally:
        forward.compile_cache = theirs
    (compiled,) = ours.values()
    return compiled, out


def _link(compiled: Any, file: Path, compiler: str) -> None:
    (runtime,) = importlib.import_module("cutlass.cute.runtime").find_runtime_libraries(enable_tvm_ffi=False)
    with TemporaryDirectory(dir=file.parent) as folder:
        made, linked = Path(folder, "attend.o"), Path(folder, "attend.so")
        compiled.export_to_c(object_file_path=str(made), function_name="attend")
        where = f"-Wl,-rpath,{Path(runtime).parent}"
        command = [compiler, "-shared", "-o", str(linked), str(made), runtime, where]
        subprocess.run(command, check=True, capture_output=True)
        content = linked.read_bytes()
    with replacing(file) as half:
        half.write_bytes(content + hashlib.sha256(content).digest())
    file.chmod(0o600)


def _calling(kernel: Callable[..., None]) -> Attend:
    """A kernel with the arguments of FlashAttention-4's forward pass on Hopper (flash_attn/cute/interface.py)."""
    scale = WIDTH**-0.5
    none = (None,) * 9  # lengths, pages, windows, sinks, sparse blocks: nothing of that

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        kernel(_laid_out(q), _laid_out(k), _laid_out(v), out, None, scale, *none, (None, None), None, None)
        return out

    return attend


def _laid_out(x: Tensor) -> Tensor:
    """As the kernel reads it: the width contiguous, and every other stride and the address multiples of 16 bytes."""
    *strides, last = x.stride()
    fits = last == 1 and all(stride and stride % 8 == 0 for stride in strides) and x.data_ptr() % 16 == 0
    return x.detach() if fits else x.detach().clone(memory_format=torch.contiguous_format)


def _file(dtype: torch.dtype, options: Options) -> Path | None:
    """Where the kernel of this kind, GPU and installation lies; None where that folder is not this user's alone."""
    folder = cache_folder() / "flash4-linked"
    try:
        versions = [*map(version, PACKAGES), platform.python_version(), platform.machine()]
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        is_ours_alone = _is_ours_alone(folder)
    except (PackageNotFoundError, OSError):
        return None
    decides = repr((versions, torch.cuda.get_device_capability(), dtype, WIDTH, options))
    return folder / f"{hashlib.sha256(decides.encode()).hexdigest()[:32]}.so" if is_ours_alone else None


def _check(file: Path) -> None:
    """Raises:
    ValueError: another user may have written it, or it is not what was written. A damaged library ends the process.
    """
    content = file.read_bytes()
    if not _is_ours_alone(file) or hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise ValueError(f"{file} is not what was written")


def _is_ours_alone(path: Path) -> bool:
    status = path.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022
