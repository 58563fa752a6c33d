"""LPIPS (Zhang et al. 2018, arXiv 1801.03924) on VGG16: how far apart two pictures look.

    d(x, y) = sum over 5 layers of the mean over pixels of  w_l . (f_l(x) - f_l(y))^2

f_l are VGG16's activations at the end of its five stages, scaled to length 1 over their channels; w_l were learned from
people's judgements. Neither is ours to ship: the w_l, version 0.1, come with the package ``lpips`` (BSD-2) where it
is installed; VGG16's weights, torchvision's, from the hub, where timm keeps them as safetensors.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu

from swiftwan.errors import WeightsError, reason
from swiftwan.measure.hub import read_from_hub
from swiftwan.measure.missing import Missing
from swiftwan.weights.sources import open_file

VGG16 = "timm/vgg16.tv_in1k"
PLACE = "SWIFTWAN_LPIPS"
"""Environment variable that names a file with all weights, for machines without the hub."""

_STAGES = ((3, 64, 64), (64, 128, 128), (128, 256, 256, 256), (256, 512, 512, 512), (512, 512, 512, 512))
_FRAMES_AT_ONCE = 4


class _Vgg(nn.Module):
    """VGG16's convolutions (arXiv 1409.1556), under the names of the package lpips: ``slice2.5`` is torchvision's
    ``features.5``, whose numbers count ReLUs and poolings too."""

    def __init__(self) -> None:
        super().__init__()
        number = 0
        for stage, widths in enumerate(_STAGES, 1):
            layers = nn.ModuleDict()
            for wide, out in zip(widths, widths[1:], strict=False):
                layers[str(number)] = nn.Conv2d(wide, out, 3, padding=1)
                number += 2
            number += 1
            self.add_module(f"slice{stage}", layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for stage, layers in enumerate(self.children()):
            assert isinstance(layers, nn.ModuleDict)
            if stage:
                x = max_pool2d(x, 2)
            for convolution in layers.values():
                x = relu(convolution(x))
            features.append(x)
        return features


class _Head(nn.Module):
    """One weight a channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"1": nn.Conv2d(width, 1, 1, bias=False)})

    def forward(self, difference: Tensor) -> Tensor:
        weighted: Tensor = self.model["1"](difference)
        return weighted.mean(dim=(1, 2, 3))


class Lpips(nn.Module):
    """Distances of pictures; 0 is equal. Weights are those of ``lpips.LPIPS(net="vgg")``, version 0.1."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _Vgg()
        for stage, widths in enumerate(_STAGES):
            self.add_module(f"lin{stage}", _Head(widths[-1]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances (N,) of pictures (N, 3, H, W) in -1 to 1."""
        total = torch.zeros(len(x), device=x.device, dtype=x.dtype)
        for stage, (a, b) in enumerate(zip(self._features(x), self._features(y), strict=True)):
            total += self.get_submodule(f"lin{stage}")((a - b).square())
        return total

    @torch.no_grad()
    def distance(self, frames: Tensor, reference: Tensor) -> float:
        """Mean distance of two clips' frames, uint8 (F, H, W, 3)."""
        pairs = zip(frames.split(_FRAMES_AT_ONCE), reference.split(_FRAMES_AT_ONCE), strict=True)
        return torch.cat([self(self._pictures(a), self._pictures(b)) for a, b in pairs]).mean().item()

    def temporal(self, frames: Tensor) -> float:
        """Mean distance of consecutive frames: low is smooth, high flickers, 0 stands still."""
        return self.distance(frames[1:], frames[:-1])

    def _features(self, pictures: Tensor) -> list[Tensor]:
        # ImageNet's mean and spread, which lpips states for pictures in -1 to 1.
        shift = pictures.new_tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
        scale = pictures.new_tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
        return [f / (f.norm(dim=1, keepdim=True) + 1e-10) for f in self.net((pictures - shift) / scale)]

    def _pictures(self, frames: Tensor) -> Tensor:
        device = next(self.parameters()).device
        return frames.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def load_lpips(device: torch.device) -> Lpips | Missing:
    """LPIPS with VGG16 from the hub or its cache, or whole from the file that ``SWIFTWAN_LPIPS`` names."""
    if place := os.environ.get(PLACE):
        weights: dict[str, Tensor] | Missing = _read_file(Path(place).expanduser())
    else:
        weights = _gather()
    if isinstance(weights, Missing):
        return weights
    with torch.device("meta"):
        model = Lpips()
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as problem:
        return Missing(f"not LPIPS's weights: {' '.join(str(problem).split())[:200]}")
    return model.float().to(device).eval().requires_grad_(False)


def _read_file(path: Path) -> dict[str, Tensor] | Missing:
    """What the package lpips saves, as safetensors."""
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as problem:
        return Missing(f"no LPIPS weights at '{path}': {reason(problem)}")
    return {name: weight for name, weight in weights.items() if not name.startswith("scaling_layer.")}


def _gather() -> dict[str, Tensor] | Missing:
    """The heads from the package lpips, VGG16's convolutions from the hub's file, which has its classifier too."""
    from huggingface_hub import hf_hub_download

    heads = _heads()
    if isinstance(heads, Missing):
        return heads

    def read(local_files_only: bool) -> dict[str, Tensor]:
        path = hf_hub_download(VGG16, "model.safetensors", local_files_only=local_files_only)
        with torch.device("meta"):
            wanted = [name.split(".") for name in Lpips().net.state_dict()]
        with safe_open(path, framework="pt") as file:
            return {f"net.{s}.{n}.{leaf}": file.get_tensor(f"features.{n}.{leaf}") for s, n, leaf in wanted}

    vgg = read_from_hub(VGG16, read)
    return vgg if isinstance(vgg, Missing) else vgg | heads


def _heads() -> dict[str, Tensor] | Missing:
    found = find_spec("lpips")
    if found is None or found.origin is None:
        return Missing("LPIPS's own weights come with the package lpips, which is not installed: pip install lpips")
    try:
        tensors = open_file(Path(found.origin).parent / "weights" / "v0.1" / "vgg.pth")
    except WeightsError as problem:
        return Missing(str(problem))
    return {name: tensors.read(name, torch.device("cpu")) for name in tensors.shapes}
