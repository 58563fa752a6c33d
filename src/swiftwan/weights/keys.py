"""Names of tensors: from the original Wan files and ComfyUI's packs to those of diffusers and transformers.

Tables first, then one function a component, ``names in a file -> {our name: where it lies}``. A name that no
table knows keeps its own, so that the comparison with the model tells it as unexpected. The original names
are those of github.com/Wan-Video/Wan2.1 (wan/modules/model.py, vae.py, t5.py, clip.py) and Wan2.2
(wan/modules/vae2_2.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from swiftwan.weights.sources import Piece, Renamed, Tensors

TRANSFORMER = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
"""Original name -> diffusers' name of the transformer's modules outside the blocks."""

TRANSFORMER_BLOCK = {
    **{f"self_attn.{o}": f"attn1.{d}" for o, d in zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"), strict=True)},
    **{f"cross_attn.{o}": f"attn2.{d}" for o, d in zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"), strict=True)},
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",  # the norm before cross-attention, which diffusers counts in order of use
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
"""The same below ``blocks.N.``."""

_TEXT = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
_TEXT_BLOCK = {
    "norm1": "layer.0.layer_norm",
    **{f"attn.{letter}": f"layer.0.SelfAttention.{letter}" for letter in "qkvo"},
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}

_IMAGE = {
    "cls_embedding": "embeddings.class_embedding",
    "pos_embedding": "embeddings.position_embedding.weight",
    "patch_embedding": "embeddings.patch_embedding",
    "pre_norm": "pre_layrnorm",  # transformers' spelling
    "post_norm": "post_layernorm",
}
_IMAGE_BLOCK = {
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}

_VAE_OUTER = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    "encoder.conv1": "encoder.conv_in",
    "decoder.conv1": "decoder.conv_in",
    "encoder.head.0": "encoder.norm_out",
    "encoder.head.2": "encoder.conv_out",
    "decoder.head.0": "decoder.norm_out",
    "decoder.head.2": "decoder.conv_out",
}
_VAE_RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_VAE_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}

PREFIXES = {
    "transformer": ("model.diffusion_model.", "diffusion_model.", ""),
    "vae": ("first_stage_model.", "vae.", ""),
    "text_encoder": ("text_encoders.umt5xxl.transformer.", "umt5xxl.transformer.", "transformer.", ""),
    "image_encoder": ("clip_vision.", "conditioner.embedders.0.", ""),
}
"""What may stand before a component's names: in ComfyUI's packs, and in its files that hold a whole model."""

_SIGNS = {
    "transformer": (
        ("patch_embedding.weight", "blocks.0.self_attn.q.weight"),
        ("patch_embedding.weight", "blocks.0.attn1.to_q.weight"),
    ),
    "vae": (
        ("encoder.conv1.weight", "decoder.conv1.weight", "encoder.middle.0.residual.2.weight"),
        ("encoder.conv_in.weight", "post_quant_conv.weight", "encoder.mid_block.resnets.0.norm1.gamma"),
    ),
    "text_encoder": (
        ("token_embedding.weight", "blocks.0.attn.q.weight", "blocks.0.ffn.gate.0.weight"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"),
    ),
    "image_encoder": (
        ("visual.patch_embedding.weight", "visual.transformer.0.attn.to_qkv.weight"),
        ("vision_model.embeddings.patch_embedding.weight", "vision_model.encoder.layers.0.layer_norm1.weight"),
    ),
}
"""Names that say what a file holds: first in the original's words, then in those of diffusers and transformers."""

_NOT_OURS = {
    "vae": (),
    "transformer": (),
    "text_encoder": ("spiece_model", "encoder.embed_tokens.weight"),
    "image_encoder": (
        "textual.*",
        "text_model.*",
        "log_scale",
        "logit_scale",
        "visual.head",
        "*_projection.weight",
        "*.position_ids",
    ),
}
"""What files carry beside a component: the tokenizer, a tied copy, CLIP's half for text."""


def components(source: Tensors) -> dict[str, Tensors]:
    """What a file holds, each component under our names; empty for a file of no component we know."""
    found = {}
    for component, prefixes in PREFIXES.items():
        for prefix in prefixes:
            names = {n.removeprefix(prefix): n for n in source.shapes if n.startswith(prefix)}
            signs = [set(sign) <= names.keys() for sign in _SIGNS[component]]
            if any(signs):
                found[component] = _ours(component, source, names, original=signs[0])
                break
    return found


def _ours(component: str, source: Tensors, names: Mapping[str, str], *, original: bool) -> Tensors:
    kept = [n for n in names if not any(fnmatchcase(n, glob) for glob in _NOT_OURS[component])]
    if component == "text_encoder" and "encoder.embed_tokens.weight" in names and "shared.weight" not in names:
        return Renamed(source, {"shared.weight": Piece(names["encoder.embed_tokens.weight"])} | _at(names, kept))
    if not original:
        return Renamed(source, _at(names, kept))
    to_ours = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder, "image_encoder": image_encoder}
    pieces = to_ours[component](kept)
    return Renamed(source, {ours: Piece(names[p.name], p.part, p.of, p.drop) for ours, p in pieces.items()})


def _at(names: Mapping[str, str], kept: Iterable[str]) -> dict[str, Piece]:
    return {name: Piece(names[name]) for name in kept}


def transformer(names: Iterable[str]) -> dict[str, Piece]:
    """The transformer: ``wan/modules/model.py`` to diffusers' ``WanTransformer3DModel``."""
    return {_rename(n, "blocks", TRANSFORMER, "blocks", TRANSFORMER_BLOCK): Piece(n) for n in names}


def text_encoder(names: Iterable[str]) -> dict[str, Piece]:
    """UMT5's encoder: ``wan/modules/t5.py`` to transformers' ``UMT5EncoderModel``."""
    return {_rename(n, "blocks", _TEXT, "encoder.block", _TEXT_BLOCK): Piece(n) for n in names}


def image_encoder(names: Iterable[str]) -> dict[str, Piece]:
    """CLIP's vision tower: ``wan/modules/clip.py`` to transformers' ``CLIPVisionModel``, whose files begin with
    ``vision_model.``; the fused ``to_qkv`` becomes three."""
    pieces = {}
    for name in names:
        short = name.removeprefix("visual.")
        if match := re.fullmatch(r"transformer\.(\d+)\.attn\.to_qkv\.(weight|bias)", short):
            for part, letter in enumerate("qkv"):
                ours = f"vision_model.encoder.layers.{match[1]}.self_attn.{letter}_proj.{match[2]}"
                pieces[ours] = Piece(name, part=part, of=3)
            continue
        ours = _rename(short, "transformer", _IMAGE, "encoder.layers", _IMAGE_BLOCK)
        drop = {"cls_embedding": 2, "pos_embedding": 1}.get(short, 0)
        pieces[f"vision_model.{ours}" if ours != short else name] = Piece(name, drop=drop)
    return pieces


def vae(names: Iterable[str]) -> dict[str, Piece]:
    """The VAE: ``wan/modules/vae.py`` and ``vae2_2.py`` to diffusers' ``AutoencoderKLWan``."""
    names = list(names)
    # Wan2.1 counts the decoder's layers through; a level ends with the one that resamples.
    ends = [int(m[1]) for n in names if (m := re.match(r"decoder\.upsamples\.(\d+)\.resample\.", n))]
    level = min(ends, default=0) + 1
    return {_vae_name(name, level): Piece(name) for name in names}


def _vae_name(name: str, level: int) -> str:
    module, _, leaf = name.rpartition(".")
    if outer := _VAE_OUTER.get(module):
        return f"{outer}.{leaf}"
    if match := re.fullmatch(r"(encoder|decoder)\.middle\.([012])\.(.+)", module):
        return f"{match[1]}.mid_block.{_VAE_MIDDLE[match[2]]}.{_residual(match[3])}.{leaf}"
    if match := re.fullmatch(r"encoder\.downsamples\.(\d+)\.downsamples\.(\d+)\.(.+)", module):
        return f"encoder.down_blocks.{match[1]}.{_in_level(match[2], match[3], 'downsampler')}.{leaf}"
    if match := re.fullmatch(r"decoder\.upsamples\.(\d+)\.upsamples\.(\d+)\.(.+)", module):
        return f"decoder.up_blocks.{match[1]}.{_in_level(match[2], match[3], 'upsampler')}.{leaf}"
    if match := re.fullmatch(r"encoder\.downsamples\.(\d+)\.(.+)", module):
        return f"encoder.down_blocks.{match[1]}.{_residual(match[2])}.{leaf}"
    if match := re.fullmatch(r"decoder\.upsamples\.(\d+)\.(.+)", module):
        block, index = divmod(int(match[1]), level)
        return f"decoder.up_blocks.{block}.{_in_level(str(index), match[2], 'upsamplers.0')}.{leaf}"
    return name


def _in_level(index: str, module: str, resampler: str) -> str:
    if module == "time_conv" or module.startswith("resample."):
        return f"{resampler}.{module}"
    return f"resnets.{index}.{_residual(module)}"


def _residual(module: str) -> str:
    return _VAE_RESIDUAL.get(module, module)


def _rename(name: str, stem: str, outer: Mapping[str, str], our_stem: str, inner: Mapping[str, str]) -> str:
    """``stem.N.MODULE.leaf`` by the inner table, ``MODULE.leaf`` by the outer one; unknown names as they are."""
    match = re.fullmatch(rf"(?:{stem}\.(\d+)\.)?(.+?)(\.weight|\.bias)?", name)
    assert match is not None, name
    number, module, leaf = match.groups(default="")
    ours = (inner if number else outer).get(module)
    if ours is None:
        return name
    return f"{our_stem}.{number}.{ours}{leaf}" if number else f"{ours}{leaf}"
