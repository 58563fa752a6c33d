"""Each name format in its true names; the expected ones are diffusers' and transformers' own."""

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from transformers import CLIPVisionConfig, CLIPVisionModel

from swiftwan.models.config import KNOWN_MODELS, WAN21_VAE, WAN22_VAE
from swiftwan.weights import keys, shapes


class Held:
    """A source of tensors that are already in memory."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.origin, self.state = "memory", state
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.dtypes = dict.fromkeys(state, "F32")

    def read(self, name: str, device: str = "cpu") -> torch.Tensor:
        return self.state[name].to(device)

    def close(self) -> None:
        pass


def assert_same(tensors, state: dict[str, torch.Tensor]) -> None:
    assert set(tensors.shapes) == set(state)
    for name, tensor in state.items():
        assert tensors.shapes[name] == tuple(tensor.shape), name
        assert torch.equal(tensors.read(name), tensor), name


DITS = {
    "t2v": {},
    "i2v with clip": {"in_channels": 36, "image_dim": 20, "added_kv_proj_dim": 128},
    "flf2v": {"in_channels": 36, "image_dim": 20, "added_kv_proj_dim": 128, "pos_embed_seq_len": 514},
    "i2v of a14b": {"in_channels": 36},
    "ti2v": {"in_channels": 48, "out_channels": 48},
}


def dit(**sizes):
    base = {"num_attention_heads": 2, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2}
    return WanTransformer3DModel(**base | sizes)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize("kind", DITS)
def test_original_transformers(kind: str, prefix: str, original_names) -> None:
    module = dit(**DITS[kind])
    state = dict(module.state_dict())
    original = original_names.dit(state)
    theirs = convert_wan_transformer_to_diffusers(dict(original))
    if (position := theirs.pop("img_emb.emb_pos", None)) is not None:  # the one name it does not know
        theirs["condition_embedder.image_embedder.pos_embed"] = position
    assert_same(Held(theirs), state)
    found = keys.components(Held({prefix + name: tensor for name, tensor in original.items()}))
    assert set(found) == {"transformer"}
    assert_same(found["transformer"], state)
    config = shapes.transformer_config(found["transformer"]).to_json()
    assert config == {name: config[name] for name in config} | {
        k: module.config[k] for k in config if k != "patch_size"
    }


def test_names_written_out(original_names) -> None:
    original = original_names.dit(dict(dit(**DITS["flf2v"]).state_dict()))
    for name in (
        "patch_embedding.weight",
        "text_embedding.0.weight",
        "time_embedding.2.bias",
        "time_projection.1.weight",
        "head.head.weight",
        "head.modulation",
        "blocks.1.modulation",
        "blocks.0.self_attn.q.weight",
        "blocks.0.self_attn.norm_k.weight",
        "blocks.0.cross_attn.o.bias",
        "blocks.1.cross_attn.k_img.weight",
        "blocks.1.cross_attn.norm_k_img.weight",
        "blocks.0.norm3.weight",
        "blocks.0.ffn.0.weight",
        "blocks.0.ffn.2.bias",
        "img_emb.proj.0.weight",
        "img_emb.proj.1.bias",
        "img_emb.proj.3.weight",
        "img_emb.proj.4.bias",
        "img_emb.emb_pos",
    ):
        assert name in original


def test_diffusers_names_stay(original_names) -> None:
    state = dict(dit().state_dict())
    found = keys.components(Held({f"model.diffusion_model.{n}": t for n, t in state.items()}))
    assert_same(found["transformer"], state)


@pytest.mark.parametrize("blocks", [1, 2])
def test_vae_of_wan21(blocks: int, original_names) -> None:
    module = AutoencoderKLWan(base_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=blocks)
    state = dict(module.state_dict())
    original = original_names.vae(state, blocks)
    if blocks == 2:  # diffusers' converter counts the blocks of the published size
        assert_same(Held(convert_wan_vae_to_diffusers(dict(original))), state)
    found = keys.components(Held(original))
    assert set(found) == {"vae"}
    assert_same(found["vae"], state)
    config = shapes.vae_config(found["vae"])
    assert (config.base_dim, config.dim_mult, config.num_res_blocks, config.z_dim) == (4, (1, 2, 4, 4), blocks, 16)
    assert (config.latents_mean, config.scale_factor_spatial) == (WAN21_VAE.latents_mean, 8)
    assert config.temperal_downsample == (False, True, True)


def test_vae_of_wan22(original_names) -> None:
    sizes = {"dim_mult": [1, 2, 2, 2], "z_dim": 48, "temperal_downsample": [False, True, True], "patch_size": 2}
    sizes |= {"is_residual": True, "in_channels": 12, "out_channels": 12, "base_dim": 4, "decoder_base_dim": 8}
    statistics = {"latents_mean": WAN22_VAE.latents_mean, "latents_std": WAN22_VAE.latents_std}
    module = AutoencoderKLWan(**sizes, **statistics, num_res_blocks=2, scale_factor_spatial=16)
    state = dict(module.state_dict())
    original = original_names.vae(state, 2)
    for name in (
        "encoder.downsamples.0.downsamples.0.residual.2.weight",
        "encoder.downsamples.1.downsamples.0.shortcut.weight",
        "encoder.downsamples.1.downsamples.2.time_conv.weight",
        "encoder.downsamples.0.downsamples.2.resample.1.weight",
        "decoder.upsamples.0.upsamples.3.time_conv.weight",
        "decoder.upsamples.0.upsamples.3.resample.1.bias",
        "decoder.upsamples.3.upsamples.2.residual.6.bias",
        "encoder.middle.1.to_qkv.weight",
        "decoder.head.2.weight",
        "conv1.weight",
    ):
        assert name in original
    found = keys.components(Held(original))["vae"]
    assert_same(found, state)
    config = shapes.vae_config(found).to_json()
    assert config == config | {k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()}
    assert config["scale_factor_spatial"] == 16


def test_text_encoder(peer, original_names) -> None:
    state = peer.state("text_encoder")
    once = {n: t for n, t in state.items() if n != "encoder.embed_tokens.weight"}
    original = original_names.text(state)
    for name in (
        "token_embedding.weight",
        "norm.weight",
        "blocks.0.norm1.weight",
        "blocks.1.attn.o.weight",
        "blocks.0.ffn.gate.0.weight",
        "blocks.0.pos_embedding.embedding.weight",
        "blocks.0.norm2.weight",
        "blocks.1.ffn.fc1.weight",
        "blocks.1.ffn.fc2.weight",
    ):
        assert name in original
    extra = {"spiece_model": torch.zeros(9, dtype=torch.uint8)}
    for stored in (
        original,
        state,
        once | extra,
        {f"text_encoders.umt5xxl.transformer.{n}": t for n, t in once.items()},
    ):
        found = keys.components(Held(stored))
        assert set(found) == {"text_encoder"}
        assert_same(found["text_encoder"], once)
        config = shapes.text_config(found["text_encoder"])
        theirs = peer.pipeline.text_encoder.config.to_dict()
        assert {k: theirs[k] for k in config if k != "architectures"} == {
            k: v for k, v in config.items() if k != "architectures"
        }


def test_clip_vision(original_names) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1}
    module = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=28, patch_size=14, hidden_act="gelu"))
    for parameter in module.parameters():
        parameter.data.normal_()
    state = {f"vision_model.{n.removeprefix('vision_model.')}": t for n, t in module.state_dict().items()}
    comfy = state | {
        "visual_projection.weight": torch.zeros(4, 4),
        "vision_model.embeddings.position_ids": torch.arange(5)[None],
    }
    for stored in (original_names.clip(state), comfy):
        found = keys.components(Held(stored))
        assert set(found) == {"image_encoder"}
        assert_same(found["image_encoder"], state)
        config = shapes.image_config(found["image_encoder"])
        assert config == config | sizes | {"image_size": 28, "patch_size": 14}


def test_a_file_with_a_whole_model(peer, original_names) -> None:
    stored = {f"model.diffusion_model.{n}": t for n, t in original_names.dit(peer.state("transformer")).items()}
    stored |= {f"vae.{n}": t for n, t in original_names.vae(peer.state("vae"), 1).items()}
    text = {n: t for n, t in peer.state("text_encoder").items() if n != "encoder.embed_tokens.weight"}
    stored |= {f"text_encoders.umt5xxl.transformer.{n}": t for n, t in text.items()}
    found = keys.components(Held(stored))
    assert set(found) == {"transformer", "vae", "text_encoder"}
    assert_same(found["vae"], peer.state("vae"))


def test_an_unknown_name_is_seen(peer, original_names) -> None:
    stored = original_names.dit(peer.state("transformer")) | {"blocks.0.surprise.weight": torch.zeros(1)}
    assert "blocks.0.surprise.weight" in keys.components(Held(stored))["transformer"].shapes


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["blocks.0.self_attn.q.lora_A.weight"], "a LoRA"),
        (["lora_unet_blocks_0_self_attn_q.lora_down.weight"], "a LoRA"),
        (["diffusion_model.blocks.0.norm3.diff"], "a LoRA"),
        (["vace_patch_embedding.weight"], "a Wan VACE"),
        (["model.layers.0.mlp.weight"], "nothing of Wan (1 tensors, the first 'model.layers.0.mlp.weight')"),
        ([], "nothing of Wan"),
    ],
)
def test_what_other_files_look_like(names: list[str], words: str) -> None:
    assert words in shapes.looks_like(Held({name: torch.zeros(2, 2) for name in names}))


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_published_sizes_name_their_model(name: str) -> None:
    known = KNOWN_MODELS[name]
    assert known in shapes.published(known.transformer)
