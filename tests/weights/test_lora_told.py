"""What is told of a LoRA's file: what it is, what of it is left out, and why it is refused."""

import math

import pytest
import torch
from tests.weights.lora_families import CONFIG, FAMILIES, low_rank
from torch import Tensor

from swiftwan.errors import WeightsError
from swiftwan.models.config import KNOWN_MODELS
from swiftwan.weights.lora import LoraFile, describe
from swiftwan.weights.lora_names import split


def test_the_report_names_what_is_left_out(write):
    case = low_rank(lambda theirs, ours: f"diffusion_model.{theirs}")
    strange = {
        "diffusion_model.blocks.9.self_attn.q.lora_A.weight": torch.zeros(3, 24),
        "diffusion_model.vace_blocks.0.after_proj.lora_A.weight": torch.zeros(3, 24),
        "diffusion_model.blocks.0.self_attn.k.lora_A.weight": torch.zeros(3, 24),
        "diffusion_model.blocks.0.self_attn.v.set_weight": torch.zeros(24, 24),
        "diffusion_model.blocks.0.self_attn.norm_k.diff_b": torch.zeros(24),
        "lora_te1_text_model_encoder.alpha": torch.tensor(1.0),
        "something": torch.zeros(1),
    }
    bad_shape = {"diffusion_model.blocks.1.norm3.diff": torch.zeros(48)}
    report = LoraFile.open(write(case.tensors | strange | bad_shape)).fit(CONFIG).report
    assert set(report.matched) == set(case.tensors)
    assert set(report.unmatched) == set(strange)
    why = list(report.unmatched.values())
    told = " ".join(why)
    for words in (
        "block 9; this model has 2",
        "'vace_blocks.0.after_proj'",
        "up is missing",
        "'set_weight' is of no",
        "no bias",
        "no part",
    ):
        assert words in told
    assert report.misshaped == {"diffusion_model.blocks.1.norm3.diff": "48, in this model 24"}
    assert len(report.lines()) == 1 + len(strange) + 1
    assert "8 keys left out" in report.left_out()


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("wan2.1-t2v-1.3b", "wan2.1-t2v-1.3b"),
        ("wan2.2-ti2v-5b", "wan2.2-ti2v-5b"),
        ("wan2.1-t2v-14b", "wan2.1-t2v-14b"),
    ],
)
def test_a_lora_of_another_model_says_which(model, told, write):
    config = KNOWN_MODELS[model].transformer
    key = f"diffusion_model.blocks.{config.num_layers - 1}.ffn.0"
    key_0 = "diffusion_model.blocks.0.ffn.0"
    tensors = {}
    for k in (key, key_0):
        tensors[f"{k}.lora_A.weight"] = torch.zeros(1, config.dim)
        tensors[f"{k}.lora_B.weight"] = torch.zeros(config.ffn_dim, 1)
    with pytest.raises(WeightsError, match=f"is for another model: .*it is for .*{told}") as problem:
        LoraFile.open(write(tensors)).fit(CONFIG)
    assert f"{config.ffn_dim}x{config.dim}, in this model 32x24" in str(problem.value)
    assert "\n" not in str(problem.value)


def test_a_lora_of_an_unknown_offspring_says_whose_widths_it_has(write):
    key = "diffusion_model.blocks.0.ffn.0"
    tensors = {f"{key}.lora_A.weight": torch.zeros(1, 5120), f"{key}.lora_B.weight": torch.zeros(13824, 1)}
    tensors["diffusion_model.vace_blocks.0.before_proj.lora_A.weight"] = torch.zeros(1, 5120)
    with pytest.raises(WeightsError, match=r"its widths are those of wan2.1-t2v-14b, .* more"):
        LoraFile.open(write(tensors)).fit(CONFIG)


def zeros(out: int, into: int, down: str = "lora_A", up: str = "lora_B") -> dict[str, Tensor]:
    key = "diffusion_model.blocks.0.self_attn.q"
    return {f"{key}.{down}.weight": torch.zeros(out, into), f"{key}.{up}.weight": torch.zeros(into, out)}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"unet.mid.attn.to_q.lora_A.weight": torch.zeros(2, 2)}, "changes nothing in this model; 1 keys left out"),
        ({"x": torch.zeros(2)}, "no part of a LoRA that is known"),
        ({}, "holds no tensors"),
        (zeros(0, 24), "its factors are empty"),
        (zeros(2, 24) | {"diffusion_model.blocks.0.self_attn.q.alpha": torch.zeros(3)}, "alpha is 3, not one number"),
        (zeros(2, 24) | zeros(3, 24, down="none"), "do not fit each other"),
        ({"blocks.0.self_attn.q.alpha": torch.tensor(1.0)}, "no factors to go with it"),
    ],
    ids=range(7),
)
def test_files_that_change_nothing_are_errors(tensors, words, write):
    with pytest.raises(WeightsError, match=words):
        LoraFile.open(write(tensors)).fit(CONFIG)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(value, write):
    case = low_rank(lambda theirs, ours: f"transformer.{ours}")
    key = "transformer.proj_out.lora_A.weight"
    case.tensors[key][0, 0] = value
    with pytest.raises(WeightsError, match=f"{key} holds NaN or infinity"):
        LoraFile.open(write(case.tensors)).fit(CONFIG).load()


@pytest.mark.parametrize("metadata", ["{", "[]", '{"transformer.lora_alpha": "many"}', '{"transformer.r": [1]}'])
def test_damaged_settings_are_refused(metadata, write):
    path = write(FAMILIES["diffusers"]().tensors, metadata={"lora_adapter_metadata": metadata})
    with pytest.raises(WeightsError, match="damaged settings"):
        LoraFile.open(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.safetensors", None, "is missing"),
        ("empty.safetensors", b"", "is empty"),
        ("text.safetensors", b"<!doctype html>" + b" " * 60, "is a web page"),
        ("cut.safetensors", b"\x40" + b"\0" * 7 + b"{", "is truncated"),
        ("lora.pt", b"PK\x03\x04", "is a pickle, which swiftwan never opens"),
        ("lora.bin", b"", "take its .safetensors"),
        ("renamed.safetensors", b"PK\x03\x04" + b"\1" * 60, "a PyTorch pickle"),
    ],
)
def test_files_that_are_no_lora(name, content, words, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=words):
        LoraFile.open(tmp_path / name)


def test_a_key_is_taken_apart():
    assert split("lora_unet__blocks_0_self_attn_q.lora_down.weight").base == "blocks_0_self_attn_q"
    assert split("transformer_2.proj_out.lora_B.other-name.weight").low
    assert split("diffusion_model.head.diff_m").base == "head.modulation"
    assert split("blocks.0.self_attn.q.weight") is None


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("musubi", "kohya / musubi: LoRA"),
        ("wan-fun", "Wan-Fun (VideoX-Fun): LoRA"),
        ("lycoris-lokr", "LyCORIS: LoKr"),
        ("lightx2v", "original names: LoRA, full differences"),
        ("diffsynth", "DiffSynth: LoRA"),
        ("peft", "PEFT: LoRA"),
    ],
)
def test_a_file_is_described(family, told, write):
    facts = describe(write(FAMILIES[family]().tensors))
    assert facts["family"] == told
    assert facts["rank"] == "3"
    assert facts["for"] == "no model known here"
