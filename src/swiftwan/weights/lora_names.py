"""Which parameter, and which part of its change, a key of a LoRA file means.

A key is a prefix, the path of a module and a part: ``diffusion_model.`` ``blocks.0.self_attn.q`` ``lora_A.weight``.
Paths are looked up among those that the model has, in diffusers' and in the original spelling, with dots and
with underscores; nothing is guessed from a key's form, since ``_`` is in names too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType

import torch
from torch import nn

from swiftwan.models.config import TransformerConfig
from swiftwan.models.dit import WanTransformer
from swiftwan.weights.keys import TRANSFORMER, TRANSFORMER_BLOCK

LOW = ("transformer_2.", "pipe.dit2.", "lora_transformer_2_")
"""Prefixes of the low-noise expert, in files that hold both."""

_PREFIXES = (
    *LOW,
    "base_model.model.",
    "model.",
    "diffusion_model.",
    "transformer.",
    "pipe.dit.",
    "lora_unet__",  # before the one it begins with
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)

_NAME = r"(?:\.[\w-]+)?"  # of the adapter, which peft writes unless told not to: lora_A.default.weight
_PARTS = {
    rf"lora_(?:A|down){_NAME}\.weight|lora\.down\.weight": "down",
    rf"lora_(?:B|up){_NAME}\.weight|lora\.up\.weight": "up",
    rf"lora_(?:B|up){_NAME}\.bias": "up_bias",
    rf"dora_scale|lora_magnitude_vector{_NAME}(?:\.weight)?": "magnitude",
    r"diff|w_norm": "diff",
    r"diff_b|b_norm": "diff_b",
    r"diff_m": "diff_m",
    r"alpha": "alpha",
    **{rf"{part}{_NAME}": part for part in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
    **{rf"{part}{_NAME}": part for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    **{rf"{part}{_NAME}": part for part in ("lokr_t2", "hada_t1", "hada_t2")},
    r"lora_mid\.weight": "lora_mid",
    r"set_weight": "set_weight",
    r"reshape_weight": "reshape_weight",
}
_KEY = re.compile(r"(?P<base>.+?)\.(?:" + "|".join(f"(?P<p{i}>{pattern})" for i, pattern in enumerate(_PARTS)) + r")\Z")

_ORIGINAL = {ours: theirs for theirs, ours in TRANSFORMER.items()}
_ORIGINAL_BLOCK = {ours: theirs for theirs, ours in TRANSFORMER_BLOCK.items()}


@dataclass(frozen=True)
class Key:
    """A key taken apart; ``part`` is a canonical word, of all spellings."""

    base: str
    part: str
    low: bool


def split(key: str) -> Key | None:
    """Take a key apart; None where it ends in nothing that any family writes."""
    low, stripped = False, True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if key.startswith(prefix):
                key, low, stripped = key.removeprefix(prefix), low or prefix in LOW, True
                break
    match = _KEY.match(key)
    if match is None:
        return None
    part = next(part for i, part in enumerate(_PARTS.values()) if match[f"p{i}"] is not None)
    base = match["base"]
    if part == "diff_m":  # of a block or the head; the table itself is what changes
        base, part = f"{base}_modulation" if "." not in base and "_" in base else f"{base}.modulation", "diff"
    return Key(base, part, low)


@dataclass(frozen=True)
class Names:
    """The parameters of a transformer, and every name its modules go by in LoRA files.

    Attributes:
        shapes: of each parameter.
        linears: paths of the modules that are linear layers.
        aliases: any spelling of a module's or lone parameter's path to the path here.
    """

    shapes: Mapping[str, tuple[int, ...]]
    linears: frozenset[str]
    aliases: Mapping[str, str]

    def weight(self, path: str) -> str:
        """The parameter that a change of ``path`` itself means."""
        return f"{path}.weight" if f"{path}.weight" in self.shapes else path


@lru_cache(maxsize=8)
def names_of(config: TransformerConfig) -> Names:
    """The names of a transformer of these sizes; nothing is allocated."""
    with torch.device("meta"):
        model = WanTransformer(replace(config, num_layers=1))  # all blocks have the same names: 40 take a second
    shapes = {
        name: tuple(parameter.shape)
        for first, parameter in model.named_parameters()
        for name in _in_all_blocks(first, config.num_layers)
    }
    linears = frozenset(
        name
        for first, module in model.named_modules()
        if isinstance(module, nn.Linear)
        for name in _in_all_blocks(first, config.num_layers)
    )
    paths = dict.fromkeys(re.sub(r"\.(weight|bias)\Z", "", name) for name in shapes)
    aliases: dict[str, str] = {}
    for path in paths:
        for name in (path, original(path)):
            for spelling in (name, name.replace(".", "_")):
                known = aliases.setdefault(spelling, path)
                assert known == path, f"{spelling} is {known} and {path}"
    return Names(MappingProxyType(shapes), linears, MappingProxyType(aliases))


def _in_all_blocks(name: str, count: int) -> list[str]:
    of_block = name.removeprefix("blocks.0.")
    return [name] if of_block == name else [f"blocks.{n}.{of_block}" for n in range(count)]


def original(path: str) -> str:
    """A path of diffusers' in the spelling of github.com/Wan-Video/Wan2.1 (inference.md 6.1, 6.2)."""
    block, name = re.fullmatch(r"(blocks\.\d+\.)?(.+)", path).groups(default="")  # type: ignore[union-attr]
    return block + (_ORIGINAL_BLOCK if block else _ORIGINAL).get(name, name)


def family(keys: Mapping[str, object]) -> str:
    """What wrote a file, by the form of its keys."""
    first = next((key for key in keys if split(key)), "")
    kinds = {found.part for key in keys if (found := split(key))}
    style = next(
        (
            style
            for prefix, style in (
                ("lora_unet__", "Wan-Fun (VideoX-Fun)"),
                ("lora_unet_", "kohya / musubi"),
                ("lycoris_", "LyCORIS"),
                ("pipe.dit", "DiffSynth"),
                ("base_model.model.", "PEFT"),
                ("transformer", "diffusers"),
            )
            if first.startswith(prefix)
        ),
        "original names",
    )
    if style == "original names" and re.search(r"\.lora_[AB]\.[\w-]+\.weight", first):
        style = "DiffSynth"
    words = [
        word
        for part, word in (
            ("down", "LoRA"),
            ("lokr", "LoKr"),
            ("hada", "LoHa"),
            ("diff", "full differences"),
            ("magnitude", "DoRA"),
        )
        if any(kind.startswith(part) for kind in kinds)
    ]
    return f"{style}: {', '.join(words) or 'nothing known'}"
