"""Tiny Wan models, written by diffusers and transformers themselves."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import save_file
from transformers import UMT5Config, UMT5EncoderModel

from swiftwan.train.pocket_tokenizer import build

TINY_DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}
TINY_VAE = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
TINY_TEXT = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "swiftwan"


@pytest.fixture(scope="session")
def tiny_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(torch.seed() % 1000)
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=UMT5EncoderModel(UMT5Config(**TINY_TEXT)),
        vae=AutoencoderKLWan(**TINY_VAE),
        scheduler=UniPCMultistepScheduler(flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"),
        transformer=WanTransformer3DModel(**TINY_DIT),
    )
    folder = tmp_path_factory.mktemp("template") / "tiny-wan"
    pipeline.save_pretrained(folder)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    pipeline.transformer.save_pretrained(folder / "transformer", max_shard_size="30KB")
    # A real tokenizer would need a vocabulary; this file is only looked for, not read.
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "T5TokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def tiny(tiny_template: Path, tmp_path: Path) -> Path:
    """A T2V folder by ``WanPipeline.save_pretrained``, its transformer in several shards."""
    return Path(shutil.copytree(tiny_template, tmp_path / "tiny-wan"))


# --- the same tensors under the names of the original Wan, written from github.com/Wan-Video


DIT_NAMES = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
    (".norm2.", ".norm3."),
    (".attn1.", ".self_attn."),
    (".attn2.", ".cross_attn."),
    (".add_k_proj.", ".k_img."),
    (".add_v_proj.", ".v_img."),
    (".norm_added_k.", ".norm_k_img."),
    (".to_out.0.", ".o."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".ffn.net.0.proj.", ".ffn.0."),
    (".ffn.net.2.", ".ffn.2."),
    ("proj_out.", "head.head."),
)
TEXT_NAMES = (
    ("shared.", "token_embedding."),
    ("encoder.final_layer_norm.", "norm."),
    ("encoder.block.", "blocks."),
    (".layer.0.layer_norm.", ".norm1."),
    (".layer.0.SelfAttention.relative_attention_bias.", ".pos_embedding.embedding."),
    (".layer.0.SelfAttention.", ".attn."),
    (".layer.1.layer_norm.", ".norm2."),
    (".layer.1.DenseReluDense.wi_0.", ".ffn.gate.0."),
    (".layer.1.DenseReluDense.wi_1.", ".ffn.fc1."),
    (".layer.1.DenseReluDense.wo.", ".ffn.fc2."),
)
RESIDUAL_NAMES = (
    (".norm1.", ".residual.0."),
    (".conv1.", ".residual.2."),
    (".norm2.", ".residual.3."),
    (".conv2.", ".residual.6."),
    (".conv_shortcut.", ".shortcut."),
)
VAE_NAMES = (
    ("post_quant_conv.", "conv2."),
    ("quant_conv.", "conv1."),
    ("coder.conv_in.", "coder.conv1."),
    ("coder.norm_out.", "coder.head.0."),
    ("coder.conv_out.", "coder.head.2."),
    (".mid_block.resnets.0.", ".middle.0."),
    (".mid_block.attentions.0.", ".middle.1."),
    (".mid_block.resnets.1.", ".middle.2."),
)

State = dict[str, torch.Tensor]


def renamed(state: State, *tables: tuple[tuple[str, str], ...]) -> State:
    def rename(name: str) -> str:
        for ours, theirs in (pair for table in tables for pair in table):
            name = name.replace(ours, theirs)
        return name

    return {rename(name): tensor.contiguous() for name, tensor in state.items()}


def original_dit(state: State) -> State:
    return {
        name.replace("scale_shift_table", "modulation" if name.startswith("blocks.") else "head.modulation"): tensor
        for name, tensor in renamed(state, DIT_NAMES).items()
    }


def original_text(state: State) -> State:
    return renamed({n: t for n, t in state.items() if n != "encoder.embed_tokens.weight"}, TEXT_NAMES)


def original_vae(state: State, num_res_blocks: int) -> State:
    """Of both kinds: Wan2.2 nests the layers of a level, Wan2.1 counts them through."""
    nested = any(".downsampler." in name for name in state)
    period = num_res_blocks + 2  # a level of the decoder: its residual blocks, one more, and what resamples

    def rename(name: str) -> str:
        if found := re.match(r"encoder\.down_blocks\.(\d+)\.(?:resnets\.(\d+)|downsampler)\.(.*)", name):
            inner = found[2] or num_res_blocks
            return f"encoder.downsamples.{found[1]}.downsamples.{inner}.{found[3]}"
        if found := re.match(r"decoder\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0|upsampler)\.(.*)", name):
            inner = found[2] or str(period - 1)
            if nested:
                return f"decoder.upsamples.{found[1]}.upsamples.{inner}.{found[3]}"
            return f"decoder.upsamples.{int(found[1]) * period + int(inner)}.{found[3]}"
        return name.replace("encoder.down_blocks.", "encoder.downsamples.")

    plain = renamed(state, VAE_NAMES)
    keep = {n: t for n, t in plain.items() if re.match(r"conv[12]\.|..coder\.conv1\.", n)}
    rest = {rename(n): t for n, t in plain.items() if n not in keep}
    return keep | renamed(rest, RESIDUAL_NAMES)


def original_clip(state: State) -> State:
    """CLIP's vision tower as ``models_clip_*.pth`` has it, with a little of the text tower that is beside it."""
    stem = "vision_model." if any(n.startswith("vision_model.") for n in state) else ""
    state = {n.removeprefix(stem): t for n, t in state.items()}
    out = {
        "visual.cls_embedding": state.pop("embeddings.class_embedding").reshape(1, 1, -1),
        "visual.pos_embedding": state.pop("embeddings.position_embedding.weight")[None],
        "visual.head": torch.randn(4, 4),
        "textual.token_embedding.weight": torch.randn(4, 4),
        "log_scale": torch.tensor(2.6),
    }
    names = (
        ("embeddings.patch_embedding.", "patch_embedding."),
        ("pre_layrnorm.", "pre_norm."),
        ("post_layernorm.", "post_norm."),
        ("encoder.layers.", "transformer."),
        (".layer_norm", ".norm"),
        (".self_attn.out_proj.", ".attn.proj."),
        (".mlp.fc1.", ".mlp.0."),
        (".mlp.fc2.", ".mlp.2."),
    )
    for name, tensor in renamed(state, names).items():
        if ".self_attn." not in name:
            out[f"visual.{name}"] = tensor
        elif ".q_proj." in name:
            parts = [
                state[name.replace("transformer.", "encoder.layers.").replace("q_proj", f"{x}_proj")] for x in "qkv"
            ]
            out[f"visual.{name.replace('self_attn.q_proj', 'attn.to_qkv')}"] = torch.cat(parts)
    return out


# --- a LoRA's file


@pytest.fixture
def write(tmp_path: Path):
    def write(tensors: State, name: str = "lora.safetensors", metadata: dict[str, str] | None = None) -> Path:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / name, metadata)
        return tmp_path / name

    return write


# --- a model whose heads are 128 wide, as in every published Wan


@dataclass(frozen=True)
class Peer:
    """A tiny pipeline of diffusers: what every format below is made from, and compared with."""

    pipeline: WanPipeline
    folder: Path

    def state(self, component: str) -> State:
        return dict(getattr(self.pipeline, component).state_dict())

    def latents(self, pipeline: WanPipeline | None = None) -> torch.Tensor:
        pipeline = pipeline or self.pipeline
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator("cpu").manual_seed(3)
        settings = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 3.0}
        text = {"prompt": "a red circle moves left", "negative_prompt": "blurry"}
        return pipeline(**text, **settings, generator=generator, output_type="latent").frames


WIDE_DIT = {
    "num_attention_heads": 1,
    "attention_head_dim": 128,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
}
WIDE_VAE = {"base_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}


def make_peer(folder: Path, experts: int) -> Peer:
    torch.manual_seed(torch.seed() % 1000)
    tokenizer = build()
    text = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=16,
        num_heads=2,
        d_ff=48,
        num_layers=2,
        feed_forward_proj="gated-gelu",
    )
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=AutoencoderKLWan(**WIDE_VAE).eval(),
        scheduler=UniPCMultistepScheduler(flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"),
        transformer=WanTransformer3DModel(**WIDE_DIT).eval(),
        transformer_2=WanTransformer3DModel(**WIDE_DIT).eval() if experts == 2 else None,
        boundary_ratio=0.875 if experts == 2 else None,
    )
    for parameter in pipeline.text_encoder.parameters():
        parameter.data.normal_(0, 0.2)
    pipeline.save_pretrained(folder)
    return Peer(pipeline, folder)


@pytest.fixture(scope="session")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Peer:
    return make_peer(tmp_path_factory.mktemp("peer") / "one", 1)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Peer:
    return make_peer(tmp_path_factory.mktemp("peer") / "two", 2)


def write_parts(peer: Peer, folder: Path) -> None:
    """VAE, text encoder and tokenizer as the original repositories have them."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(original_vae(peer.state("vae"), 1), folder / "Wan2.1_VAE.pth")
    torch.save(original_text(peer.state("text_encoder")), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(peer.folder / "tokenizer", folder / "google" / "umt5-xxl")


def write_original(peer: Peer, folder: Path) -> Path:
    """The whole model in the original layout: of Wan2.1 with one expert, of Wan2.2 with two."""
    write_parts(peer, folder)
    two = peer.pipeline.transformer_2 is not None
    for component, inner in (("transformer", "high_noise_model"), ("transformer_2", "low_noise_model"))[: 1 + two]:
        here = folder / inner if two else folder
        here.mkdir(exist_ok=True)
        told = {"_class_name": "WanModel", "dim": 128, "num_heads": 1, "ffn_dim": 64, "in_dim": 16, "num_layers": 2}
        (here / "config.json").write_text(json.dumps(told | {"model_type": "t2v"}))
        state = original_dit(peer.state(component))
        names = sorted(state)
        shards = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
        for file, inside in shards.items():
            save_file({n: state[n] for n in inside}, here / file)
        weight_map = {n: file for file, inside in shards.items() for n in inside}
        index = {"metadata": {}, "weight_map": weight_map}
        (here / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def original(peer: Peer, tmp_path: Path) -> Path:
    return write_original(peer, tmp_path / "Wan2.1-Tiny")


@pytest.fixture
def original_pair(pair: Peer, tmp_path: Path) -> Path:
    return write_original(pair, tmp_path / "Wan2.2-Tiny")


@pytest.fixture(scope="session")
def original_names() -> SimpleNamespace:
    return SimpleNamespace(dit=original_dit, text=original_text, vae=original_vae, clip=original_clip)


@pytest.fixture(scope="session", name="write_parts")
def _write_parts():
    return write_parts
