"""Every key format in its true names, against the change that its family means."""

from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from tests.weights.lora_families import CONFIG, FAMILIES, I2V, SIZES, T2V, kohya, low_rank, underscored
from torch import Tensor

from swiftwan.models.adapter import Hadamard, LowRank, merge
from swiftwan.models.config import KNOWN_MODELS, TransformerConfig
from swiftwan.models.dit import WanTransformer
from swiftwan.weights.lora import LoraFile
from swiftwan.weights.lora_names import names_of, original


def changed_by(path: Path, config: TransformerConfig = CONFIG, strength: float = 1.0) -> dict[str, Tensor]:
    """By how much each parameter of a fresh transformer changes when a file is merged into it."""
    model = WanTransformer(config).requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    merge(model, LoraFile.open(path).fit(config).load(), strength, torch.device("cpu"))
    after = dict(model.named_parameters())
    return {name: after[name] - old for name, old in before.items() if not torch.equal(old, after[name])}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_loads_in_its_true_names(family, write):
    case = FAMILIES[family]()
    path = write(case.tensors, metadata=case.metadata)
    report = LoraFile.open(path).fit(CONFIG).report
    assert (set(report.matched), report.unmatched, report.misshaped) == (set(case.tensors), {}, {})
    found = changed_by(path, strength=0.5)
    assert found.keys() == case.changes.keys()
    for name, change in case.changes.items():
        assert torch.allclose(found[name], 0.5 * change, atol=2e-5, rtol=1e-5), name


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_every_parameter_of_every_model_has_its_original_name(name):
    config = KNOWN_MODELS[name].transformer
    with torch.device("meta"):
        model = WanTransformer(config)
    names = names_of(config)
    assert dict(names.shapes) == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert names.linears == {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert original("blocks.7.norm2") == "blocks.7.norm3"
    theirs = {original(path) for path in set(names.aliases.values())}
    assert not {path for path in theirs if "to_" in path or "net." in path or "condition" in path}
    assert len(theirs) == len(set(names.aliases.values()))


@pytest.mark.parametrize("style", ["comfy", "musubi"])
def test_diffusers_converters_agree_where_they_work(style, write):
    pairs = {"self_attn": "qkvo", "cross_attn": "qkvo"}
    paths = [f"blocks.{n}.{attn}.{p}" for n in range(2) for attn, letters in pairs.items() for p in letters]
    paths += [f"blocks.{n}.ffn.{i}" for n in range(2) for i in (0, 2)]
    tensors = {}
    for path in paths:
        out, into = {"ffn.0": (32, 24), "ffn.2": (24, 32)}.get(path.partition(".")[2].partition(".")[2], (24, 24))
        key = f"lora_unet_{underscored(path)}" if style == "musubi" else f"diffusion_model.{path}"
        tensors[f"{key}.lora_down.weight"] = torch.randn(4, into)
        tensors[f"{key}.lora_up.weight"] = torch.randn(out, 4)
        tensors[f"{key}.alpha"] = torch.tensor(1.0)
    path = write(tensors)
    theirs = WanPipeline.lora_state_dict(str(path))
    found = changed_by(path, T2V)
    for name, change in found.items():
        module = f"transformer.{name.removesuffix('.weight')}"
        expected = theirs[f"{module}.lora_B.weight"] @ theirs[f"{module}.lora_A.weight"]
        assert torch.allclose(change, expected, atol=1e-5), name
    assert len(theirs) == 2 * len(found)


def peft_configs():
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    targets = ["to_q", "to_k", "ffn.net.2"]
    return {
        "lora": LoraConfig(r=4, lora_alpha=2, target_modules=targets),
        "rslora": LoraConfig(r=4, lora_alpha=2, use_rslora=True, target_modules=targets),
        "dora": LoraConfig(r=4, lora_alpha=2, use_dora=True, target_modules=targets),
        "lora-bias": LoraConfig(r=4, lora_alpha=2, lora_bias=True, target_modules=targets),
        "conv": LoraConfig(r=4, lora_alpha=2, target_modules=["patch_embedding"]),
        "alpha-pattern": LoraConfig(
            r=4, lora_alpha=2, alpha_pattern={"blocks.1.attn1.to_q": 8}, target_modules=targets
        ),
        "lokr": LoKrConfig(r=2, alpha=3, target_modules=targets),
        "loha": LoHaConfig(r=2, alpha=3, target_modules=targets),
    }


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # peft takes lora_bias' own biases for broken factors
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "lora-bias", "conv", "alpha-pattern", "lokr", "loha"])
def test_what_peft_saves_loads_as_peft_merges_it(kind, tmp_path):
    from peft import get_peft_model

    wrapped = get_peft_model(WanTransformer3DModel(**SIZES, **I2V), peft_configs()[kind])
    for name, parameter in wrapped.named_parameters():
        if any(word in name for word in ("lora_", "lokr_", "hada_")):
            torch.nn.init.normal_(parameter) if "magnitude" not in name else parameter.data.mul_(1.5)
    wrapped.save_pretrained(tmp_path)
    ours = WanTransformer(CONFIG).requires_grad_(False)
    plain = {n.replace("base_layer.", ""): p for n, p in wrapped.base_model.model.state_dict().items()}
    ours.load_state_dict({name: plain[name] for name in ours.state_dict()})
    merge(ours, LoraFile.open(tmp_path / "adapter_model.safetensors").fit(CONFIG).load(), 1.0, torch.device("cpu"))
    theirs = wrapped.merge_and_unload().state_dict()
    for name, parameter in ours.state_dict().items():
        assert torch.allclose(parameter, theirs[name], atol=1e-5, rtol=1e-4), name


@pytest.mark.parametrize("family", ["bare-diffusers", "lycoris-loha"])
def test_reading_a_file_multiplies_no_factors(family, write, monkeypatch):
    case = FAMILIES[family]()
    made: list[bool] = []
    for kind in (LowRank, Hadamard):
        dense = kind.dense
        monkeypatch.setattr(kind, "dense", lambda self, dense=dense: made.append(dense(self).is_meta) or dense(self))
    LoraFile.open(write(case.tensors, metadata=case.metadata)).fit(CONFIG).load()
    assert made
    assert all(made)


def test_lycoris_dora_by_columns(write):
    model = WanTransformer(T2V).requires_grad_(False)
    weight = model.blocks[0].ffn.net[2].weight.clone()
    down, up, lengths = torch.randn(2, 32), torch.randn(24, 2), torch.rand(1, 32) + 0.5
    key = "lycoris_blocks_0_ffn_2"
    path = write({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.dora_scale": lengths})
    merge(model, LoraFile.open(path).fit(T2V).load(), 1.0, torch.device("cpu"))
    changed = weight + up @ down
    expected = changed * lengths / changed.norm(dim=0, keepdim=True)
    assert torch.allclose(model.blocks[0].ffn.net[2].weight, expected, atol=1e-5)


def test_a_partial_musubi_file_loads(write):
    case = kohya(lambda theirs, ours: f"lora_unet_{underscored(theirs)}")
    kept = {key: t for key, t in case.tensors.items() if key.startswith("lora_unet_blocks_1_self_attn_q.")}
    assert changed_by(write(kept)).keys() == {"blocks.1.attn1.to_q.weight"}


def test_a_file_for_both_experts_is_told_apart(write):
    high, low = (low_rank(lambda t, o, p=p: f"{p}.{o}") for p in ("transformer", "transformer_2"))
    file = LoraFile.open(write(high.tensors | low.tensors))
    assert file.experts == {"high", "low"}
    for expert, case in (("high", high), ("low", low)):
        fitted = file.fit(CONFIG, expert)
        assert set(fitted.report.matched) == set(case.tensors)
        name = "blocks.0.attn1.to_q.weight"
        dense = fitted.load()[name].dense(torch.zeros(24, 24))
        assert torch.allclose(dense, case.changes[name], atol=1e-5)
    alone = file.fit(CONFIG).report
    assert set(alone.matched) == set(high.tensors)
    assert set(alone.unmatched) == set(low.tensors)
    assert "this model has one transformer" in alone.left_out()


def test_a_text_to_video_adapter_fits_an_image_to_video_model(write):
    tensors = {"diffusion_model.blocks.0.cross_attn.k.lora_A.weight": torch.randn(2, 24)}
    tensors["diffusion_model.blocks.0.cross_attn.k.lora_B.weight"] = torch.randn(24, 2)
    tensors["diffusion_model.patch_embedding.lora_A.weight"] = torch.randn(2, 16, 1, 2, 2)
    tensors["diffusion_model.patch_embedding.lora_B.weight"] = torch.randn(24, 2, 1, 1, 1)
    path = write(tensors)
    report = LoraFile.open(path).fit(CONFIG).report
    assert report.notes == ("patch_embedding.weight: zeros for input channels 16 to 35, which the file does not know",)
    change = changed_by(path)["patch_embedding.weight"]
    a, b = (tensors[f"diffusion_model.patch_embedding.lora_{x}.weight"] for x in "AB")
    expected = torch.einsum("or,rctyx->octyx", b[:, :, 0, 0, 0], a)
    assert torch.allclose(change[:, :16], expected, atol=1e-5)
    assert not change[:, 16:].any()
