"""A training step's forward and backward pass, recorded once and replayed, so that the GPU never waits for Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Gradients = tuple[Tensor, tuple[Tensor, ...]]
"""A loss and its gradients, one for each parameter."""


def plain(loss: Callable[..., Tensor], parameters: Sequence[Tensor]) -> Callable[..., Gradients]:
    """What :class:`Recorded` replays: computes the loss and its gradients anew at each call. Runs everywhere."""

    def step(*inputs: Tensor) -> Gradients:
        value = loss(*inputs)
        return value.detach(), torch.autograd.grad(value, parameters)

    return step


class Recorded:
    """A function of tensors on one GPU as a CUDA graph, recorded at the first call and replayed at each.

    Args:
        step: takes tensors whose shapes never change, draws no random numbers, reads nothing back to the host.

    The results live in the graph's own memory: each call overwrites the last one's.
    """

    def __init__(self, step: Callable[..., Gradients]) -> None:
        self.step = step
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Gradients:
        if self.graph is None:
            self._record(inputs)
        assert self.graph is not None
        for buffer, value in zip(self.inputs, inputs, strict=True):
            buffer.copy_(value)
        self.graph.replay()
        return self.results

    def _record(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = [value.clone() for value in inputs]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # compiles, and lets each library allocate what it keeps
                self.step(*self.inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = self.step(*self.inputs)
