"""Whole models that leave the device while they are not needed, and come back without a change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from swiftwan.models.streaming import host_memory, plain_tensors, put, rebuilt


class Parked:
    """A model whose weights rest in host memory, pinned where there is CUDA, with a copy on the device while it works.

    The host's copy stays, so leaving the device copies nothing: it only lets go.

    Args:
        model: its weights may lie anywhere; they are in host memory afterwards.
        device: where it works.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.here = False
        pin = device.type == "cuda"
        self._host: list[tuple[nn.Module, str, Tensor]] = []
        for owner in model.modules():
            for name, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
                copies = {id(plain): _to_host(plain, pin) for plain in plain_tensors(tensor)}
                self._host.append((owner, name, rebuilt(tensor, copies)))
                put(owner, name, self._host[-1][2])  # at once, so that no more than one tensor is there twice

    def come(self) -> None:
        """Bring the weights to the device."""
        if self.here:
            return
        for owner, name, host in self._host:
            copies = {id(plain): plain.to(self.device, non_blocking=True) for plain in plain_tensors(host)}
            put(owner, name, rebuilt(host, copies))
        self.here = True

    def leave(self) -> None:
        """Give the device's memory back."""
        for owner, name, host in self._host:
            put(owner, name, host)
        self.here = False

    def before(self, *call: Any) -> None:
        """:meth:`come`, as a hook."""
        self.come()

    def after(self, *call: Any) -> None:
        """:meth:`leave`, as a hook."""
        self.leave()


def take_turns(blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Keep blocks in host memory; each is on the device while it computes, and no longer.

    Nothing is prefetched: a block of a text encoder computes a prompt in less time than its copy takes.
    """
    for block in blocks:
        parked = Parked(block, device)
        block.register_forward_pre_hook(parked.before)
        block.register_forward_hook(parked.after, always_call=True)


def _to_host(tensor: Tensor, pin: bool) -> Tensor:
    if not pin:
        return tensor.detach().cpu()
    if tensor.device.type == "cpu" and tensor.is_pinned():
        return tensor.detach()
    host = host_memory(tensor.nbytes, locked=True).view(tensor.dtype).view(tensor.shape)
    return host.copy_(tensor.detach())
