import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from swiftwan.errors import WeightsError
from swiftwan.models.config import KNOWN_MODELS
from swiftwan.weights import check


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.randn(3, 5), "b": torch.zeros(0, 2), "c": torch.tensor(4)}, path)
    return path


def message(call, *args) -> str:
    with pytest.raises(WeightsError) as caught:
        call(*args)
    text = str(caught.value)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


def test_whole_file(weights: Path) -> None:
    assert check.check_file(weights) == {"a": (3, 5), "b": (0, 2), "c": ()}


def with_header(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\x10\x00\x00", "truncated: has 3 bytes"),
        (b"<!DOCTYPE html><html>not found</html>" * 9, "web page"),
        (b"\n <html><body>" * 9, "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git-LFS pointer"),
        (b"PK\x03\x04" + bytes(200), "PyTorch pickle"),
        (b"\x80\x02}q\x00." + bytes(200), "is a pickle"),
        (b"GGUF\x03\x00\x00\x00" + bytes(200), "GGUF"),
        (b"\xff" * 200, "not a safetensors file"),
        (bytes(4096), "begins with zeros"),
        (with_header([1, 2]), "damaged safetensors header"),
        (with_header({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "damaged"),
        (with_header({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, bytes(8)), "damaged"),
        (with_header({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8)), "damaged"),
        (with_header({"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 8]}}, bytes(8)), "damaged"),
        (with_header({"a": ENTRY, "b": ENTRY}, bytes(8)), "overlap"),
        ((4).to_bytes(8, "little") + b"\xff\xff{}", "damaged safetensors header"),
        ((300).to_bytes(8, "little") + b"[" * 300, "damaged safetensors header"),
    ],
)
def test_what_is_not_weights_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    assert words in message(check.check_file, path)


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_truncated_says_both_sizes(weights: Path, cut: int) -> None:
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:-cut])
    assert f"has {size - cut:,} of {size:,} bytes" in message(check.check_file, weights)


def test_trailing_bytes(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes() + b"xyz")
    assert "3 bytes past its end" in message(check.check_file, weights)


def test_missing_folder_and_dangling_link(tmp_path: Path) -> None:
    assert "is missing" in message(check.check_file, tmp_path / "no.safetensors")
    assert "is a folder" in message(check.check_file, tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert "which is gone" in message(check.check_file, tmp_path / "link")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_flipped_bit_is_found(weights: Path) -> None:
    digest = check.sha256(weights)
    check.check_sha256(weights, digest.upper())
    flip_a_bit(weights)
    check.check_file(weights)  # the header says nothing about the data
    assert "is damaged" in message(check.check_sha256, weights, digest)


def test_digest_is_remembered(weights: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = check.sha256(weights)
    monkeypatch.setattr(check.hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
    assert check.sha256(weights) == digest
    assert [p.name for p in own_cache.iterdir()] == ["sha256.json"]  # no temporary left


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"x": 3}'])
def test_damaged_digest_store_is_rebuilt(weights: Path, own_cache: Path, content: str) -> None:
    own_cache.mkdir(parents=True)
    (own_cache / "sha256.json").write_text(content)
    assert check.sha256(weights) == check.sha256(weights)


def test_unwritable_digest_store_is_said(weights: Path, own_cache: Path, caplog) -> None:
    own_cache.parent.mkdir(parents=True)
    own_cache.write_text("a file where the folder should be")
    assert len(check.sha256(weights)) == 64
    assert "each start will hash all files" in caplog.text


def test_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "vae").mkdir(parents=True)
    for name in ("a.json", "vae/b.safetensors", "vae/c.safetensors"):
        (folder / name).write_bytes(os.urandom(100))
    assert check.verify_manifest(folder) == 0
    check.write_manifest(folder)
    assert check.verify_manifest(folder) == 3
    flip_a_bit(folder / "vae" / "b.safetensors")
    (folder / "vae" / "c.safetensors").unlink()
    text = message(check.verify_manifest, folder)
    assert "1 missing (vae/c.safetensors)" in text
    assert "1 damaged (SHA-256 differs) (vae/b.safetensors)" in text


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "vae/../../x"])
def test_manifest_stays_inside(tmp_path: Path, name: str) -> None:
    check.write_json(tmp_path / check.MANIFEST, {"files": {name: "0" * 64}})
    assert "outside the folder" in message(check.verify_manifest, tmp_path)


@pytest.mark.parametrize("content", ["{", '{"files": [1]}', '{"files": {"a": 1}}'])
def test_damaged_manifest(tmp_path: Path, content: str) -> None:
    (tmp_path / check.MANIFEST).write_text(content)
    assert "is not a manifest" in message(check.verify_manifest, tmp_path)


def test_compare_tells_all_at_once() -> None:
    expected = {f"w{i}": (2, 3) for i in range(9)}
    found = {"w0": (2, 3), "w1": (3, 2), "extra.scale": (1,), "left.over": (1,)}
    text = message(lambda: check.compare(expected, found, "vae", ignore=("left.*",)))
    assert "7 missing (w2, w3, w4, w5, w6 and 2 more)" in text
    assert "1 unexpected (extra.scale)" in text
    assert "1 of another shape (w1 3x2 instead of 2x3)" in text
    check.compare(expected, expected | {"left.over": (1,)}, "vae", ignore=("left.*",))


def transformer_shapes(name: str) -> dict[str, tuple[int, ...]]:
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        module = WanTransformer3DModel.from_config(KNOWN_MODELS[name].transformer.to_json())
    return {n: tuple(t.shape) for n, t in module.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wan2.1-t2v-1.3b", "wan2.1-t2v-1.3b"),
        ("wan2.1-t2v-14b", "wan2.1-t2v-14b or wan2.2-t2v-a14b"),
        ("wan2.1-i2v-14b-720p", "wan2.1-i2v-14b-480p or wan2.1-i2v-14b-720p"),
        ("wan2.1-flf2v-14b", "wan2.1-flf2v-14b"),
        ("wan2.2-ti2v-5b", "wan2.2-ti2v-5b"),
        ("wan2.2-i2v-a14b", "wan2.2-i2v-a14b"),
    ],
)
def test_shapes_tell_the_model(name: str, words: str) -> None:
    assert check.looks_like(transformer_shapes(name)) == words


def test_wrong_model_is_named() -> None:
    expected, found = transformer_shapes("wan2.1-i2v-14b-480p"), transformer_shapes("wan2.1-t2v-14b")
    text = message(check.compare, expected, found, "transformer")
    assert "the file looks like wan2.1-t2v-14b or wan2.2-t2v-a14b, its config like wan2.1-i2v-14b" in text


def test_foreign_shapes() -> None:
    assert check.looks_like({"a": (1,)}) is None
    assert check.looks_like({"patch_embedding.weight": ()}) is None
    assert check.looks_like({"blocks.0.self_attn.q.weight": (1, 1)}) == "the original Wan layout, not diffusers'"
