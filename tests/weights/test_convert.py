"""``convert``: what is written, in which type, and that nothing is written when something is wrong."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from swiftwan.errors import OutputError, RequestError, SwiftwanError, WeightsError
from swiftwan.models.config import KNOWN_MODELS
from swiftwan.weights import convert as module
from swiftwan.weights import write
from swiftwan.weights.convert import convert


def refused(call, kind: type[SwiftwanError] = WeightsError) -> str:
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def assert_state(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name


def test_each_component_alone(peer, original: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    vae = convert(str(original / "Wan2.1_VAE.pth"), tmp_path / "vae", only="vae", on_tensor=lambda *e: seen.append(e))
    assert vae.model == "the Wan 2.1 VAE"
    assert seen[-1] == ("vae", len(peer.state("vae")), len(peer.state("vae")))
    assert_state(AutoencoderKLWan.from_pretrained(tmp_path / "vae").state_dict(), peer.state("vae"))
    convert(str(original / "models_t5_umt5-xxl-enc-bf16.pth"), tmp_path / "text", only="text_encoder")
    text = UMT5EncoderModel.from_pretrained(tmp_path / "text")
    assert_state(text.state_dict(), peer.state("text_encoder"))
    convert(str(original), tmp_path / "dit", only="transformer")
    assert_state(WanTransformer3DModel.from_pretrained(tmp_path / "dit").state_dict(), peer.state("transformer"))
    assert "has no transformer_2; it has transformer, vae" in refused(
        lambda: convert(str(original), tmp_path / "x", only="transformer_2")
    )
    assert "looks like the Wan 2.1 VAE; a text encoder is asked for" in refused(
        lambda: convert(str(original / "Wan2.1_VAE.pth"), tmp_path / "x", only="text_encoder")
    )
    assert not (tmp_path / "x").exists()


def test_types(peer, original: Path, tmp_path: Path) -> None:
    convert(str(original), tmp_path / "half", dtype="bf16")
    state = load_file(tmp_path / "half" / "transformer" / "diffusion_pytorch_model.safetensors")
    kept = {name for name, tensor in state.items() if tensor.dtype == torch.float32}
    assert kept == {n for n in state if "time_embedder" in n or "scale_shift_table" in n or ".norm2." in n}
    assert_state(state, peer.state("transformer"))
    for component, stem in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        state = load_file(tmp_path / "half" / component / f"{stem}.safetensors")
        assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    convert(str(tmp_path / "half"), tmp_path / "same")
    for file in (tmp_path / "half").rglob("*.safetensors"):
        again = load_file(tmp_path / "same" / file.relative_to(tmp_path / "half"))
        assert_state(again, load_file(file))
        assert {n: t.dtype for n, t in again.items()} == {n: t.dtype for n, t in load_file(file).items()}
    for file in ("model_index.json", "transformer/config.json", "vae/config.json", "text_encoder/config.json"):
        half, same = (json.loads((tmp_path / name / file).read_text()) for name in ("half", "same"))
        assert half == same


def test_packed_types_become_bf16(peer, original_names, tmp_path: Path) -> None:
    state = original_names.dit(peer.state("transformer"))
    packed = {n: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for n, t in state.items()}
    save_file(packed, tmp_path / "wan.safetensors")
    convert(str(tmp_path / "wan.safetensors"), tmp_path / "out", only="transformer")
    found = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    types = {
        tuple(sorted({found[n].dtype for n in found if (found[n].ndim == 2) == flat}, key=str))
        for flat in (True, False)
    }
    assert types == {(torch.bfloat16,), (torch.float32,)}


def test_float16_that_overflows(peer, original_names, tmp_path: Path) -> None:
    state = original_names.dit(peer.state("transformer"))
    state["blocks.0.ffn.0.weight"][3, 3] = 1e5
    try:
        save_file(state, tmp_path / "wan.safetensors")
    finally:
        state["blocks.0.ffn.0.weight"][3, 3] = 0.01
    source = str(tmp_path / "wan.safetensors")
    text = refused(lambda: convert(source, tmp_path / "out", only="transformer", dtype="fp16"))
    assert "holds 1e+05, float16 ends at 65504; take bf16 or fp32" in text
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


def test_shards(peer, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write.write_shards, "__kwdefaults__", {"shard_bytes": 200_000})
    convert(str(original), tmp_path / "out")
    files = sorted((tmp_path / "out" / "transformer").glob("*.safetensors"))
    assert len(files) > 2
    largest = max(t.nbytes for t in peer.state("transformer").values())
    assert all(file.stat().st_size < max(200_000, largest) + 20_000 for file in files)
    found = WanTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer")
    assert_state(found.state_dict(), peer.state("transformer"))


def test_files_that_other_readers_open(tmp_path: Path) -> None:
    """Types of every width in one file, odd counts of elements, a scalar and an empty tensor."""
    tensors = {
        "odd": torch.randn(3, 5).bfloat16(),
        "scalar": torch.tensor(2.5),
        "wide": torch.arange(7),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "none": torch.zeros(0, 4, dtype=torch.float16),
        "flags": torch.tensor([True, False, True]),
    }
    types = {t: n for n, t in write.TYPES.items()}
    slots = [write.Slot(n, tuple(t.shape), types[t.dtype]) for n, t in tensors.items()]
    write.write_shards(tmp_path, "model", slots, lambda slot: tensors[slot.name])
    found = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"dtype": "bf61"}, RequestError, "Did you mean 'bf16'?"),
        ({"only": "vea"}, RequestError, "Did you mean 'vae'?"),
        ({"model": KNOWN_MODELS["wan2.2-ti2v-5b"]}, WeightsError, "unpublished size, not wan2.2-ti2v-5b"),
    ],
)
def test_wrong_requests(original: Path, tmp_path: Path, options: dict, kind: type, words: str) -> None:
    assert words in refused(lambda: convert(str(original), tmp_path / "out", **options), kind)
    assert not (tmp_path / "out").exists()


def test_nothing_is_lost_or_left(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "holiday.mp4").touch()
    assert "is not empty" in refused(lambda: convert(str(original), out), OutputError)
    assert "is a file" in refused(lambda: convert(str(original), out / "holiday.mp4"), OutputError)
    (out / "holiday.mp4").unlink()
    monkeypatch.setattr(write.shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    assert "its disk has 0.000 GB free" in refused(lambda: convert(str(original), out), OutputError)
    monkeypatch.undo()

    def interrupt(component: str, done: int, total: int) -> None:
        if component == "vae" and done > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(str(original), out, on_tensor=interrupt)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_shards", full)
    assert "No space left on device" in refused(lambda: convert(str(original), out), OutputError)
    assert list(out.iterdir()) == []
    assert {p.name for p in tmp_path.iterdir()} <= {"Wan2.1-Tiny", "cache", "out"}


def test_random_weights_are_not_converted(tmp_path: Path) -> None:
    assert "random weights" in refused(lambda: convert("random:wan2.1-t2v-1.3b", tmp_path / "out"))


_MEASURE = """
import sys
from pathlib import Path
from swiftwan.weights.convert import convert

def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024

seen = []
convert(sys.argv[1], Path(sys.argv[2]), only="transformer", on_tensor=lambda *_: seen.append(anonymous()))
sys.stdout.write(str(max(seen) - seen[0]))
"""


def test_host_memory_is_a_few_tensors(tmp_path: Path, original_names) -> None:
    """Pages of the mapped file do not count: the system takes them back when it needs them."""
    sizes = {"num_attention_heads": 4, "text_dim": 64, "freq_dim": 64, "ffn_dim": 4096, "num_layers": 8}
    with torch.device("meta"):
        meta = WanTransformer3DModel(**sizes).state_dict()
    state = {name: torch.zeros(tensor.shape) for name, tensor in meta.items()}
    torch.save(original_names.dit(state), tmp_path / "wan.pth")
    largest, total = (f(tensor.nbytes for tensor in state.values()) for f in (max, sum))
    assert total > 200 * 2**20
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path / "wan.pth"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(run.stdout) < 2 * largest + 16 * 2**20, f"{int(run.stdout):,} of {total:,}"
