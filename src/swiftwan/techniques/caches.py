"""What one denoising step leaves for the next: changes of the tokens that need not be computed again.

State belongs to a :class:`Condition`, of which each guidance branch, expert and run has its own; so branches never
mix, and a new run begins afresh.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from torch import Tensor

from swiftwan.errors import PlanError
from swiftwan.models.dit import Run, run_blocks
from swiftwan.ops.modulate import Tokens, whole
from swiftwan.techniques.base import Slot, Technique

if TYPE_CHECKING:
    from swiftwan.models.config import KnownModel
    from swiftwan.models.dit import Condition
    from swiftwan.techniques.costs import Costs
    from swiftwan.weights.build import Parts


@dataclass(frozen=True)
class DeepCache(Technique):
    """``deepcache:interval=2,block-num=10``: the first ``block-num`` blocks run every ``interval`` steps; in between,
    what they last added to the tokens is added again (DeepCache, arXiv 2312.00858, on a transformer's early blocks).
    Where no ``block-num`` is asked for, it is a third of the blocks.
    """

    interval: int = 2
    block_num: int = 0

    name = "deepcache"
    kind = "approximate"
    reason = "early blocks change slowly from step to step"
    slot = Slot.SCHEDULE
    switch = "nothing"
    claims = ("blocks.*",)
    makes = frozenset({"steps-differ", "steps-reused"})

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise PlanError(f"deepcache: interval is {self.interval}; it is 1 or more steps.")
        if self.block_num < 0:
            raise PlanError(f"deepcache: block-num is {self.block_num}; it is 1 or more blocks, or 0 for a third.")

    def blocks_of(self, layers: int) -> int:
        """How many of so many blocks are cached."""
        return self.block_num or max(1, layers // 3)

    def fit(self, model: KnownModel) -> list[str]:
        if self.block_num >= (layers := model.transformer.num_layers):
            raise PlanError(f"block-num is {self.block_num}, and '{model.name}' has {layers} blocks; take fewer")
        return []

    def cost(self, costs: Costs) -> Costs:
        layers = costs.sizes.num_layers
        cached = self.blocks_of(layers) / layers * (1 - 1 / self.interval)
        # What was added, for either prediction, and the tokens before, while it is made.
        kept = costs.kept_bytes + 3 * costs.token_bytes
        return replace(costs, kept_bytes=kept, block_share=costs.block_share * (1 - cached))

    def install(self, parts: Parts) -> None:
        for transformer in filter(None, (parts.transformer, parts.transformer_2)):
            transformer.walk = EarlyBlocksCached(self.interval, self.blocks_of(len(transformer.blocks)))


class EarlyBlocksCached:
    """A walk that reuses what the first blocks added."""

    def __init__(self, interval: int, block_num: int) -> None:
        self.interval, self.block_num = interval, block_num
        self.added: WeakKeyDictionary[Condition, tuple[int, Tensor]] = WeakKeyDictionary()

    def __call__(self, run: Run, count: int, x: Tensor, condition: Condition) -> Tokens:
        step, added = self.added.get(condition, (0, None))
        if added is None or step % self.interval == 0:
            before, x = x, whole(run_blocks(run, range(self.block_num), x))
            added = x - before
        else:
            x = x + added
        self.added[condition] = (step + 1, added)
        return run_blocks(run, range(self.block_num, count), x)


@dataclass(frozen=True)
class StepCache(Technique):
    """``step-cache:threshold=0.1``: where the first block adds nearly what it added before, so do all others.

    The first block's change of the tokens is compared with the last computed step's (First Block Cache of
    github.com/chengzeyi/ParaAttention); differences add up until they pass the threshold (as in TeaCache, arXiv
    2411.19108), and then the step is computed whole. The comparison waits for the GPU once a forward.

    Args:
        threshold: relative difference that may add up before a step is computed.
        first, last: so many steps at either end are always computed.
    """

    threshold: float = 0.1
    first: int = 4
    last: int = 1

    name = "step-cache"
    kind = "approximate"
    reason = "a step that hardly differs from the one before adds what that one added"
    slot = Slot.SCHEDULE
    switch = "nothing"
    claims = ("blocks.*",)
    makes = frozenset({"steps-differ", "steps-reused"})

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise PlanError(f"step-cache: threshold is {self.threshold}; it is 0 or more.")
        for option in ("first", "last"):
            if (count := getattr(self, option)) < 0:
                raise PlanError(f"step-cache: {option} is {count}; it is 0 or more steps.")

    def cost(self, costs: Costs) -> Costs:
        # Two changes for either prediction, and the tokens behind the first block.
        return replace(costs, kept_bytes=costs.kept_bytes + 5 * costs.token_bytes, skips=True)

    def install(self, parts: Parts) -> None:
        for transformer in filter(None, (parts.transformer, parts.transformer_2)):
            transformer.walk = StepsCached(self.threshold, self.first, self.last)


@dataclass
class _Seen:
    """What is known of the last computed step of a branch."""

    step: int = 0
    drift: float = 0.0
    first_added: Tensor | None = None
    rest_added: Tensor | None = None


class StepsCached:
    """A walk that skips all blocks but the first where that one says so."""

    def __init__(self, threshold: float, first: int, last: int) -> None:
        self.threshold, self.first, self.last = threshold, first, last
        self.seen: WeakKeyDictionary[Condition, _Seen] = WeakKeyDictionary()

    def __call__(self, run: Run, count: int, x: Tensor, condition: Condition) -> Tokens:
        seen = self.seen.setdefault(condition, _Seen())
        after_first = whole(run(0, x))
        added = after_first - x
        if self._may_skip(seen, added, condition):
            assert seen.rest_added is not None
            seen.step += 1
            return after_first + seen.rest_added
        x = whole(run_blocks(run, range(1, count), after_first))
        self.seen[condition] = _Seen(seen.step + 1, 0.0, added, x - after_first)
        return x

    def _may_skip(self, seen: _Seen, added: Tensor, condition: Condition) -> bool:
        if seen.first_added is None or seen.step < self.first or 0 < condition.calls <= seen.step + self.last:
            return False
        seen.drift += _distance(added, seen.first_added)
        return seen.drift < self.threshold


def _distance(one: Tensor, other: Tensor) -> float:
    """Mean absolute difference, relative to the size of ``other``; a host sync."""
    return ((one - other).abs().mean() / other.abs().mean()).item()
