"""``swiftwan convert`` and ``swiftwan info`` of weights, as a user types them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from swiftwan.cli import main
from swiftwan.weights.find import locate

POCKET = locate("pocket").path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_whole_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["convert", "pocket", str(out), "--dtype", "fp32"]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines() == [f"{out}: pocket, 0.04 GB"]
    for component in ("transformer", "vae", "text_encoder", "tokenizer"):
        assert f"{component:<14} {POCKET}" in told.err
    assert main(["explain", "a red circle", "--model", str(out)]) == 0
    assert main(["convert", "pocket", str(out)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "vae"
    assert main(["convert", "pocket", str(out), "--only", "vae", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["folder"] == str(out)
    assert set(told["origins"]) == {"vae"}
    file = out / "diffusion_pytorch_model.safetensors"
    assert told["bytes"] == sum(t.nbytes for t in load_file(file).values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/no/such/model", "OUT"], "/no/such/model does not exist"),
        (["pocket", "OUT", "--dtype", "int8"], "dtype is 'int8'. Known: bf16, fp16, fp32."),
        (["pocket", "OUT", "--only", "vea"], "Did you mean 'vae'?"),
        (["pocket", "OUT", "--model", "wan2.1-t2v-13b"], "Did you mean 'wan2.1-t2v-1.3b'?"),
        (["pocket", "OUT", "--model", "wan2.1-t2v-1.3b"], "not wan2.1-t2v-1.3b"),
        (["LORA", "OUT"], "looks like a LoRA, which goes on top of a model; a transformer is needed here"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    paths = {"OUT": str(tmp_path / "out"), "LORA": str(tmp_path / "lora.safetensors")}
    assert main(["convert", *(paths.get(a, a) for a in arguments)]) == 2
    told = capsys.readouterr()
    last = told.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last
    assert told.out == ""
    assert not (tmp_path / "out").exists()


def test_what_a_weights_file_holds(capsys: pytest.CaptureFixture[str]) -> None:
    file = POCKET / "vae" / "diffusion_pytorch_model.safetensors"
    assert main(["info", str(file)]) == 0
    assert "the Wan 2.1 VAE" in capsys.readouterr().out
    assert main(["info", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"] == sum(t.numel() for t in load_file(file).values())
