"""A tiny decoder's weights: a file, a file on the hub, or the pocket model's own."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import torch

from swiftwan.errors import WeightsError
from swiftwan.models.vae_tiny import TinyDecoder, TinySizes
from swiftwan.weights.download import download_file
from swiftwan.weights.load import load_weights
from swiftwan.weights.sources import WEIGHTS_SUFFIXES, open_file

_ON_HUB = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)/(?P<file>.+)")


def find_tiny(name: str) -> Path:
    """The file of that path or, as ``OWNER/NAME/FILE``, on the hub; of an empty name the pocket model's.

    Raises:
        WeightsError: there is none, or the hub cannot be reached.
    """
    if not name:
        return Path(str(files("swiftwan.pocket") / "model" / "vae_tiny" / "diffusion_pytorch_model.safetensors"))
    path = Path(name).expanduser()
    if path.is_file():
        return path
    on_hub = _ON_HUB.fullmatch(name)
    if on_hub is None or not name.endswith(WEIGHTS_SUFFIXES):
        raise WeightsError(f"vae:tiny: there is no file {name}; give a path, or OWNER/NAME/FILE.safetensors on the hub")
    return download_file(on_hub["id"], on_hub["file"])


def load_tiny(name: str, latent_channels: int, pixels: int, *, device: torch.device, dtype: torch.dtype) -> TinyDecoder:
    """Load a decoder for a VAE of so many latent channels, whose latents stand for ``pixels`` x ``pixels``.

    Raises:
        WeightsError: the file is no TAEHV, is damaged, or is for another VAE.
    """
    path = find_tiny(name)
    tensors = open_file(path)
    sizes = TinySizes.of(tensors.shapes, str(path))
    if (sizes.latent_channels, 8 * sizes.patch) != (latent_channels, pixels):
        raise WeightsError(
            f"{path} decodes {sizes.latent_channels} latent channels to {8 * sizes.patch} pixels a side; this model's "
            f"VAE has {latent_channels} and {pixels}. Take {'taew2_2' if pixels == 16 else 'taew2_1'} of "
            "github.com/madebyollin/taehv"
        )
    with torch.device("meta"):
        model = TinyDecoder(sizes).eval().requires_grad_(False)
    load_weights(model, tensors, device=device, dtype=dtype, component="vae", ignore=("encoder.*",))
    return model.channels_last()
