"""A trained LoRA as a file, under the names that others read.

``diffusers``: ``transformer.blocks.0.attn1.to_q.lora_A.weight``, alpha and rank in the metadata as diffusers has them;
``transformer_2.`` for a low-noise expert, in the same file. ``comfyui``:
``diffusion_model.blocks.0.self_attn.q.lora_A.weight``, an ``alpha`` beside it. ``kohya`` (musubi):
``lora_unet_blocks_0_self_attn_q.lora_down.weight``. The last two have no name for a second expert, so each gets a file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swiftwan.errors import RequestError, did_you_mean
from swiftwan.weights.lora import Expert
from swiftwan.weights.lora_names import original
from swiftwan.weights.write import write_tensors

FORMATS = ("diffusers", "comfyui", "kohya")

Factors = Mapping[str, Tensor]
"""``blocks.0.attn1.to_q.lora_A.weight`` (R, I) and ``...lora_B.weight`` (O, R), in the transformer's own names."""


def write_lora(
    path: Path,
    factors: Mapping[Expert | None, Factors],
    *,
    peft_config: Mapping[str, Any],
    metadata: Mapping[str, str],
    form: str = "diffusers",
    dtype: torch.dtype = torch.float32,
) -> list[Path]:
    """Write a LoRA; returns the files, two where a form has no names for a second expert.

    Args:
        factors: by expert; None for a model with one transformer.
        peft_config: ``r``, ``lora_alpha`` and whatever else peft's ``LoraConfig`` says.
        metadata: kept in the file as it is.

    Raises:
        RequestError: the form is unknown.
        OutputError: it cannot be written; nothing is left behind.
    """
    check_form(form)
    if form == "diffusers":
        tensors: dict[str, Tensor] = {}
        packed: dict[str, Any] = {}
        for expert, of_expert in factors.items():
            prefix = "transformer_2" if expert == "low" else "transformer"
            tensors |= {f"{prefix}.{name}": tensor.to(dtype) for name, tensor in of_expert.items()}
            packed |= {f"{prefix}.{key}": value for key, value in peft_config.items()}
        settings = {"lora_adapter_metadata": json.dumps(packed, indent=2, sort_keys=True)}
        # Names say which file is whose only where they have to: a high-noise expert's begin as a lone transformer's.
        file = path if len(factors) > 1 else _named(path, next(iter(factors)))
        return [_save(file, tensors, {**metadata, **settings, "format": "pt"})]
    alpha = torch.tensor(float(peft_config["lora_alpha"]))
    written = []
    for expert, of_expert in factors.items():
        rename = _comfyui if form == "comfyui" else _kohya
        tensors = {rename(name): tensor.to(dtype) for name, tensor in of_expert.items()}
        tensors |= {f"{name.partition('.lora_')[0]}.alpha": alpha.clone() for name in tensors}
        rank = {"ss_network_dim": str(peft_config["r"]), "ss_network_alpha": str(peft_config["lora_alpha"])}
        written.append(_save(_named(path, expert), tensors, {**metadata, **rank, "format": "pt"}))
    return written


def check_form(form: str) -> None:
    """Raise RequestError for a form that is unknown."""
    if form not in FORMATS:
        raise RequestError(f"format is '{form}'." + did_you_mean(form, FORMATS))


def _named(path: Path, expert: Expert | None) -> Path:
    return path if expert is None else path.with_name(f"{path.stem}-{expert}_noise{path.suffix}")


def _comfyui(name: str) -> str:
    module, _, part = name.partition(".lora_")
    return f"diffusion_model.{original(module)}.lora_{part}"


def _kohya(name: str) -> str:
    module, _, part = name.partition(".lora_")
    part = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[part]
    return f"lora_unet_{original(module).replace('.', '_')}.{part}"


def _save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Path:
    # Copies: safetensors refuses memory that two names share, as two experts with one adapter do.
    owned = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    write_tensors(path, owned, metadata, way_out="choose another place or free room")
    return path
