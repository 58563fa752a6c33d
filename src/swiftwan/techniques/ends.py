"""Which calls of a transformer are among the first or the last of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from swiftwan.models.dit import Condition, WanTransformer


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
