"""The first and the last calls of a transformer in a run, which set a clip's layout and its details."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

if TYPE_CHECKING:
    from swiftwan.models.dit import Condition, WanTransformer
    from swiftwan.ops.attention import AttendForLinear
    from swiftwan.ops.fp8 import Rounded


class Ends:
    """A pre-hook of a transformer, which counts its calls, each guidance branch by itself.

    Args:
        first, last: so many calls at either end of a run are meant.

    Attributes:
        now: whether the call that is under way is one of them.
    """

    def __init__(self, first: int, last: int = 0) -> None:
        self.first, self.last = first, last
        self.calls: WeakKeyDictionary[Condition, int] = WeakKeyDictionary()
        self.now = False

    def __call__(self, transformer: WanTransformer, inputs: tuple[Any, ...]) -> None:
        condition = inputs[2]
        done = self.calls.get(condition, 0)
        self.calls[condition] = done + 1
        self.now = done < self.first or 0 < condition.calls <= done + self.last


class OtherAtEnds:
    """An attention kernel that gives way to another one in the first and last steps."""

    def __init__(self, between: AttendForLinear, at_ends: AttendForLinear, ends: Ends) -> None:
        self.between, self.at_ends, self.ends = between, at_ends, ends

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor | Rounded:
        return (self.at_ends if self.ends.now else self.between)(q, k, v)


class LinearOtherAtEnds(nn.Module):
    """A linear in few bits that gives way to its 16-bit original in the first and last steps; both stay in memory."""

    ends: Ends

    def __init__(self, between: nn.Module, at_ends: nn.Module) -> None:
        super().__init__()
        self.between, self.at_ends = between, at_ends

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (self.at_ends if self.ends.now else self.between)(x)
        return out
