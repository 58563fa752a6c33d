"""Which model a file holds, and its sizes: from the shapes of its tensors alone, never from its name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from swiftwan.errors import WeightsError
from swiftwan.models.config import KNOWN_MODELS, WAN21_VAE, WAN22_VAE, KnownModel, TransformerConfig, VAEConfig
from swiftwan.weights import check
from swiftwan.weights.keys import components
from swiftwan.weights.sources import Tensors

HEAD_DIM = 128
"""Width of an attention head in every published Wan; shapes cannot say it."""

_OTHER_WANS = {
    "vace_patch_embedding": "a Wan VACE transformer",
    "motion_encoder.": "a Wan Animate transformer",
    "casual_audio_encoder.": "a Wan S2V transformer",  # the original's spelling
    "control_adapter.": "a Wan Fun camera transformer",
    "ref_conv.": "a Wan Fun control transformer",
}
_LORA = re.compile(r"\.(lora_[AB]|lora_(up|down)|lokr_\w+|hada_\w+|diff(_[bm])?)(\.|$)")
_NAMES = {"vae": "a Wan VAE", "text_encoder": "a UMT5 text encoder", "image_encoder": "a CLIP vision encoder"}


def not_a_model(source: Tensors) -> str | None:
    """What a file is that has Wan's names but is no model of ours: a LoRA, VACE and the like; else None."""
    if any(_LORA.search(name) for name in source.shapes):
        return "a LoRA, which goes on top of a model"
    for fragment, kind in _OTHER_WANS.items():
        if any(fragment in name for name in source.shapes):
            return f"{kind}, which swiftwan cannot run"
    return None


def looks_like(source: Tensors) -> str:
    """What a weights file holds, in words: ``a Wan transformer (wan2.1-t2v-1.3b)``, ``a LoRA``, ..."""
    if other := not_a_model(source):
        return other
    shapes = source.shapes
    kinds = []
    for component, tensors in components(source).items():
        if component == "transformer":
            model = check.looks_like(tensors.shapes)
            kinds.append(f"a Wan transformer ({model})" if model else "a Wan transformer of unpublished size")
        elif component == "vae":
            z_dim = tensors.shapes["post_quant_conv.weight"][0]
            kinds.append({16: "the Wan 2.1 VAE", 48: "the Wan 2.2 VAE"}.get(z_dim, _NAMES[component]))
        else:
            kinds.append(_NAMES[component])
    if kinds:
        return " and ".join(kinds)
    first = next(iter(shapes), "none")
    return f"nothing of Wan ({len(shapes)} tensors, the first {first!r})"


def transformer_config(tensors: Tensors, *, num_heads: int | None = None) -> TransformerConfig:
    """Sizes of a transformer under our names.

    Args:
        num_heads: from a config file beside the weights; None takes heads of 128, as every published Wan has.

    Raises WeightsError: a tensor is missing or of an impossible shape, or the heads do not divide the width.
    """
    shapes = tensors.shapes
    try:
        dim, in_channels, *patch = shapes["patch_embedding.weight"]
        image = "condition_embedder.image_embedder"
        config = TransformerConfig(
            num_attention_heads=num_heads or dim // HEAD_DIM,
            attention_head_dim=dim // num_heads if num_heads else HEAD_DIM,
            in_channels=in_channels,
            out_channels=shapes["proj_out.weight"][0] // math.prod(patch),
            text_dim=shapes["condition_embedder.text_embedder.linear_1.weight"][1],
            freq_dim=shapes["condition_embedder.time_embedder.linear_1.weight"][1],
            ffn_dim=shapes["blocks.0.ffn.net.0.proj.weight"][0],
            num_layers=_count(shapes, r"blocks\.(\d+)\."),
            patch_size=(patch[0], patch[1], patch[2]),
            cross_attn_norm="blocks.0.norm2.weight" in shapes,
            image_dim=shapes[f"{image}.norm1.weight"][0] if f"{image}.norm1.weight" in shapes else None,
            added_kv_proj_dim=shapes.get("blocks.0.attn2.add_k_proj.weight", (None, None))[1],
            pos_embed_seq_len=shapes.get(f"{image}.pos_embed", (None, None))[1],
        )
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise WeightsError(
            f"{tensors.origin} looks like a Wan transformer, but not whole ({error}); download it again"
        ) from None
    if config.dim != dim:
        raise WeightsError(
            f"{tensors.origin}: a width of {dim} does not divide into "
            + (f"{num_heads} heads; is its config.json of another model?" if num_heads else f"heads of {HEAD_DIM}")
        )
    return config


def vae_config(tensors: Tensors) -> VAEConfig:
    """Sizes of a VAE under our names; the latents' statistics are those of Wan 2.1 (z 16) or 2.2 (z 48).

    Raises WeightsError for another z, whose statistics are in no file, and for missing tensors.
    """
    shapes = tensors.shapes
    try:
        z_dim = shapes["post_quant_conv.weight"][0]
        base, in_channels = shapes["encoder.conv_in.weight"][:2]
        residual = any(name.startswith("encoder.down_blocks.0.resnets.") for name in shapes)
        levels = _residual_levels(shapes) if residual else _flat_levels(shapes)
        top = shapes["decoder.conv_out.weight"][1]
        mults = tuple(width // base for width, _, _ in levels)
        decoder_base = top // mults[0]
        patch = math.isqrt(in_channels // 3)
        known = {16: WAN21_VAE, 48: WAN22_VAE}[z_dim]
        return VAEConfig(
            base_dim=base,
            decoder_base_dim=decoder_base if decoder_base != base else None,
            z_dim=z_dim,
            dim_mult=mults,
            num_res_blocks=levels[0][1],
            temperal_downsample=tuple(bool(time) for _, _, time in levels[:-1]),
            latents_mean=known.latents_mean,
            latents_std=known.latents_std,
            is_residual=residual,
            in_channels=in_channels,
            out_channels=shapes["decoder.conv_out.weight"][0],
            patch_size=patch if patch > 1 else None,
            scale_factor_temporal=2 ** sum(bool(time) for _, _, time in levels[:-1]),
            scale_factor_spatial=patch * 2 ** (len(levels) - 1),
        )
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise WeightsError(f"{tensors.origin} looks like a Wan VAE, but of no known kind ({error})") from None


def _residual_levels(shapes: Mapping[str, check.Shape]) -> list[tuple[int, int, bool]]:
    """(width, residual blocks, whether time is halved) of each level of a Wan 2.2 encoder."""
    levels = []
    for i in range(_count(shapes, r"encoder\.down_blocks\.(\d+)\.")):
        block = f"encoder.down_blocks.{i}"
        width = shapes[f"{block}.resnets.0.conv1.weight"][0]
        count = _count(shapes, rf"encoder\.down_blocks\.{i}\.resnets\.(\d+)\.")
        levels.append((width, count, f"{block}.downsampler.time_conv.weight" in shapes))
    return levels


def _flat_levels(shapes: Mapping[str, check.Shape]) -> list[tuple[int, int, bool]]:
    """The same of a Wan 2.1 encoder, where a level ends with a layer that resamples."""
    levels, width, count = [], 0, 0
    for i in range(_count(shapes, r"encoder\.down_blocks\.(\d+)\.")):
        block = f"encoder.down_blocks.{i}"
        if f"{block}.conv1.weight" in shapes:
            width, count = shapes[f"{block}.conv1.weight"][0], count + 1
        else:
            levels.append((width, count, f"{block}.time_conv.weight" in shapes))
            count = 0
    return [*levels, (width, count, False)]


def text_config(tensors: Tensors) -> dict[str, Any]:
    """``config.json`` of a UMT5 encoder, as transformers reads it."""
    shapes = tensors.shapes
    first = "encoder.block.0.layer.0.SelfAttention"
    try:
        vocabulary, dim = shapes["shared.weight"]
        buckets, heads = shapes[f"{first}.relative_attention_bias.weight"]
        return {
            "architectures": ["UMT5EncoderModel"],
            "model_type": "umt5",
            "vocab_size": vocabulary,
            "d_model": dim,
            "d_kv": shapes[f"{first}.q.weight"][0] // heads,
            "num_heads": heads,
            "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
            "num_layers": _count(shapes, r"encoder\.block\.(\d+)\."),
            "relative_attention_num_buckets": buckets,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": True,
        }
    except (KeyError, ValueError) as error:
        raise WeightsError(
            f"{tensors.origin} looks like a UMT5 encoder, but not whole ({error}); Wan reads its text with "
            "google/umt5-xxl"
        ) from None


def image_config(tensors: Tensors) -> dict[str, Any]:
    """``config.json`` of a CLIP vision encoder; heads of 80 for ViT-H (width 1280), else 64, as open_clip has."""
    shapes, stem = tensors.shapes, "vision_model"
    try:
        dim, _, patch, _ = shapes[f"{stem}.embeddings.patch_embedding.weight"]
        positions = shapes[f"{stem}.embeddings.position_embedding.weight"][0]
        return {
            "architectures": ["CLIPVisionModel"],
            "model_type": "clip_vision_model",
            "hidden_size": dim,
            "intermediate_size": shapes[f"{stem}.encoder.layers.0.mlp.fc1.weight"][0],
            "num_hidden_layers": _count(shapes, rf"{stem}\.encoder\.layers\.(\d+)\."),
            "num_attention_heads": 16 if dim == 1280 else max(1, dim // 64),
            "patch_size": patch,
            "image_size": math.isqrt(positions - 1) * patch,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
        }
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{tensors.origin} looks like a CLIP vision encoder, but not whole ({error})") from None


def published(config: TransformerConfig) -> list[KnownModel]:
    """The published models whose transformer, or each expert, has these sizes."""
    return [model for model in KNOWN_MODELS.values() if model.transformer == config]


def _count(shapes: Mapping[str, check.Shape], pattern: str) -> int:
    return 1 + max((int(match[1]) for name in shapes if (match := re.match(pattern, name))), default=-1)
