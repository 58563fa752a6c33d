"""Transformer blocks that rest in host memory and come to the device as they are needed.

Two slots of device memory take turns: while one block computes, the next one's bytes are copied into the other
slot on a stream of their own, from pinned memory, one copy a block. A block's parameters are views of its slot
for good, so nothing is assigned in the loop, and the host can run ahead without taking more memory: the
copy waits on the device for the block that used the slot before. Where a block computes longer than its copy
takes, this costs nothing (0.7 GB of a 14B block: 13 ms at PCIe 5's 55 GB/s).
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_ALIGN = 256
"""Bytes; what CUDA's allocator and its vector loads want."""


class _Locked(mmap.mmap):
    """Host memory that a GPU reads by itself. torch's own allocator rounds each piece up to a power of two, which makes
    40 blocks of 0.7 GB take 41 GB instead of 28."""

    def __new__(cls, size: int) -> _Locked:
        memory = super().__new__(cls, -1, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux: pages of 2 MB are made and locked in a fraction of the time
            memory.madvise(mmap.MADV_HUGEPAGE)
        # Writing makes the pages, by all threads at once; to lock them first would make them one after the other.
        memory.address = torch.frombuffer(memory, dtype=torch.uint8).zero_().data_ptr()
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.address, size, 0))
        return memory

    address: int

    def __del__(self) -> None:
        if not sys.is_finalizing():
            torch.cuda.cudart().cudaHostUnregister(self.address)


def host_memory(size: int, locked: bool) -> Tensor:
    """So many zero bytes of host memory, locked in place where a GPU is to copy from it."""
    return (
        torch.frombuffer(_Locked(max(size, 1)), dtype=torch.uint8)[:size]
        if locked
        else torch.zeros(size, dtype=torch.uint8)
    )


class Slots:
    """Two stretches of device memory, each with the block it holds; shared by all streamed models of a run.

    Between a transformer's turns the memory is given back, 1.4 GB for blocks of 14B; views of it stay good.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.memory = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self.holds: list[object | None] = [None, None]
        self.copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.used = [torch.cuda.Event() for _ in range(2)] if self.copying else []

    def enter(self, component: str) -> None:
        """Hold memory for a transformer's turn, and none for another component's."""
        if component.startswith("transformer"):
            self.come()
        else:
            self.leave()

    def come(self) -> None:
        """Take memory, if there is none."""
        if self.memory[0].untyped_storage().size():
            return
        for memory in self.memory:
            memory.untyped_storage().resize_(self.size)
        if self.copying is not None:  # what computed in that memory before must be done with it
            self.copying.wait_stream(torch.cuda.current_stream())

    def leave(self) -> None:
        """Give the memory back, behind the last copy into it."""
        if self.copying is not None:
            torch.cuda.current_stream().wait_stream(self.copying)
        self.holds = [None, None]
        for memory in self.memory:
            memory.untyped_storage().resize_(0)

    def fill(self, slot: int, block: StreamedBlock) -> None:
        """Begin to copy a block into its slot, behind whatever computes there now; no host sync."""
        if self.holds[slot] is block:
            return
        self.holds[slot] = block
        target = self.memory[slot][: block.bytes.numel()]
        if self.copying is None:
            target.copy_(block.bytes)
            return
        with torch.cuda.stream(self.copying):
            self.copying.wait_event(self.used[slot])
            target.copy_(block.bytes, non_blocking=True)
            block.copied.record(self.copying)


class StreamedBlock(nn.Module):
    """A block whose parameters are views of a slot, filled before each use.

    Args:
        inner: the block; its parameters move to host memory, pinned where there is CUDA.
        slots, slot: where it computes.
    """

    def __init__(self, inner: nn.Module, slots: Slots, slot: int) -> None:
        super().__init__()
        self.inner = inner
        self.slots, self.slot = slots, slot
        self.next: list[StreamedBlock] = []  # one or none; an attribute would make it a child
        self.bytes = host_memory(size_of(inner), locked=slots.copying is not None)
        if slots.copying is not None:
            self.copied = torch.cuda.Event()
        _move(inner, self.bytes, slots.memory[slot])

    def forward(self, *args: Any) -> Any:
        return self._with_weights(self.inner, *args)

    def remember(self, *args: Any) -> Any:
        return self._with_weights(self.inner.remember, *args)

    @contextmanager
    def edited(self) -> Iterator[None]:
        """While the weights lie in the slot, to be read and written; what is written then stays."""
        self.slots.come()
        self.slots.fill(self.slot, self)
        if self.slots.copying is not None:
            torch.cuda.current_stream().wait_event(self.copied)
        yield
        self.bytes.copy_(self.slots.memory[self.slot][: self.bytes.numel()])

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the block alone: copies and events stay outside the graph."""
        self.inner.compile(*args, **options)

    def _with_weights(self, work: Any, *args: Any) -> Any:
        self.slots.fill(self.slot, self)
        if self.slots.copying is None:
            return work(*args)
        compute = torch.cuda.current_stream()
        compute.wait_event(self.copied)
        for block in self.next:
            self.slots.fill(block.slot, block)
        result = work(*args)
        self.slots.used[self.slot].record(compute)
        return result


def stream(blocks: nn.ModuleList, resident: int, slots: Slots) -> None:
    """Keep the first ``resident`` blocks where they are and stream the others, in a circle."""
    streamed = [StreamedBlock(block, slots, i % 2) for i, block in enumerate(blocks[resident:])]
    for one, other in zip(streamed, [*streamed[1:], *streamed[:1]], strict=True):
        if other.slot != one.slot:
            one.next.append(other)
    for i, block in enumerate(streamed, resident):
        blocks[i] = block


def bring(module: nn.Module, device: torch.device) -> None:
    """Move what is elsewhere to ``device``; ``module.to`` cannot swap quantized tensors while others hold them."""
    for owner in module.modules():
        bring_own(owner, device)


def bring_own(owner: nn.Module, device: torch.device) -> None:
    """Move a layer's own parameters and buffers, not those of layers inside it."""
    device = torch.empty(0, device=device).device  # "cuda" has an index, too
    for name, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
        plain = list(plain_tensors(tensor))
        if any(part.device != device for part in plain):
            put(owner, name, rebuilt(tensor, {id(part): part.detach().to(device) for part in plain}))


def put(owner: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a parameter or buffer that ``owner`` has."""
    if name in owner._parameters:
        owner._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[name] = tensor


def size_of(module: nn.Module) -> int:
    """Bytes of its parameters and buffers, each aligned."""
    return sum(_aligned(tensor.nbytes) for tensor in _tensors(module))


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _move(module: nn.Module, host: Tensor, slot: Tensor) -> None:
    """Copy a module's tensors to ``host`` and make them views of ``slot``."""
    at = 0
    views: dict[int, Tensor] = {}
    for tensor in _tensors(module):
        piece = slice(at, at + tensor.nbytes)
        host[piece].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        views[id(tensor)] = slot[piece].view(tensor.dtype).view(tensor.shape)
        at += _aligned(tensor.nbytes)
    for owner in module.modules():
        for name, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
            put(owner, name, rebuilt(tensor, views))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Plain tensors, those inside a quantized one (torchao's are tensor subclasses) one by one."""
    for tensor in (*module.parameters(), *module.buffers()):
        yield from plain_tensors(tensor)


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor itself, or those that a quantized one (a tensor subclass of torchao) is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from plain_tensors(getattr(tensor, name))


def rebuilt(tensor: Tensor, views: dict[int, Tensor]) -> Tensor:
    """The same tensor made of others: ``views`` has one for the id of each of its plain tensors."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return views[id(tensor)]
    names, context = tensor.__tensor_flatten__()
    inner = {name: rebuilt(getattr(tensor, name), views) for name in names}
    kind: Any = type(tensor)
    whole: Tensor = kind.__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())
    return whole
