import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from swiftwan.errors import WeightsError
from swiftwan.models.config import KNOWN_MODELS, WAN22_VAE
from swiftwan.weights import check, find
from swiftwan.weights.find import identify, known_model, locate, read_layout
from swiftwan.weights.layout import Folder, Layout, OriginalFolder, RandomModel, WeightsFile


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    asked: list[tuple[str, str | None]] = []

    def download(hub_id: str, revision: str | None = None) -> Path:
        asked.append((hub_id, revision))
        return Path("/hub") / hub_id

    monkeypatch.setattr(find, "download", download)
    return asked


def read(folder: Path) -> Layout:
    return read_layout(Folder(folder, folder.name))


def refused(call, *args) -> str:
    with pytest.raises(WeightsError) as caught:
        call(*args)
    text = str(caught.value)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- locate


def test_names(tiny: Path, no_network: list, monkeypatch: pytest.MonkeyPatch) -> None:
    known = KNOWN_MODELS["wan2.2-ti2v-5b"]
    assert locate("random:wan2.2-TI2V-5b") == RandomModel(known)
    assert locate(str(tiny)) == Folder(tiny, str(tiny))
    assert locate("wan2.2-ti2v-5b", revision="v2") == Folder(Path("/hub") / known.hub_id, known.name)
    assert locate("someone/Wan_1.3").name == "someone/Wan_1.3"
    assert no_network == [(known.hub_id, "v2"), ("someone/Wan_1.3", None)]
    assert known_model(known.hub_id) is known_model("random:wan2.2-ti2v-5b") is known
    assert known_model("pocket") is None


def test_local_folder_before_the_hub_only_when_meant(
    tiny: Path, no_network: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    assert locate("owner/name").path == Path("/hub/owner/name")
    assert "it is empty" in refused(locate, "./owner/name")
    shutil.copytree(tiny, "owner/name", dirs_exist_ok=True)
    assert locate("owner/name") == Folder(tmp_path / "owner/name", "owner/name")
    assert len(no_network) == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wan2.1-t2v-1.3", "Did you mean 'wan2.1-t2v-1.3b'?"),
        ("pokcet", "Did you mean 'pocket'?"),
        ("zzzz", "Known: pocket, wan2.1"),
        ("", "Known: pocket"),
        ("random:wan2.1-t2v-41b", "Did you mean 'wan2.1-t2v-14b'?"),
        ("random:pocket", "There is no model random: 'pocket'"),
        ("/no/such/folder", "/no/such/folder does not exist"),
        ("./no", "no does not exist"),
        ("a/b/c", "There is no model 'a/b/c'"),
        ("model.gguf", "model.gguf does not exist"),
    ],
)
def test_unknown_names(name: str, words: str) -> None:
    assert words in refused(locate, name)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "it is empty"),
        (["config.json", "diffusion_pytorch_model.safetensors"], "looks like one component of a model"),
        (["wan-Q4.gguf"], "name the transformer's own file, for example"),
        (["holiday.mp4"], "it holds holiday.mp4"),
    ],
)
def test_other_folders_are_named(tmp_path: Path, files: list[str], words: str) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    text = refused(locate, str(folder))
    assert words in text
    assert "no model_index.json" in text
    assert "Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in text


@pytest.mark.parametrize("name", ["w.gguf", "w.safetensors", "w.pth"])
def test_single_files(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).touch()
    assert locate(str(tmp_path / name)) == WeightsFile(tmp_path / name, str(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    assert locate(name) == WeightsFile(tmp_path / name, name)


@pytest.mark.parametrize(
    "names",
    [["models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"], ["high_noise_model/a.safetensors"], ["Wan2.2_VAE.pth"]],
)
def test_original_folders(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert locate(str(tmp_path)) == OriginalFolder(tmp_path, str(tmp_path))


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w.ckpt").touch()
    assert "no weights file that swiftwan reads (.safetensors, .gguf" in refused(locate, str(tmp_path / "w.ckpt"))


def test_component_points_to_its_model(tiny: Path) -> None:
    assert f"the model is the folder above, {tiny}" in refused(locate, str(tiny / "transformer"))


def test_pocket(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check.write_manifest(tiny)
    monkeypatch.setattr(find, "_pocket_folder", lambda: tiny)
    assert locate("pocket") == Folder(tiny, "pocket")
    shard = next((tiny / "vae").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 4
    shard.write_bytes(content)
    assert f"1 damaged (SHA-256 differs) (vae/{shard.name})" in refused(locate, "pocket")


def test_finding_loads_no_heavy_library() -> None:
    script = "import sys, swiftwan.weights.find; print({'torch', 'huggingface_hub'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


# --- read_layout


def test_layout_of_diffusers_own_folder(tiny: Path) -> None:
    layout = read(tiny)
    assert set(layout.classes) == {"transformer", "vae", "text_encoder", "tokenizer", "scheduler"}
    assert (layout.transformer.dim, layout.transformer.num_layers, layout.transformer.patch_size) == (
        24,
        2,
        (1, 2, 2),
    )
    assert layout.transformer_2 is None
    assert layout.boundary_ratio is None
    assert not layout.expand_timesteps
    assert layout.vae.base_dim == 4
    assert len(layout.files["transformer"].paths) > 1
    assert all(f.is_file() for files in layout.files.values() for f in files.paths)
    assert layout.configs["scheduler"]["flow_shift"] == 3.0
    assert identify(layout) is None


def test_two_experts(tiny: Path) -> None:
    shutil.copytree(tiny / "transformer", tiny / "transformer_2")
    edit(tiny / "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"])
    assert "no boundary_ratio" in refused(read, tiny)
    edit(tiny / "model_index.json", boundary_ratio=0.875)
    layout = read(tiny)
    assert layout.boundary_ratio == 0.875
    assert layout.transformer_2 == layout.transformer


def test_missing_shards_are_told_at_once(tiny: Path) -> None:
    shards = sorted((tiny / "transformer").glob("*.safetensors"))
    shards[0].unlink()
    shards[-1].unlink()
    (tiny / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    text = refused(read, tiny)
    assert f"transformer lacks 2 of {len(shards)} files ({shards[0].name}, {shards[-1].name})" in text
    assert "vae/diffusion_pytorch_model.safetensors is missing" in text


def rename_vae(tiny: Path, name: str) -> None:
    os.rename(tiny / "vae" / "diffusion_pytorch_model.safetensors", tiny / "vae" / name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "diffusion_pytorch_model.fp16.safetensors",
            "only the variant diffusion_pytorch_model.fp16.safetensors",
        ),
        ("diffusion_pytorch_model.bin", "a pickle; in a diffusers folder swiftwan reads"),
        ("Wan2.1_VAE.pth", "a pickle; in a diffusers folder swiftwan reads"),
        (
            "diffusion_pytorch_model-00001-of-00002.safetensors",
            "no diffusion_pytorch_model.safetensors.index",
        ),
    ],
)
def test_other_weights_files_are_refused(tiny: Path, name: str, words: str) -> None:
    rename_vae(tiny, name)
    assert words in refused(read, tiny)


def test_stale_file_beside_an_index(tiny: Path) -> None:
    shutil.copy(
        next((tiny / "transformer").glob("*.safetensors")),
        tiny / "transformer" / "diffusion_pytorch_model.safetensors",
    )
    assert "remove the stale one" in refused(read, tiny)


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.pth", "..", "", "a\0.safetensors", 7]
    + ["a\\b.safetensors", "x.safetensors\n", ".hidden.safetensors", ["x"], "C:x.safetensors"],
)
def test_malicious_index(tiny: Path, name: object) -> None:
    index = tiny / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    edit(index, weight_map={"patch_embedding.weight": name})
    assert "a shard must be a .safetensors file in the same folder" in refused(read, tiny)


def test_links_out_of_the_folder(tiny: Path, tmp_path: Path) -> None:
    rename_vae(tiny, "../../outside.safetensors")
    (tiny / "vae" / "diffusion_pytorch_model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    assert "outside the model's folder" in refused(read, tiny)


def test_links_within_the_hub_cache(tiny: Path, tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--a--b"
    snapshot = repo / "snapshots" / "c0ffee"
    shutil.copytree(tiny, snapshot)
    (repo / "blobs").mkdir()
    for file in list(snapshot.rglob("*.safetensors")):
        blob = repo / "blobs" / check.sha256(file)
        shutil.move(file, blob)
        file.symlink_to(os.path.relpath(blob, file.parent))
    layout = read_layout(locate(str(snapshot)))
    assert len(layout.files["transformer"].paths) > 1
    blob = layout.files["vae"].paths[0].resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    assert "1 damaged (SHA-256 differs) (vae/diffusion_pytorch_model.safetensors)" in refused(locate, str(snapshot))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model_index.json", "<html>", "not a JSON object"),
        ("model_index.json", "[]", "not a JSON object"),
        ("transformer/config.json", "{", "not a JSON object"),
        ("transformer/config.json", '{"qk_norm": "none"}', "Is this a Wan checkpoint?"),
        ("transformer/diffusion_pytorch_model.safetensors.index.json", "{}", "no weight_map"),
        ("vae/diffusion_pytorch_model.safetensors", "<!doctype html>" * 9, "web page"),
        ("text_encoder/model.safetensors", "", "is empty"),
    ],
)
def test_damaged_files(tiny: Path, file: str, content: str, words: str) -> None:
    (tiny / file).write_text(content)
    assert words in refused(read, tiny)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "WanVACEPipeline"}, "is a WanVACEPipeline; swiftwan runs WanPipeline"),
        ({"_class_name": None}, "is a None"),
        ({"vae": [None, None], "text_encoder": None}, "names no vae, text_encoder"),
        ({"transformer": ["diffusers", "WanVACETransformer3DModel"]}, "its transformer is a WanVACE"),
    ],
)
def test_other_pipelines(tiny: Path, changes: dict, words: str) -> None:
    edit(tiny / "model_index.json", **changes)
    assert words in refused(read, tiny)


def test_missing_parts(tiny: Path) -> None:
    (tiny / "tokenizer" / "tokenizer.json").unlink()
    edit(tiny / "transformer" / "config.json", image_dim=8)
    text = refused(read, tiny)
    assert "tokenizer/tokenizer.json (or spiece.model) is missing" in text
    assert "no image_encoder" in text
    shutil.rmtree(tiny / "vae")
    assert "vae/config.json is missing" in refused(read, tiny)


# --- identify


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_published_models_by_size(tiny: Path, name: str) -> None:
    known = KNOWN_MODELS[name]
    layout = dataclasses.replace(
        read(tiny),
        name="my-model",
        configs={"scheduler": {"flow_shift": known.defaults.flow_shift}},
        transformer=known.transformer,
        transformer_2=known.transformer if known.boundary_ratio else None,
        vae=known.vae,
    )
    assert identify(layout) is known
    assert identify(dataclasses.replace(layout, vae=dataclasses.replace(known.vae, z_dim=5))) is None
    if known.vae != WAN22_VAE:
        assert identify(dataclasses.replace(layout, vae=WAN22_VAE)) is None


@pytest.mark.parametrize(
    ("name", "flow_shift", "size"),
    [
        ("Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", 3.0, "720p"),
        ("mine-480p", 5.0, "480p"),
        ("mine", 5.0, "720p"),
        ("mine", 3.0, "480p"),
        ("mine", None, "480p"),
    ],
)
def test_480p_and_720p_have_equal_sizes(tiny: Path, name: str, flow_shift: float, size: str) -> None:
    known = KNOWN_MODELS["wan2.1-i2v-14b-480p"]
    layout = dataclasses.replace(
        read(tiny),
        name=name,
        configs={"scheduler": {"flow_shift": flow_shift}},
        transformer=known.transformer,
        vae=known.vae,
    )
    assert identify(layout) is KNOWN_MODELS[f"wan2.1-i2v-14b-{size}"]
