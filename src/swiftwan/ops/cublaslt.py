"""A product that cuBLASLt has and torch does not offer: 8-bit rows times 8-bit weights, added to what is there already.

torch brings the library and has loaded it; ctypes calls it. Names and numbers are those of cublasLt.h, CUDA 12.9 and 13
(https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api), which says what each call returns.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_OLDEST = 120900
"""Rows and columns of 8-bit floats have scales of their own since CUDA 12.9."""

_COMPUTE_32F, _R_32F, _R_16BF, _R_8F_E4M3 = 68, 0, 14, 28
_TRANS_A, _EPILOGUE, _BIAS_POINTER, _A_SCALE, _B_SCALE, _FAST_ACCUM, _A_MODE, _B_MODE = 3, 7, 8, 17, 18, 25, 31, 32
_TRANSPOSED, _WITH_BIAS, _OUTER_VEC_32F = 1, 4, 3
_MAX_WORKSPACE_BYTES = 1


class _Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t: an algorithm and what is known of it."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("status", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@cache
def _library() -> ctypes.CDLL | None:
    major = (torch.version.cuda or "0").partition(".")[0]
    try:
        found = ctypes.CDLL(f"libcublasLt.so.{major}")
    except OSError as problem:
        log.warning("8-bit products cannot be added in place: up to 2 %% slower (%s)", problem)
        return None
    found.cublasLtGetVersion.restype = ctypes.c_size_t
    if (version := found.cublasLtGetVersion()) < _OLDEST:
        log.warning("cuBLASLt %d cannot add 8-bit products in place, %d can: up to 2 %% slower", version, _OLDEST)
        return None
    return found


def can_add() -> bool:
    """Whether torch's library is new enough for :func:`add_product`; where not, product and sum stay two passes."""
    return _library() is not None


def _call(name: str, *arguments: Any) -> None:
    if status := getattr(_library(), f"cublasLt{name}")(*arguments):
        raise RuntimeError(f"cublasLt{name} returned {status}")


@cache
def _handle(device: torch.device) -> ctypes.c_void_p:
    handle = ctypes.c_void_p()
    _call("Create", ctypes.byref(handle))
    return handle


class _Adding:
    """Descriptors and the algorithm of out (M, O) += x (M, I) w (O, I)^T, for cuBLASLt, which counts columns first:
    out^T (O, M) += w x^T."""

    def __init__(self, device: torch.device, rows: int, width: int, columns: int) -> None:
        self.handle, self.lock = _handle(device), threading.Lock()
        self.task = self._made("MatmulDesc", _COMPUTE_32F, _R_32F)
        self.set(_TRANS_A, ctypes.c_int32(_TRANSPOSED))
        self.set(_FAST_ACCUM, ctypes.c_int8(1))
        self.set(_EPILOGUE, ctypes.c_uint32(_WITH_BIAS))
        for mode in (_A_MODE, _B_MODE):
            self.set(mode, ctypes.c_int32(_OUTER_VEC_32F))
        self.weight = self._layout(_R_8F_E4M3, width, columns)
        self.values = self._layout(_R_8F_E4M3, width, rows)
        self.out = self._layout(_R_16BF, columns, rows)
        self.choice: _Heuristic | None = None

    def _made(self, kind: str, *arguments: Any) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        _call(f"{kind}Create", ctypes.byref(made), *arguments)
        return made

    def _layout(self, dtype: int, height: int, width: int) -> ctypes.c_void_p:
        sizes = (ctypes.c_uint64(height), ctypes.c_uint64(width), ctypes.c_int64(height))
        return self._made("MatrixLayout", dtype, *sizes)

    def set(self, attribute: int, value: Any) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        _call("MatmulDescSetAttribute", self.task, attribute, ctypes.byref(value), size)

    def _choose(self) -> _Heuristic:
        """Ask for an algorithm, which cuBLASLt refuses as long as it does not know where scales and bias lie."""
        wishes, choice, found = self._made("MatmulPreference"), _Heuristic(), ctypes.c_int()
        # No workspace: see swiftwan.ops.products.
        none, size = ctypes.c_size_t(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_size_t))
        _call("MatmulPreferenceSetAttribute", wishes, _MAX_WORKSPACE_BYTES, ctypes.byref(none), size)
        layouts = (self.weight, self.values, self.out, self.out)
        results = (1, ctypes.byref(choice), ctypes.byref(found))
        _call("MatmulAlgoGetHeuristic", self.handle, self.task, *layouts, wishes, *results)
        _call("MatmulPreferenceDestroy", wishes)
        if not found.value:
            raise RuntimeError("cuBLASLt has no kernel for such a product")
        return choice

    def __call__(
        self, out: Tensor, values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor
    ) -> None:
        one, place = ctypes.byref(ctypes.c_float(1.0)), _pointer(out)
        with self.lock:  # the descriptor is one for all
            for attribute, tensor in ((_A_SCALE, weight_scale), (_B_SCALE, scale), (_BIAS_POINTER, bias)):
                self.set(attribute, _pointer(tensor))
            self.choice = self.choice or self._choose()
            factors = (one, _pointer(weight), self.weight, _pointer(values), self.values)
            sums = (one, place, self.out, place, self.out)
            how = (ctypes.byref(self.choice.algorithm), None, ctypes.c_size_t(0))
            stream = ctypes.c_void_p(torch.cuda.current_stream(out.device).cuda_stream)
            _call("Matmul", self.handle, self.task, *factors, *sums, *how, stream)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


_adding = cache(_Adding)


def add_product(out: Tensor, values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> None:
    """``out += (scale * values) @ (weight_scale * weight).T + bias``: the bits of the product and a sum behind it.

    Args:
        out: bfloat16 (M, O).
        values, scale: float8_e4m3fn (M, I), and of each row float32 (M, 1).
        weight, weight_scale: float8_e4m3fn (O, I), and of each row float32 (1, O).
        bias: bfloat16 (O,).

    Raises:
        RuntimeError: cuBLASLt refuses.
    """
    given = (out, values, scale, weight, weight_scale, bias)
    assert all(tensor.is_contiguous() for tensor in given), "the kernel is told no strides"
    assert out.dtype == bias.dtype == torch.bfloat16
    assert values.dtype == weight.dtype == torch.float8_e4m3fn
    with torch.cuda.device_of(out):
        _adding(out.device, *values.shape, out.shape[1])(*given)
