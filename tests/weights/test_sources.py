"""Tensors from files: packed types, and files that are not what they should be."""

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from swiftwan.errors import SwiftwanError, UnavailableError, WeightsError
from swiftwan.weights.sources import GgufFile, Piece, PthFile, Renamed, Shards, open_file

gguf = pytest.importorskip("gguf", reason="GGUF needs swiftwan[gguf]")


def refused(call, kind: type[SwiftwanError] = WeightsError) -> str:
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def write_gguf(path: Path, name: str, data, kind: str, **fields: list[int]) -> None:
    writer = gguf.GGUFWriter(path, "wan")
    for field, value in fields.items():
        writer.add_array(f"comfy.gguf.{field}.{name}", value)
    writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_first_bytes_say_the_format(tmp_path: Path) -> None:
    tensor = torch.randn(4, 32)
    save_file({"a": tensor}, tmp_path / "a.pth")
    torch.save({"a": tensor}, tmp_path / "b.gguf")
    write_gguf(tmp_path / "c.safetensors", "a", tensor.numpy(), "F32")
    for file, kind in (("a.pth", Shards), ("b.gguf", PthFile), ("c.safetensors", GgufFile)):
        source = open_file(tmp_path / file)
        assert isinstance(source, kind)
        assert (source.shapes, source.dtypes) == ({"a": (4, 32)}, {"a": "F32"})
        for _ in range(2):
            assert torch.equal(source.read("a"), tensor)
            source.close()


def test_pieces_of_a_tensor(tmp_path: Path) -> None:
    save_file({"qkv": torch.arange(24.0).reshape(1, 6, 4)}, tmp_path / "w.safetensors")
    names = {"q": Piece("qkv", 0, 3, drop=1), "v": Piece("qkv", 2, 3, drop=1), "all": Piece("qkv", drop=1)}
    found = Renamed(open_file(tmp_path / "w.safetensors"), names)
    assert found.shapes == {"q": (2, 4), "v": (2, 4), "all": (6, 4)}
    assert found.read("q").tolist() == torch.arange(8.0).reshape(2, 4).tolist()
    assert found.read("v").flatten().tolist() == list(range(16, 24))
    assert found.read("v").untyped_storage().nbytes() == 32  # not a view that keeps the other two


def test_shapes_that_gguf_could_not_hold(tmp_path: Path) -> None:
    tensor = torch.randn(8, 2, 1, 4, 4)
    write_gguf(tmp_path / "w.gguf", "a", tensor.reshape(8, 32).numpy(), "F32", orig_shape=list(tensor.shape))
    assert torch.equal(open_file(tmp_path / "w.gguf").read("a"), tensor)
    write_gguf(tmp_path / "x.gguf", "a", tensor.reshape(8, 32).numpy(), "F32", orig_shape=[8, 3])
    assert "a has 256 values for a shape of (8, 3)" in refused(lambda: open_file(tmp_path / "x.gguf"))


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_gguf_types_that_only_llama_cpp_writes(tmp_path: Path, kind: str) -> None:
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = torch.randint(0, 256, (4, nbytes), dtype=torch.uint8) & 0x3B  # keeps the float16 scales finite
    write_gguf(tmp_path / "w.gguf", "a.weight", data.numpy(), kind)
    source = open_file(tmp_path / "w.gguf")
    assert source.shapes == {"a.weight": (4, block)}
    expected = torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]))
    assert torch.equal(source.read("a.weight"), expected)
    source.close()
    assert torch.equal(source.read("a.weight"), expected)


def test_an_unknown_gguf_type_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = gguf.quants.quantize(torch.randn(4, 32).numpy(), gguf.GGMLQuantizationType.Q8_0)
    write_gguf(tmp_path / "w.gguf", "a.weight", data, "Q8_0")
    monkeypatch.delitem(gguf.quants._type_traits, gguf.GGMLQuantizationType.Q8_0)
    source = open_file(tmp_path / "w.gguf")
    assert "a.weight is stored as Q8_0, unknown to gguf" in refused(lambda: source.read("a.weight"))


def test_without_the_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w.gguf").write_bytes(b"GGUF" + bytes(60))
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'swiftwan[gguf]'" in refused(lambda: open_file(tmp_path / "w.gguf"), UnavailableError)


class Malice:
    def __reduce__(self):
        return os.system, ("touch /tmp/swiftwan-was-here",)


@pytest.mark.parametrize(
    "content", [{"a": Malice()}, Malice(), [torch.zeros(1)], {"a": 1}, {}, {"a": {"b": torch.ones(1)}}]
)
def test_pth_files_that_are_not_tensors(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    text = refused(lambda: open_file(tmp_path / "w.pth"))
    assert str(tmp_path / "w.pth") in text
    if "Malice" in str(content) or isinstance(content, Malice):
        assert "cannot be read as tensors alone (it asks for posix.system)" in text
    assert not Path("/tmp/swiftwan-was-here").exists()
