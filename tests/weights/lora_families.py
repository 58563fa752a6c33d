"""LoRA files of every family in its true names, and the change that each means, computed here on its own."""

import json
from dataclasses import dataclass, field

import torch
from torch import Tensor

from swiftwan.models.config import TransformerConfig

SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}
I2V = {"in_channels": 36, "image_dim": 8, "added_kv_proj_dim": 24}
CONFIG = TransformerConfig(**SIZES, **I2V)
T2V = TransformerConfig(**SIZES)

# Original Wan's names beside ours, written out: the resolver must not be its own witness.
LINEARS = {
    "self_attn.q": ("attn1.to_q", 24, 24),
    "self_attn.o": ("attn1.to_out.0", 24, 24),
    "cross_attn.k": ("attn2.to_k", 24, 24),
    "cross_attn.v_img": ("attn2.add_v_proj", 24, 24),
    "ffn.0": ("ffn.net.0.proj", 32, 24),
    "ffn.2": ("ffn.net.2", 24, 32),
}
TOP = {
    "text_embedding.0": ("condition_embedder.text_embedder.linear_1", 24, 16),
    "text_embedding.2": ("condition_embedder.text_embedder.linear_2", 24, 24),
    "time_embedding.0": ("condition_embedder.time_embedder.linear_1", 24, 16),
    "time_projection.1": ("condition_embedder.time_proj", 144, 24),
    "img_emb.proj.1": ("condition_embedder.image_embedder.ff.net.0.proj", 8, 8),
    "img_emb.proj.3": ("condition_embedder.image_embedder.ff.net.2", 24, 8),
    "head.head": ("proj_out", 64, 24),
}


@dataclass
class Case:
    """A file's tensors and metadata, and the change of each parameter that they mean."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    changes: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def linears():
    """Original path, our path, O, I of the linears that adapters are trained on."""
    for block in range(2):
        for theirs, (ours, out, into) in LINEARS.items():
            yield f"blocks.{block}.{theirs}", f"blocks.{block}.{ours}", out, into
    for theirs, (ours, out, into) in TOP.items():
        yield theirs, ours, out, into


def underscored(path: str) -> str:
    return path.replace(".", "_")


def low_rank(name, down="lora_A.weight", up="lora_B.weight", alpha=None, rank=3) -> Case:
    """A plain LoRA whose modules are called ``name(original path, our path)``."""
    case = Case()
    for theirs, ours, out, into in linears():
        a, b = torch.randn(rank, into), torch.randn(out, rank)
        key = name(theirs, ours)
        case.tensors |= {f"{key}.{down}": a, f"{key}.{up}": b}
        if alpha:
            case.tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
        case.changes[f"{ours}.weight"] = (alpha / rank if alpha else 1) * b @ a
    return case


def kohya(name) -> Case:
    return low_rank(name, "lora_down.weight", "lora_up.weight", alpha=2)


def lightx2v() -> Case:
    """Step-distillation files: low rank for linears, whole differences for all else."""
    case = kohya(lambda theirs, ours: f"diffusion_model.{theirs}")
    for key in [key for key in case.tensors if ".head.head." in key]:
        del case.tensors[key]
    full = {
        "head.head.diff": ("proj_out.weight", (64, 24)),
        "head.head.diff_b": ("proj_out.bias", (64,)),
        "head.diff_m": ("scale_shift_table", (1, 2, 24)),
        "blocks.0.self_attn.q.diff_b": ("blocks.0.attn1.to_q.bias", (24,)),
        "blocks.0.self_attn.norm_q.diff": ("blocks.0.attn1.norm_q.weight", (24,)),
        "blocks.1.cross_attn.norm_k_img.diff": ("blocks.1.attn2.norm_added_k.weight", (24,)),
        "blocks.1.norm3.diff": ("blocks.1.norm2.weight", (24,)),
        "blocks.1.norm3.diff_b": ("blocks.1.norm2.bias", (24,)),
        "blocks.1.diff_m": ("blocks.1.scale_shift_table", (1, 6, 24)),
        "img_emb.proj.0.diff": ("condition_embedder.image_embedder.norm1.weight", (8,)),
        "img_emb.proj.4.diff_b": ("condition_embedder.image_embedder.norm2.bias", (24,)),
        "time_projection.1.diff_b": ("condition_embedder.time_proj.bias", (144,)),
        "patch_embedding.diff": ("patch_embedding.weight", (24, 36, 1, 2, 2)),
        "patch_embedding.diff_b": ("patch_embedding.bias", (24,)),
    }
    for theirs, (ours, shape) in full.items():
        case.changes[ours] = case.tensors[f"diffusion_model.{theirs}"] = torch.randn(shape)
    return case


def lokr() -> Case:
    """LyCORIS' LoKr: one factor of low rank, both, or none; alpha counts only beside a rank."""
    case = Case()
    for n, (theirs, ours, out, into) in enumerate(linears()):
        key = f"lycoris_{underscored(theirs if n % 2 else ours)}"
        w1, w1a, w1b = torch.randn(2, 4), torch.randn(2, 3), torch.randn(3, 4)
        w2a, w2b = torch.randn(out // 2, 3), torch.randn(3, into // 4)
        w2 = torch.randn(out // 2, into // 4)
        forms = (
            ({"lokr_w1": w1, "lokr_w2": w2}, torch.kron(w1, w2)),
            ({"lokr_w1": w1, "lokr_w2_a": w2a, "lokr_w2_b": w2b}, torch.kron(w1, w2a @ w2b) * 2 / 3),
            ({"lokr_w1_a": w1a, "lokr_w1_b": w1b, "lokr_w2": w2}, torch.kron(w1a @ w1b, w2) * 2 / 3),
        )
        parts, change = forms[n % 3]
        case.tensors |= {f"{key}.{part}": tensor for part, tensor in parts.items()}
        case.tensors[f"{key}.alpha"] = torch.tensor(2.0)
        case.changes[f"{ours}.weight"] = change
    w1, t2, w2a, w2b = torch.randn(2, 4), torch.randn(3, 3, 1, 2, 2), torch.randn(3, 12), torch.randn(3, 9)
    kernel = torch.einsum("abtyx,ao,bi->oityx", t2, w2a, w2b)
    for part, tensor in {"lokr_w1": w1, "lokr_t2": t2, "lokr_w2_a": w2a, "lokr_w2_b": w2b}.items():
        case.tensors[f"lycoris_patch_embedding.{part}"] = tensor
    case.changes["patch_embedding.weight"] = torch.einsum("ab,oityx->aobityx", w1, kernel).reshape(24, 36, 1, 2, 2)
    return case


def loha() -> Case:
    case = Case()
    for theirs, ours, out, into in linears():
        key = f"lycoris_{underscored(theirs)}"
        a, b, c, d = torch.randn(out, 3), torch.randn(3, into), torch.randn(out, 3), torch.randn(3, into)
        case.tensors |= {f"{key}.hada_w1_a": a, f"{key}.hada_w1_b": b, f"{key}.hada_w2_a": c, f"{key}.hada_w2_b": d}
        case.tensors[f"{key}.alpha"] = torch.tensor(1.0)
        case.changes[f"{ours}.weight"] = (a @ b) * (c @ d) / 3
    return case


def diffusers_with_metadata() -> Case:
    case = low_rank(lambda theirs, ours: f"transformer.{ours}")
    settings = {"r": 3, "lora_alpha": 6, "alpha_pattern": {"blocks.1.attn1.to_q": 12}}
    case.metadata["lora_adapter_metadata"] = json.dumps({f"transformer.{key}": v for key, v in settings.items()})
    for name in case.changes:
        case.changes[name] *= 4 if name == "blocks.1.attn1.to_q.weight" else 2
    return case


def norms_of_lycoris() -> Case:
    change, bias = torch.randn(24), torch.randn(24)
    tensors = {"lycoris_blocks_0_norm2.w_norm": change, "lycoris_blocks_0_norm2.b_norm": bias}
    return Case(tensors, {"blocks.0.norm2.weight": change, "blocks.0.norm2.bias": bias})


FAMILIES = {
    "diffusers": lambda: low_rank(lambda theirs, ours: f"transformer.{ours}"),
    "diffusers-alpha-in-metadata": diffusers_with_metadata,
    "comfy-a-b": lambda: low_rank(lambda theirs, ours: f"diffusion_model.{theirs}"),
    "comfy-model": lambda: low_rank(lambda theirs, ours: f"model.diffusion_model.{theirs}"),
    "lightning": lambda: kohya(lambda theirs, ours: f"diffusion_model.{theirs}"),
    "lightx2v": lightx2v,
    "musubi": lambda: kohya(lambda theirs, ours: f"lora_unet_{underscored(theirs)}"),
    "wan-fun": lambda: kohya(lambda theirs, ours: f"lora_unet__{underscored(theirs)}"),
    "lycoris-lora": lambda: kohya(lambda theirs, ours: f"lycoris_{underscored(ours)}"),
    "lycoris-lokr": lokr,
    "lycoris-loha": loha,
    "lycoris-norms": norms_of_lycoris,
    "diffsynth": lambda: low_rank(lambda t, o: t, "lora_A.default.weight", "lora_B.default.weight"),
    "diffsynth-pipe": lambda: low_rank(lambda t, o: f"pipe.dit.{t}", "lora_A.default.weight", "lora_B.default.weight"),
    "peft": lambda: low_rank(lambda theirs, ours: f"base_model.model.{ours}"),
    "bare-diffusers": lambda: low_rank(lambda theirs, ours: ours),
}
