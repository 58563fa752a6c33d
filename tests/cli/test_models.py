"""``swiftwan models``: what is here, and what can be."""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from swiftwan.cli.models import model_states
from swiftwan.models.config import KNOWN_MODELS, ClipConfig
from swiftwan.weights.build import UMT5_XXL, parameter_count, text_parameter_count

Call = Callable[..., tuple[int, str, str]]


def test_models_tells_what_is_here(monkeypatch: pytest.MonkeyPatch, call: Call, tmp_path: Path) -> None:
    from huggingface_hub import constants

    def snapshot(name: str) -> Path:
        folder = tmp_path / f"models--Wan-AI--{name}"
        (folder / "snapshots" / "abc").mkdir(parents=True)
        (folder / "snapshots" / "abc" / "model_index.json").touch()
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("abc")
        return folder

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    snapshot("Wan2.1-T2V-1.3B-Diffusers")
    partly = snapshot("Wan2.2-TI2V-5B-Diffusers")
    (partly / "blobs").mkdir()
    (partly / "blobs" / "0123.incomplete").touch()
    code, out, _ = call("models", "--json")
    assert code == 0
    states = {row["name"]: row["state"] for row in json.loads(out)["models"]}
    assert states["wan2.1-t2v-1.3b"] == "in the hub cache"
    assert states["wan2.2-ti2v-5b"] == "partly here"
    assert states["wan2.1-t2v-14b"] == "not here"
    code, out, _ = call("models")
    assert code == 0
    assert all(name in out for name in states)


def test_the_sizes_told_are_those_of_the_modules() -> None:
    told = {row.name: row.weights_bytes for row in model_states()}
    for name, known in KNOWN_MODELS.items():
        experts = 1 if known.boundary_ratio is None else 2
        parameters = experts * parameter_count(known.transformer) + parameter_count(known.vae)
        parameters += text_parameter_count(UMT5_XXL)
        parameters += parameter_count(ClipConfig()) if known.transformer.image_dim else 0
        assert told[name] == pytest.approx(2 * parameters, rel=0.015), name


def test_models_download(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    module = types.ModuleType("swiftwan.weights.download")
    asked = []
    vars(module)["download"] = lambda hub_id: asked.append(hub_id) or Path("/cache/model")
    monkeypatch.setitem(sys.modules, "swiftwan.weights.download", module)
    assert call("models", "--download", "wan2.1-t2v-1.3b") == (0, "/cache/model\n", "")
    code, out, _ = call("models", "--download", "someone/a-wan", "--json")
    assert json.loads(out) == {"name": "someone/a-wan", "folder": "/cache/model"}
    assert asked == ["Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "someone/a-wan"]
