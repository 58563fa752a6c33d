"""Attention over (B, L, H, E): batch, tokens, heads, head width. Every kernel has this one signature.

Measured on one H200 in bf16, 12 heads x 32,760 tokens x 128: torch's own choice 352 TFLOP/s, cuDNN 596 to 625,
FlashAttention-4 708. ``fp8`` is ours (:mod:`swiftwan.ops.attention_fp8`), ``fp8-plain`` its reference.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftwan.ops.fp8 import Rounded

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q, k, v), each (B, L, H, E), to (B, L, H, E)."""

AttendForLinear = Callable[[Tensor, Tensor, Tensor], Tensor | Rounded]
"""The same or, where an 8-bit layer reads it, its bytes: values (B, L, H, E), scale (B, L, 1, 1)."""

Capability = tuple[int, int] | None
"""CUDA compute capability of a device; None where it has none."""


# The reference


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch's scaled_dot_product_attention: the reference, and the kernel that runs everywhere.

    Args:
        q: (B, L, H, E).
        k, v: (B, S, H, E).
        bias: added to the scores, broadcastable to (B, H, L, S).
    """
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias)
    return out.transpose(1, 2)


def norm_attend(
    q: Tensor,
    weight: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    eps: float,
    attend: Callable[..., Tensor] = sdpa,
) -> Tensor:
    """Cross-attention between its linear layers: RMS norm of q over its whole width, then attention to the text.

    Args:
        q: (B, L, D), or (1, L, D) where all B prompts still see the same video.
        weight: of the norm, (D,).
        key, value: (B, S, H, E).
        bias: added to the scores, broadcastable to (B, H, L, S).
        attend: :func:`sdpa` or what computes the same.

    Returns:
        (B, L, D).
    """
    q = F.rms_norm(q, q.shape[-1:], weight, eps).unflatten(-1, key.shape[-2:])
    return attend(q.expand(len(key), -1, -1, -1), key, value, bias).flatten(2)


# Kernels for self-attention


@dataclass(frozen=True)
class Kernel:
    """One implementation of :data:`Attend`, and what it needs.

    Attributes:
        kind: exact, or near for 8-bit arithmetic.
        load: imports what it needs and returns the function, always the same one.
        load_for_bytes: the same, of a function whose result an 8-bit layer reads as it is; None where there is none.
        package: distribution that brings it, if it is not torch's own.
        install: what to hand to pip for it, where a plain name in quotes does not do.
        capability: least CUDA compute capability; None runs on any device.
        until: the first that has other tensor cores, which it cannot use; None if there is none.
        half: whether it takes bf16 and fp16 only.
        widths: of a head, that it takes; empty takes any.
    """

    name: str
    kind: str
    load: Callable[[], Attend]
    package: str | None = None
    install: str | None = None
    capability: Capability = None
    until: Capability = None
    half: bool = True
    widths: tuple[int, ...] | range = ()
    load_for_bytes: Callable[[], AttendForLinear] | None = None

    def missing_on(self, capability: Capability) -> str:
        """What a device of this compute capability, or this installation, lacks to run it; empty if nothing."""
        if self.capability is not None and (capability is None or capability < self.capability):
            return f"it needs an NVIDIA GPU of compute capability {self.capability[0]}.{self.capability[1]} or more"
        if self.until is not None and capability is not None and capability >= self.until:
            return (
                f"it is written for the tensor cores of GPUs before compute capability {self.until[0]}.{self.until[1]}"
            )
        if self.package is not None and not _installed(self.package):
            return f"the package is missing: pip install {self.install or repr(self.package)}"
        return ""

    @property
    def widths_told(self) -> str:
        """The widths in words."""
        if isinstance(self.widths, range):
            return f"{self.widths[0]} to {self.widths[-1]}"
        return " or ".join(map(str, self.widths))


def kernel(name: str) -> Kernel:
    """Look a kernel up.

    Raises:
        KeyError: there is none of that name.
    """
    return {kernel.name: kernel for kernel in KERNELS}[name]


def _installed(package: str) -> bool:
    try:
        return version(package) != "0.0.0"  # what PyPI has by the name of flash-attn-3: nothing
    except PackageNotFoundError:
        return False


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v)


@cache
def _load_flash4() -> Attend:
    from swiftwan.ops import flash4

    return opaque("flash4", flash4.load())


@cache
def _load_fp8() -> Attend:
    return opaque("fp8", importlib.import_module("swiftwan.ops.attention_fp8_gluon").attend)


@cache
def _load_fp8_for_bytes() -> AttendForLinear:
    function = importlib.import_module("swiftwan.ops.attention_fp8_gluon").attend_for_bytes
    return opaque_for_bytes("fp8_for_bytes", function)


def _load_fp8_plain() -> Attend:
    from swiftwan.ops.attention_fp8 import plain_fp8

    return plain_fp8


FLASH3_WHEEL = "--no-deps --index-url https://download.pytorch.org/whl/cu130 flash-attn-3"
"""Built by PyTorch for torch 2.9 and later, for Hopper alone (its CI installs the same one); cu126 to cu130."""


@cache
def _load_flash3() -> Attend:
    return opaque("flash3", importlib.import_module("flash_attn_interface").flash_attn_func)


def _flash2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own build of FlashAttention-2, and nothing else: what it does not take is an error."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa(q, k, v)


@cache
def _load_sage() -> Attend:
    """SageAttention of any version; 2.x smooths keys whatever it is told, and a second time that changes nothing.

    1.0.6 counts the keys that it pads to a multiple of 64 as keys of score 0, the mean of a row's scores: of L tokens'
    weight they take at most their share in L, 0.02 % for the 8 of 832x480x81.
    """
    sageattn = importlib.import_module("sageattention").sageattn

    def sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # The same constant of all keys changes no weight, and leaves less to round. 1.0.6 would subtract it in place.
        smooth = k - k.mean(dim=1, keepdim=True)
        attended: Tensor = sageattn(q, smooth, v, tensor_layout="NHD", smooth_k=False)
        return attended

    return opaque("sage", sage)


def opaque(name: str, function: Callable[..., Any], options: str = "") -> Callable[..., Tensor]:
    """An operator that ``torch.compile`` calls without looking inside; some kernels also return a log-sum-exp.

    Args:
        function: of q, k, v, and what ``options`` declares, such as ``, float keep``.
    """

    def attend(*given: Any) -> Tensor:
        out = function(*given)
        return out[0] if isinstance(out, tuple) else out

    def result(q: Tensor, *given: Any) -> Tensor:
        return torch.empty_like(q, memory_format=torch.contiguous_format)

    op: Callable[..., Tensor] = _operator(name, f"(Tensor q, Tensor k, Tensor v{options}) -> Tensor", attend, result)
    return op


def opaque_for_bytes(name: str, function: Callable[..., Rounded], options: str = "") -> Callable[..., Rounded]:
    """:func:`opaque` for a function whose result an 8-bit layer reads."""

    def attend(*given: Any) -> tuple[Tensor, ...]:
        return tuple(function(*given))

    def result(q: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        values = torch.empty(q.shape, dtype=torch.float8_e4m3fn, device=q.device)
        return values, torch.empty(*q.shape[:2], 1, 1, dtype=torch.float32, device=q.device)

    op = _operator(name, f"(Tensor q, Tensor k, Tensor v{options}) -> (Tensor, Tensor)", attend, result)
    return lambda *given: Rounded(*op(*given))


def _operator(name: str, schema: str, attend: Callable[..., Any], result: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.ops.swiftwan.NAME``, which calls ``attend``; of ``result``, empty, the compiler learns the shapes."""
    # Not ``custom_op``: its first call imports torch's compiler, a second of every cold start.
    qualname = f"swiftwan::{name}"
    torch.library.define(qualname, schema)
    torch.library.impl(qualname, "CompositeExplicitAutograd", attend)
    torch.library.register_fake(qualname, result)
    op: Callable[..., Any] = getattr(torch.ops.swiftwan, name).default
    return op


KERNELS = (
    Kernel("sdpa", "exact", lambda: sdpa, half=False),
    Kernel("cudnn", "exact", lambda: _cudnn, capability=(8, 0)),
    Kernel("flash4", "exact", _load_flash4, "flash-attn-4", "'swiftwan[flash4]'", capability=(9, 0)),
    Kernel("flash3", "exact", _load_flash3, "flash-attn-3", FLASH3_WHEEL, capability=(9, 0), until=(10, 0)),
    Kernel("flash2", "exact", lambda: _flash2, capability=(8, 0), widths=range(1, 257)),
    Kernel("sage", "near", _load_sage, "sageattention", capability=(8, 0), widths=(64, 96, 128)),
    Kernel(
        "fp8",
        "near",
        _load_fp8,
        "triton",
        capability=(9, 0),
        until=(10, 0),
        widths=(128,),
        load_for_bytes=_load_fp8_for_bytes,
    ),
    Kernel("fp8-plain", "near", _load_fp8_plain, half=False),
)
"""Every kernel that ``attention:NAME`` takes."""
