"""Techniques changed on a loaded model: all that can be are taken off, and those of the new plan put on."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, cast

from swiftwan.errors import PlanError
from swiftwan.models.dit import all_blocks, each_block, project
from swiftwan.models.dit_layers import GELU, linear_gelu
from swiftwan.ops.attention import sdpa
from swiftwan.ops.block import PLAIN
from swiftwan.ops.fp8 import Fp8Linear, multiply, scaled_product
from swiftwan.techniques.base import RELOAD, Technique
from swiftwan.techniques.ends import LinearOtherAtEnds

if TYPE_CHECKING:
    from swiftwan.weights.build import Parts


def switch(parts: Parts, old: Iterable[Technique], new: Iterable[Technique]) -> None:
    """Make a model that runs by ``old`` run by ``new``, both in order of application.

    Raises:
        PlanError: they differ in a technique that decides how the model loads; nothing has changed then.
    """
    old, new = list(old), list(new)
    fixed = {technique.spec for technique in old if technique.switch == RELOAD}
    wanted = {technique.spec for technique in new if technique.switch == RELOAD}
    if differ := sorted(fixed ^ wanted):
        names = " and ".join(f"'{spec}'" for spec in differ)
        raise PlanError(f"{names} cannot be switched on a loaded model; load it anew with the plan that you want.")
    make_plain(parts)
    for technique in new:
        if technique.switch != RELOAD:
            technique.install(parts)


def make_plain(parts: Parts) -> None:
    """Undo what every technique that can be switched does in ``install``."""
    for transformer in filter(None, (parts.transformer, parts.transformer_2)):
        transformer.ops, transformer.walk, transformer.token_order = PLAIN, all_blocks, None
        transformer.takes_opening = not parts.weights_move
        # Weights in two formats keep the hook that tells them which to use.
        kept = [layer.ends for layer in transformer.modules() if isinstance(layer, LinearOtherAtEnds)]
        for key, hook in list(transformer._forward_pre_hooks.items()):
            if hook not in kept:
                del transformer._forward_pre_hooks[key]
        transformer.__dict__.pop("forward", None)
    for block in each_block(parts.transformer, parts.transformer_2):
        block.ops = PLAIN
        block.attn1.attend, block.attn1.project = sdpa, project
        gelu = cast(GELU, block.ffn.net[0])
        gelu.linear_gelu = partial(linear_gelu, approximate="tanh")
        for layer in block.modules():
            if isinstance(layer, Fp8Linear):
                layer.product, layer.multiply = scaled_product, multiply
        block._compiled_call_impl = None
    parts.vae.run_plain()
