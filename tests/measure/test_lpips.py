"""The formula beside torchmetrics' own LPIPS (its code is lpips's, BSD-2), on the same random weights.

Both packages take VGG's layers from torchvision; here they come from the published list of its widths, which the names
in the weights' file fix too.
"""

import pytest
import torch
import torchmetrics.functional.image.lpips as reference
from safetensors.torch import save_file
from torch import nn

from swiftwan.measure.lpips import Lpips, load_lpips

VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def vgg16_features(*_):
    layers, wide = [], 3
    for width in VGG16:
        if width == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(wide, width, 3, padding=1), nn.ReLU()]
            wide = width
    return nn.Sequential(*layers)


@pytest.fixture
def theirs(monkeypatch):
    monkeypatch.setattr(reference, "_get_tv_model_features", vgg16_features)
    model = reference._LPIPS(pretrained=False, pnet_rand=True, net="vgg").eval()
    for name, weight in model.named_parameters():
        nn.init.kaiming_normal_(weight) if weight.ndim == 4 else nn.init.normal_(weight, std=0.1)
        if name.startswith("lin"):
            weight.data.abs_()
    return model


@pytest.fixture
def file(theirs, tmp_path, monkeypatch):
    """Written as docs/measuring.md says; lpips keeps ``lin0`` and, under another name, ``lins.0``."""
    path = tmp_path / "lpips-vgg.safetensors"
    save_file({name: w.clone() for name, w in theirs.state_dict().items() if "lins" not in name}, path)
    monkeypatch.setenv("SWIFTWAN_LPIPS", str(path))
    return path


def test_distances_are_the_reference_packages(theirs, file) -> None:
    ours = load_lpips(torch.device("cpu"))
    assert isinstance(ours, Lpips)
    x, y = torch.rand(2, 2, 3, 40, 56) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(ours(x, y), theirs(x, y).flatten(), rtol=1e-4, atol=1e-6)


def test_temporal_is_the_mean_over_consecutive_frames(theirs, file) -> None:
    frames = torch.randint(0, 256, (6, 32, 48, 3), dtype=torch.uint8)
    pictures = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        wanted = theirs(pictures[1:], pictures[:-1]).mean().item()

    assert load_lpips(torch.device("cpu")).temporal(frames) == pytest.approx(wanted, rel=1e-4)


def test_a_clip_that_stands_still_has_no_temporal_distance(file) -> None:
    frames = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8).expand(3, -1, -1, -1)
    assert load_lpips(torch.device("cpu")).temporal(frames) == 0


def test_no_file_or_a_wrong_one_is_missing_with_the_reason(tmp_path, monkeypatch) -> None:
    path = tmp_path / "weights.safetensors"
    monkeypatch.setenv("SWIFTWAN_LPIPS", str(path))
    assert "no LPIPS weights at" in load_lpips(torch.device("cpu")).reason
    save_file({"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}, path)
    assert "not LPIPS's weights" in load_lpips(torch.device("cpu")).reason


@pytest.fixture
def installed(theirs, tmp_path, monkeypatch):
    """The package lpips and the hub's VGG16, as they name their tensors, with the reference's random weights."""
    monkeypatch.delenv("SWIFTWAN_LPIPS", raising=False)
    weights = theirs.state_dict()
    (tmp_path / "lpips" / "weights" / "v0.1").mkdir(parents=True)
    (tmp_path / "lpips" / "__init__.py").touch()
    heads = {name: w for name, w in weights.items() if name.startswith("lin") and "lins" not in name}
    torch.save(heads, tmp_path / "lpips" / "weights" / "v0.1" / "vgg.pth")
    monkeypatch.syspath_prepend(tmp_path)
    vgg = {f"features.{name.split('.', 2)[2]}": w for name, w in weights.items() if name.startswith("net.")}
    save_file({name: w.clone() for name, w in vgg.items()} | {"head.fc.weight": torch.zeros(2)}, tmp_path / "model")
    return tmp_path / "model"


def test_the_packages_heads_and_the_hubs_vgg_come_together(theirs, installed, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, local_files_only: str(installed))
    ours = load_lpips(torch.device("cpu"))
    assert isinstance(ours, Lpips)
    x, y = torch.rand(2, 1, 3, 40, 56) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(ours(x, y), theirs(x, y).flatten(), rtol=1e-4, atol=1e-6)


def test_without_the_hub_or_the_package_the_reason_says_which(installed, monkeypatch) -> None:
    def nothing(*_, **__):
        raise OSError("cannot be reached")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", nothing)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", nothing)
    assert (
        load_lpips(torch.device("cpu")).reason
        == "'timm/vgg16.tv_in1k' is neither here nor to be had: cannot be reached"
    )
    monkeypatch.setattr("swiftwan.measure.lpips.find_spec", lambda name: None)
    assert "pip install lpips" in load_lpips(torch.device("cpu")).reason
