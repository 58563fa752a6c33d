"""Folders and files in every format, written in their true names, loaded, converted and run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from safetensors.torch import save_file

import swiftwan as sw
from swiftwan.errors import SwiftwanError, WeightsError
from swiftwan.models.config import KNOWN_MODELS, WAN22_VAE, KnownModel
from swiftwan.plan import describe
from swiftwan.weights import gather
from swiftwan.weights.convert import convert
from swiftwan.weights.find import locate, read_layout
from swiftwan.weights.gather import expert_files
from swiftwan.weights.layout import Layout, OriginalFolder, WeightsFile

gguf = pytest.importorskip("gguf", reason="GGUF needs swiftwan[gguf]")


def read(path: Path) -> Layout:
    source = locate(str(path))
    assert isinstance(source, OriginalFolder | WeightsFile)
    return read_layout(source)


def refused(call, kind: type[SwiftwanError] = WeightsError) -> str:
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def assert_parts(
    layout: Layout, peer, *, rounding: float = 0.0, components=("transformer", "vae", "text_encoder")
) -> None:
    """Every tensor is the peer's; of the transformer within ``rounding`` of each tensor's largest value."""
    for component in components:
        state = peer.state(component)
        state.pop("encoder.embed_tokens.weight", None)
        tensors = layout.files[component]
        assert set(tensors.shapes) == set(state)
        for name, tensor in state.items():
            off = (tensors.read(name).float() - tensor).abs().max()
            allowed = rounding * tensor.abs().max() if component.startswith("transformer") else 0
            assert off <= allowed, f"{component}.{name}: {off:.2e}, allowed {allowed:.2e}"


def tensors_of(peer, component: str) -> list[torch.Tensor]:
    return [t for n, t in peer.state(component).items() if n != "encoder.embed_tokens.weight"]


def run(model: Path) -> torch.Tensor:
    engine = sw.Engine.load(str(model), plan=[], device="cpu", dtype="fp32")
    request = sw.TextToVideo(
        "a red circle moves left",
        negative_prompt="blurry",
        width=32,
        height=32,
        num_frames=5,
        num_inference_steps=2,
        guidance_scale=3.0,
        guidance_scale_2=3.0 if engine.facts.experts == 2 else None,
        flow_shift=3.0,
        seed=3,
    )
    return engine.run(request).latents


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = ((found - expected).norm() / expected.norm()).item()
    assert error < 1e-3, f"latents differ by {error:.1e}"


def publish(monkeypatch: pytest.MonkeyPatch, layout: Layout, name: str, **changes: object) -> KnownModel:
    """Enter a tiny model into the table of published ones."""
    like = KNOWN_MODELS["wan2.1-t2v-1.3b"]
    known = KnownModel(name, f"Wan-AI/{name}", layout.transformer, layout.vae, like.defaults, **changes)
    monkeypatch.setitem(KNOWN_MODELS, name, known)
    return known


# --- the original layout


def test_original_of_wan21(original: Path, peer, tmp_path: Path) -> None:
    layout = read(original)
    assert_parts(layout, peer)
    assert layout.transformer_2 is None
    assert layout.tokenizer == original / "google" / "umt5-xxl"
    assert describe(str(original)).known.transformer == layout.transformer
    expected = peer.latents()
    assert_close(run(original), expected)
    done = convert(str(original), tmp_path / "out")
    assert done.bytes == sum(t.nbytes for c in ("transformer", "vae", "text_encoder") for t in tensors_of(peer, c))
    theirs = WanPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(peer.latents(theirs), expected)
    assert_close(run(tmp_path / "out"), expected)


def test_original_of_wan22(original_pair: Path, pair, tmp_path: Path) -> None:
    layout = read(original_pair)
    assert_parts(layout, pair, components=("transformer", "transformer_2", "vae"))
    assert layout.boundary_ratio == 0.875
    convert(str(original_pair), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert (index["boundary_ratio"], index["_class_name"]) == (0.875, "WanPipeline")
    theirs = WanPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(pair.latents(theirs), pair.latents())
    assert_close(run(original_pair), pair.latents())


def test_a_missing_expert(original_pair: Path, tmp_path: Path) -> None:
    shutil.rmtree(original_pair / "low_noise_model")
    text = refused(lambda: convert(str(original_pair), tmp_path / "out"))
    assert "low_noise_model/, the low-noise expert is missing" in text
    assert not (tmp_path / "out").exists()


def test_all_that_an_original_folder_lacks(original: Path) -> None:
    (original / "Wan2.1_VAE.pth").unlink()
    (original / "models_t5_umt5-xxl-enc-bf16.pth").unlink()
    shutil.rmtree(original / "google")
    text = refused(lambda: read(original))
    for part in ("a VAE (Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl"):
        assert part in text
    for file in original.glob("diffusion*"):
        file.unlink()
    assert "diffusion_pytorch_model.safetensors is missing" in refused(lambda: read(original))


def test_a_part_of_another_model(original: Path, original_names) -> None:
    sizes = {"dim_mult": [1, 2, 2, 2], "num_res_blocks": 1, "z_dim": 48, "base_dim": 4, "decoder_base_dim": 4}
    vae = AutoencoderKLWan(
        **sizes, is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16,
        latents_mean=WAN22_VAE.latents_mean, latents_std=WAN22_VAE.latents_std,
    )  # fmt: skip
    (original / "Wan2.1_VAE.pth").unlink()
    torch.save(original_names.vae(dict(vae.state_dict()), 1), original / "VAE.pth")
    assert "VAE.pth looks like the Wan 2.2 VAE, made for another model" in refused(lambda: read(original))


def test_a_config_of_another_model(original: Path) -> None:
    config = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps(config | {"dim": 1536, "num_layers": 30}))
    text = refused(lambda: read(original))
    assert "dim 128 instead of 1536, num_layers 2 instead of 30" in text
    (original / "config.json").write_text(json.dumps(config | {"num_heads": 7}))
    assert "a width of 128 does not divide into 7 heads" in refused(lambda: read(original))


def test_image_models_bring_clip(original: Path, peer, original_names) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {
        "num_attention_heads": 1,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": 2,
        "in_channels": 36,
    }
    module = WanTransformer3DModel(**sizes, image_dim=64, added_kv_proj_dim=128)
    for file in (*original.glob("diffusion*"), original / "config.json"):
        file.unlink()
    save_file(original_names.dit(dict(module.state_dict())), original / "diffusion_pytorch_model.safetensors")
    assert "a CLIP vision encoder" in refused(lambda: read(original))
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1}
    clip = CLIPVisionModel(CLIPVisionConfig(**vision, image_size=28, patch_size=14, hidden_act="gelu"))
    torch.save(original_names.clip(dict(clip.state_dict())), original / "models_clip_open-clip-vit-huge-14.pth")
    convert(str(original), original.parent / "out")
    index = json.loads((original.parent / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "WanImageToVideoPipeline"
    again = CLIPVisionModel.from_pretrained(original.parent / "out" / "image_encoder")
    image = torch.randn(1, 3, 28, 28)
    assert torch.equal(again.eval()(image).last_hidden_state, clip.eval()(image).last_hidden_state)


# --- single files


def comfy(peer, tree: Path, write_parts) -> Path:
    """ComfyUI's folders with the parts in them; returns the folder for transformers."""
    parts = tree / "parts"
    write_parts(peer, parts)
    models = tree / "models"
    for folder in ("diffusion_models", "vae", "text_encoders"):
        (models / folder).mkdir(parents=True)
    shutil.move(parts / "Wan2.1_VAE.pth", models / "vae" / "wan_2.1_vae.pth")
    text = {n: t for n, t in peer.state("text_encoder").items() if n != "encoder.embed_tokens.weight"}
    save_file(text | {"spiece_model": torch.zeros(9, dtype=torch.uint8)}, models / "text_encoders" / "umt5.safetensors")
    shutil.move(parts / "google" / "umt5-xxl", models / "text_encoders" / "tokenizer")
    for file in (models / "text_encoders" / "tokenizer").iterdir():
        shutil.move(file, models / "text_encoders")
    return models / "diffusion_models"


def fp8_scaled(state: dict[str, torch.Tensor], scale_name: str) -> dict[str, torch.Tensor]:
    packed = {}
    for name, tensor in state.items():
        if tensor.ndim != 2 or not name.endswith(".weight"):
            packed[name] = tensor
            continue
        scale = tensor.abs().max() / 448
        packed[name] = (tensor / scale).to(torch.float8_e4m3fn)
        packed[name.replace(".weight", f".{scale_name}")] = scale.float()
    return packed


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("packing", ["fp32", "bf16", "fp8", "scale_weight", "weight_scale"])
def test_comfy_files(peer, write_parts, original_names, tmp_path: Path, prefix: str, packing: str) -> None:
    folder = comfy(peer, tmp_path, write_parts)
    state = original_names.dit(peer.state("transformer"))
    if packing in ("scale_weight", "weight_scale"):
        state = fp8_scaled(state, packing) | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    elif packing != "fp32":
        kind = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[packing]
        state = {n: t.to(kind) for n, t in state.items()}
    save_file({prefix + n: t for n, t in state.items()}, folder / "wan.safetensors")
    layout = read(folder / "wan.safetensors")
    # fp8 e4m3 has three bits of mantissa: half a step is 1/16; a value below its range becomes a multiple of 2^-9.
    rounding = {"fp32": 0, "bf16": 2**-8}.get(packing, 2**-4 + 2**-9)
    assert_parts(layout, peer, rounding=rounding)
    assert layout.tokenizer == tmp_path / "models" / "text_encoders"


def test_a_scaled_text_encoder(peer, write_parts, original_names, tmp_path: Path) -> None:
    folder = comfy(peer, tmp_path, write_parts)
    save_file(original_names.dit(peer.state("transformer")), folder / "wan.safetensors")
    texts = folder.parent / "text_encoders"
    (texts / "umt5.safetensors").unlink()
    state = {n: t for n, t in peer.state("text_encoder").items() if n != "encoder.embed_tokens.weight"}
    marker = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    save_file(fp8_scaled(state, "scale_weight") | marker, texts / "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    found = read(folder / "wan.safetensors").files["text_encoder"]
    assert set(found.shapes) == set(state)
    for name, tensor in state.items():
        assert (found.read(name) - tensor).abs().max() <= (2**-4 + 2**-9) * tensor.abs().max(), name


def test_scaled_weights_are_value_times_scale(peer, write_parts, original_names, tmp_path: Path) -> None:
    folder = comfy(peer, tmp_path, write_parts)
    packed = fp8_scaled(original_names.dit(peer.state("transformer")), "scale_weight")
    name = "blocks.0.ffn.0"
    rows = torch.rand(64) + 0.5
    packed[f"{name}.scale_weight"] = rows
    packed[f"{name}.scale_input"] = torch.ones(())
    save_file(packed | {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}, folder / "wan.safetensors")
    found = read(folder / "wan.safetensors").files["transformer"].read("blocks.0.ffn.net.0.proj.weight")
    assert torch.equal(found, packed[f"{name}.weight"].float() * rows[:, None])
    assert_close(run(folder / "wan.safetensors"), run(convert_to(folder / "wan.safetensors", tmp_path / "out", "fp32")))
    packed[f"{name}.scale_weight"] = torch.ones(3)
    save_file(packed, folder / "wan.safetensors")
    assert "has 3 scales for 64 rows" in refused(lambda: read(folder / "wan.safetensors"))
    packed[f"{name}.weight"] = torch.zeros(64, 64, dtype=torch.uint8)
    save_file(packed, folder / "wan.safetensors")
    assert "is packed as U8" in refused(lambda: read(folder / "wan.safetensors"))


def convert_to(source: Path, out: Path, dtype: str) -> Path:
    return convert(str(source), out, dtype=dtype).folder


GGUF_ROUNDING = {"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 127, "Q4_0": 1 / 7}


def write_gguf(path: Path, state: dict[str, torch.Tensor], kind: str) -> None:
    """As ComfyUI's packer does: matrices quantised, the rest in float32, five axes told beside a flat tensor."""
    writer = gguf.GGUFWriter(path, "wan")
    for name, tensor in state.items():
        quantised = tensor.ndim == 2 and tensor.shape[-1] % 32 == 0
        to = gguf.GGMLQuantizationType[kind if quantised else "F32"]
        values = tensor.numpy()
        if tensor.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
            values = values.reshape(tensor.shape[0], -1)
        data = gguf.quants.quantize(values, to)
        writer.add_tensor(name, data, raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", GGUF_ROUNDING)
def test_gguf(peer, write_parts, original_names, tmp_path: Path, kind: str) -> None:
    folder = comfy(peer, tmp_path, write_parts)
    write_gguf(folder / "wan.gguf", original_names.dit(peer.state("transformer")), kind)
    layout = read(folder / "wan.gguf")
    assert_parts(layout, peer, rounding=GGUF_ROUNDING[kind])
    if kind == "Q8_0":
        out = convert_to(folder / "wan.gguf", tmp_path / "out", "fp32")
        assert_close(run(folder / "wan.gguf"), run(out))
        assert "damaged or truncated" in refused(lambda: read(cut(folder / "wan.gguf")))


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-5000])
    return path


@pytest.mark.parametrize(
    ("high", "low"),
    [
        ("wan2.2_t2v_high_noise_14B_fp8_scaled", "wan2.2_t2v_low_noise_14B_fp8_scaled"),
        ("Wan2.2-T2V-A14B-HighNoise-Q4_K_M", "Wan2.2-T2V-A14B-LowNoise-Q4_K_M"),
        ("Wan2_2-T2V-A14B-HIGH_fp8", "Wan2_2-T2V-A14B-LOW_fp8"),
        ("HighNoise/wan-HighNoise", "LowNoise/wan-LowNoise"),
        ("high/wan", "low/wan"),
    ],
)
def test_experts_in_two_files(
    pair, original_pair: Path, write_parts, original_names, tmp_path: Path, monkeypatch, high: str, low: str
) -> None:
    publish(monkeypatch, read(original_pair), "tiny-a14b", boundary_ratio=0.875)
    folder = comfy(pair, tmp_path, write_parts)
    files = {"transformer": folder / f"{high}.safetensors", "transformer_2": folder / f"{low}.safetensors"}
    for component, file in files.items():
        file.parent.mkdir(exist_ok=True)
        save_file(original_names.dit(pair.state(component)), file)
    for file in files.values():
        assert expert_files(file) == files
    layout = read(files["transformer_2"])
    assert_parts(layout, pair, components=("transformer", "transformer_2"))
    assert layout.boundary_ratio == 0.875
    assert describe(str(files["transformer"])).known.name == "tiny-a14b"
    files["transformer"].unlink()
    text = refused(lambda: describe(str(files["transformer_2"])))
    assert "the low-noise expert of tiny-a14b; the other one is missing: expected" in text
    assert Path(text.rpartition("expected ")[2]).name == files["transformer"].name.replace("Low", "High")


def test_linked_files_keep_their_names(pair, original_pair: Path, original_names, tmp_path: Path, monkeypatch) -> None:
    publish(monkeypatch, read(original_pair), "tiny-a14b", boundary_ratio=0.875)
    (tmp_path / "blobs").mkdir()
    for component, side in (("transformer", "high"), ("transformer_2", "low")):
        save_file(original_names.dit(pair.state(component)), tmp_path / "blobs" / side[0])
        (original_pair / f"wan_{side}_noise.safetensors").symlink_to(tmp_path / "blobs" / side[0])
    assert_parts(read(original_pair / "wan_high_noise.safetensors"), pair, components=("transformer", "transformer_2"))


@pytest.mark.parametrize("name", ["wan-flow", "slow_motion", "wan_follow_highres", "yellow"])
def test_words_that_are_no_side(
    pair, original_pair: Path, original_names, tmp_path: Path, monkeypatch, name: str
) -> None:
    layout = read(original_pair)
    publish(monkeypatch, layout, "tiny-a14b", boundary_ratio=0.875)
    file = tmp_path / f"{name}.safetensors"
    save_file(original_names.dit(pair.state("transformer")), file)
    text = refused(lambda: expert_files(file))
    assert "looks like one expert of tiny-a14b, but its name says neither 'high' nor 'low'" in text
    publish(monkeypatch, layout, "tiny-14b")  # now one model and one expert have these shapes, as with T2V 14B
    assert expert_files(file) == {"transformer": file}
    assert gather.published(file, name, layout.transformer).name == "tiny-14b"
    lone = shutil.copyfile(file, tmp_path / "wan_high_noise.safetensors")
    assert "if it is tiny-14b, take the word 'high' out of its name" in refused(lambda: expert_files(lone))
    (tmp_path / "high_quality").mkdir()
    good = shutil.copyfile(file, tmp_path / "high_quality" / "wan.safetensors")
    assert expert_files(good) == {"transformer": good}
    a14b = file.rename(tmp_path / "wan2.2_a14b.safetensors")
    assert "neither 'high' nor 'low'" in refused(lambda: expert_files(a14b))
    assert "looks like tiny-a14b or tiny-14b, not wan2.1-t2v-1.3b" in refused(
        lambda: expert_files(a14b, KNOWN_MODELS["wan2.1-t2v-1.3b"])
    )


def test_parts_from_the_hub(peer, original: Path, original_names, tmp_path: Path, monkeypatch, caplog) -> None:
    file = tmp_path / "alone" / "wan.safetensors"
    file.parent.mkdir()
    save_file(original_names.dit(peer.state("transformer")), file)
    assert "is not beside it, and its sizes are of no published model" in refused(lambda: read(file))
    known = publish(monkeypatch, read(original), "tiny-14b")
    asked = []

    def download(hub_id: str, revision: str | None = None, *, components=()) -> Path:
        asked.append((hub_id, tuple(components)))
        return peer.folder

    monkeypatch.setattr(gather, "download", download)
    assert describe(str(file)).known is known
    assert asked == []  # telling what a run takes brings nothing
    assert_parts(read(file), peer)
    assert asked == [(known.hub_id, ("vae", "text_encoder", "tokenizer"))]
    assert "the vae, text_encoder, tokenizer come from Wan-AI/tiny-14b" in caplog.text


def test_of_two_parts_the_larger_one(peer, write_parts, original_names, tmp_path: Path, caplog) -> None:
    folder = comfy(peer, tmp_path, write_parts)
    save_file(original_names.dit(peer.state("transformer")), folder / "wan.safetensors")
    texts = folder.parent / "text_encoders"
    state = {n: t for n, t in peer.state("text_encoder").items() if n != "encoder.embed_tokens.weight"}
    save_file({n: t.to(torch.float8_e4m3fn) for n, t in state.items()}, texts / "a_umt5_fp8.safetensors")
    (texts / "broken.safetensors").write_bytes(b"\0" * 50)
    assert_parts(read(folder / "wan.safetensors"), peer)
    assert "passed over" in caplog.text
    assert "broken.safetensors" in caplog.text


# --- what is no model


def test_wrong_files(peer, original: Path, original_names, tmp_path: Path) -> None:
    assert "looks like the Wan 2.1 VAE; a transformer is needed here" in refused(
        lambda: read(original / "Wan2.1_VAE.pth")
    )
    text = refused(lambda: read(original / "models_t5_umt5-xxl-enc-bf16.pth"))
    assert "looks like a UMT5 text encoder" in text
    lora = tmp_path / "lora.safetensors"
    save_file({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(4, 4)}, lora)
    assert "looks like a LoRA, which goes on top of a model" in refused(lambda: read(lora))
    state = original_names.dit(peer.state("transformer"))
    del state["blocks.1.ffn.2.weight"]
    save_file(state, tmp_path / "part.safetensors")
    source = str(tmp_path / "part.safetensors")
    text = refused(lambda: convert(source, tmp_path / "out", only="transformer"))
    assert "1 missing (blocks.1.ffn.net.2.weight)" in text
    assert not (tmp_path / "out").exists()


def test_truncated_pth(original: Path) -> None:
    text = refused(lambda: read(cut(original / "Wan2.1_VAE.pth")))
    assert "is truncated" in text


def test_sizes_are_only_believed_when_possible(tmp_path: Path) -> None:
    for shape in ((128, 16, 1, 2, 2), (128,), (100, 16, 1, 2, 2)):
        state = {"patch_embedding.weight": torch.zeros(shape), "blocks.0.self_attn.q.weight": torch.zeros(2, 2)}
        save_file(state, tmp_path / "w.safetensors")
        assert "but not whole" in refused(lambda: read(tmp_path / "w.safetensors"))
