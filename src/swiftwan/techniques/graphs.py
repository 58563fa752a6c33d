"""A transformer's forward recorded once as a CUDA graph and replayed every step.

Where tokens are few the GPU waits for launches: a guided step of one 832x480 picture with 1.3B takes 63 ms launch by
launch, 33 ms replayed, and 16 ms with ``fused`` and ``batched-cfg`` (H200, benchmarks/h200_forward.jsonl).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from swiftwan.errors import UnavailableError
from swiftwan.models.dit import Condition, Memory
from swiftwan.techniques.base import Slot, Technique

if TYPE_CHECKING:
    from swiftwan.device import Device
    from swiftwan.techniques.costs import Costs
    from swiftwan.weights.build import Parts

Forward = Callable[[Tensor, Tensor, Condition], Tensor]

KEPT = 4
"""Recordings kept of each transformer: guidance takes two, and the next prompt may have other lengths."""


@dataclass(frozen=True)
class CudaGraphs(Technique):
    """Replays each forward as one CUDA graph. Pays for pictures and short clips; takes memory for each text length."""

    name = "cuda-graphs"
    kind = "exact"
    reason = "the same kernels, launched all at once"
    slot = Slot.COMPILE
    switch = "records at the next run"
    claims = ("forward",)
    refuses = MappingProxyType(
        {
            "steps-differ": "a recording does the same at each step; drop one",
            "moving weights": "a recording reads weights where they lay; drop one",
        }
    )

    def missing_on(self, device: Device) -> str:
        return "" if device.capability is not None else "it needs an NVIDIA GPU"

    def cost(self, costs: Costs) -> Costs:
        return replace(costs, graphs=True)

    def install(self, parts: Parts) -> None:
        for transformer in filter(None, (parts.transformer, parts.transformer_2)):
            transformer.takes_opening = False
            # nn.Module calls whatever stands under this name; the class is left as it is.
            transformer.__dict__["forward"] = Replay(transformer.forward)


class Replay:
    """Stands in for a transformer's forward: the first call of a shape records, later ones replay.

    Args:
        forward: reads and writes no tensor but its arguments, its weights and its result.
    """

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.recordings: OrderedDict[Any, Recording] = OrderedDict()
        # Recordings are replayed one at a time, so that they can share the memory of what lies in between.
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, latents: Tensor, timestep: Tensor, condition: Condition, opening: None = None) -> Tensor:
        inputs = (latents, timestep, *tensors(condition))
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if shapes in self.recordings:
            self.recordings.move_to_end(shapes)
        else:
            self.recordings[shapes] = Recording(self.forward, self.pool, latents, timestep, condition)
            if len(self.recordings) > KEPT:
                self.recordings.popitem(last=False)
        return self.recordings[shapes](latents, timestep, condition)


class Recording:
    """One forward as a CUDA graph over buffers of its own.

    Raises:
        UnavailableError: something in the forward cannot be recorded.
    """

    def __init__(self, forward: Forward, pool: Any, latents: Tensor, timestep: Tensor, condition: Condition) -> None:
        self.latents, self.timestep = latents.clone(), timestep.clone()
        self.condition = _copied(condition)
        self.loaded = condition
        arguments = (self.latents, self.timestep, self.condition)
        # A first run outside of the recording, on a stream of its own, lets kernels compile and libraries set up.
        aside = torch.cuda.Stream(latents.device)
        aside.wait_stream(torch.cuda.current_stream(latents.device))
        with torch.cuda.stream(aside):
            forward(*arguments)
        torch.cuda.current_stream(latents.device).wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph, pool=pool):
                self.flow = forward(*arguments)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as problem:
            told = str(problem).partition("\n")[0]
            raise UnavailableError(
                f"the forward cannot be recorded as a CUDA graph: {told}; run without cuda-graphs."
            ) from problem

    def __call__(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        self.latents.copy_(latents)
        self.timestep.copy_(timestep)
        if self.loaded is not condition:
            torch._foreach_copy_(list(tensors(self.condition)), list(tensors(condition)))
            self.loaded = condition
        self.graph.replay()
        return self.flow.clone()


def tensors(condition: Condition) -> Iterator[Tensor]:
    """Every tensor of a condition, always in the same order."""
    yield from condition.rope
    if condition.text_bias is not None:
        yield condition.text_bias
    for memory in condition.memories:
        yield memory.key
        yield memory.value
        if memory.image_key is not None and memory.image_value is not None:
            yield memory.image_key
            yield memory.image_value


def _copied(condition: Condition) -> Condition:
    def copy(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.clone()

    memories = tuple(
        Memory(m.key.clone(), m.value.clone(), copy(m.image_key), copy(m.image_value)) for m in condition.memories
    )
    cos, sin = condition.rope
    return replace(condition, memories=memories, text_bias=copy(condition.text_bias), rope=(cos.clone(), sin.clone()))
