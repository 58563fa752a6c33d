"""A tiny decoder's weights: a file, here or on the hub."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from swiftwan.errors import WeightsError
from swiftwan.models.config import VAEConfig
from swiftwan.models.vae_tiny import TinyDecoder, TinySizes
from swiftwan.weights.download import download_file
from swiftwan.weights.load import load_weights
from swiftwan.weights.sources import WEIGHTS_SUFFIXES, open_file

_ON_HUB = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)/(?P<file>.+)")


def find_tiny(name: str) -> Path:
    """The file of that path or, as ``OWNER/NAME/FILE``, on the hub.

    Raises:
        WeightsError: there is none, or the hub cannot be reached.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    on_hub = _ON_HUB.fullmatch(name)
    if on_hub is None or not name.endswith(WEIGHTS_SUFFIXES):
        raise WeightsError(f"there is no file {name}; give a path, or OWNER/NAME/FILE.safetensors on the hub")
    return download_file(on_hub["id"], on_hub["file"])


def check_tiny(path: Path, vae: VAEConfig) -> None:
    """Check that a file's decoder is for this VAE.

    Raises:
        WeightsError: the file is no TAEHV, is damaged, or is of another VAE.
    """
    sizes = TinySizes.of(open_file(path).shapes, str(path))
    pixels = vae.scale_factor_spatial
    if (sizes.latent_channels, 8 * sizes.patch) == (vae.z_dim, pixels):
        return
    raise WeightsError(
        f"{path} decodes {sizes.latent_channels} latent channels to {8 * sizes.patch} pixels a side; this model's "
        f"VAE has {vae.z_dim} and {pixels}; take {'taew2_2' if pixels == 16 else 'taew2_1'} of "
        "github.com/madebyollin/taehv"
    )


def load_tiny(path: Path, *, device: torch.device, dtype: torch.dtype) -> TinyDecoder:
    """Load a decoder; the encoder that may be in its file is left.

    Raises:
        WeightsError: the file is no TAEHV, or is damaged.
    """
    tensors = open_file(path)
    with torch.device("meta"):
        model = TinyDecoder(TinySizes.of(tensors.shapes, str(path))).eval().requires_grad_(False)
    load_weights(model, tensors, device=device, dtype=dtype, component="vae", ignore=("encoder.*",))
    return model.channels_last()
