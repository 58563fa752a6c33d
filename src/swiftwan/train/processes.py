"""Several GPUs, or too small a one: who trains on what, and where the frozen weights rest.

    accelerate launch --num_processes 2 -m swiftwan train lora ...

Each process trains on batches of its own, and the adapters' gradients, which are small, are averaged. Frozen weights
are whole on each device, or sharded over all (FSDP2), or in host memory; then a block's come as it computes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swiftwan.models.dit import Block, WanTransformer

Weights = Literal["whole", "sharded", "offloaded"]


class Processes:
    """The processes that train together; one where nothing was launched.

    Attributes:
        rank, count: which this is, of how many.
    """

    def __init__(self, device: torch.device, weights: Weights = "whole") -> None:
        self.device = device
        self.rank, self.count = rank_and_count()
        if self.count > 1:
            from accelerate import PartialState

            self._state = PartialState(cpu=device.type == "cpu")
        elif weights != "whole" and not dist.is_initialized():
            # FSDP2 moves weights between host and device for a single process as well.
            kind = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(kind, store=dist.HashStore(), rank=0, world_size=1)

    @property
    def is_first(self) -> bool:
        """Whether this one writes files."""
        return self.rank == 0

    @contextmanager
    def first_then_others(self) -> Iterator[None]:
        """Run a block in the first process alone, and in the others when it is done."""
        with self._state.main_process_first() if self.count > 1 else nullcontext():
            yield

    def average(self, parameters: Iterable[Tensor]) -> None:
        """Average gradients in place over all processes."""
        if self.count == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.count
        for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(piece.view_as(gradient))


def rank_and_count() -> tuple[int, int]:
    """As the launcher says."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def local_device() -> str | None:
    """The GPU of this process; None where nothing was launched, or without GPUs."""
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return None


def shard(
    transformer: WanTransformer, adapters: Sequence[nn.Parameter], device: torch.device, weights: Weights
) -> None:
    """Shard the blocks' frozen weights over the processes, or rest them in host memory (FSDP2's fully_shard).

    The adapters, and what lies outside of the blocks, stay whole on the device. So do the few layers that a prompt's
    keys and values come from: they work before the block does, in ``condition``.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy: Any = CPUOffloadPolicy(pin_memory=device.type == "cuda") if weights == "offloaded" else OffloadPolicy()
    learning = set(adapters)
    for block in transformer.blocks:
        early = _used_by_remember(cast(Block, block))
        whole = {parameter for module in early for parameter in module.parameters()} | learning
        fully_shard(block, mesh=mesh, offload_policy=policy, ignored_params=whole & set(block.parameters()))
    for parameter in transformer.parameters():
        if not isinstance(parameter, dist.tensor.DTensor):
            parameter.data = parameter.data.to(device)


def _used_by_remember(block: Block) -> list[nn.Module]:
    cross = block.attn2
    names = ("to_k", "to_v", "norm_k", "add_k_proj", "add_v_proj", "norm_added_k")
    return [getattr(cross, name) for name in names if hasattr(cross, name)]
