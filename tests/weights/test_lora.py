"""Every key format in its true names, against the change that its family means, computed here on its own."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from swiftwan.errors import WeightsError
from swiftwan.models.adapter import Hadamard, LowRank, merge
from swiftwan.models.config import KNOWN_MODELS, TransformerConfig
from swiftwan.models.dit import WanTransformer
from swiftwan.weights.lora import LoraFile, describe
from swiftwan.weights.lora_names import names_of, original, split

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


@pytest.fixture
def write(tmp_path: Path):
    def write(
        tensors: dict[str, Tensor], name: str = "lora.safetensors", metadata: dict[str, str] | None = None
    ) -> Path:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / name, metadata)
        return tmp_path / name

    return write


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
