"""``swiftwan models``: which models there are, and which are here."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from swiftwan.errors import RequestError, did_you_mean
from swiftwan.models.config import KNOWN_MODELS, KnownModel

# Parameters of the parts beside the transformer: UMT5-XXL's encoder, the CLIP ViT-H of the first
# image-to-video models, the VAEs of Wan 2.1 and of TI2V-5B. Written down, since counting them with torch
# makes this list take 4 s instead of 0.6 s; a test counts.
_UMT5, _CLIP, _VAE21, _VAE22 = 5_681_000_000, 632_000_000, 127_000_000, 705_000_000


@dataclass(frozen=True)
class ModelState:
    """One row; ``weights_bytes`` is the size of all its weights in 16 bit, None for the pocket model."""

    name: str
    hub_id: str | None
    state: str
    weights_bytes: int | None

    @property
    def here(self) -> bool:
        return self.state in ("embedded", "in the hub cache")


def models(
    download: Annotated[
        str | None, typer.Option(help="Bring a model here; takes up where it broke off.", metavar="NAME")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the known models and which are here, or download one."""
    if download is not None:
        folder = _download(download)
        typer.echo(json.dumps({"name": download, "folder": str(folder)}) if as_json else folder)
        return
    rows = model_states()
    if as_json:
        typer.echo(json.dumps({"models": [asdict(row) for row in rows]}))
        return
    for row in rows:
        size = f"{row.weights_bytes / 1e9:6.1f} GB" if row.weights_bytes else "         "
        typer.echo(f"{row.name:<22} {size}  {row.state:<18} {row.hub_id or ''}".rstrip())
    typer.echo("Sizes are of the weights in 16 bit; a download can be larger. A folder or a hub id works too.")


def model_states() -> list[ModelState]:
    """Return every known model, and whether it is embedded, in the hub's cache, partly there, or not here."""
    pocket = "embedded" if pocket_is_here() else "missing: reinstall swiftwan"
    rows = [ModelState("pocket", None, pocket, None)]
    for model in KNOWN_MODELS.values():
        rows.append(ModelState(model.name, model.hub_id, _hub_state(model.hub_id), _weights_bytes(model)))
    return rows


def pocket_is_here() -> bool:
    """Say whether the package carries the pocket model's weights."""
    from importlib.resources import as_file, files

    with as_file(files("swiftwan.pocket")) as folder:
        return any(folder.rglob("*.safetensors"))


def _hub_state(hub_id: str) -> str:
    from huggingface_hub import constants, try_to_load_from_cache

    folder = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"
    if any(folder.glob("blobs/*.incomplete")):
        return "partly here"
    return "in the hub cache" if isinstance(try_to_load_from_cache(hub_id, "model_index.json"), str) else "not here"


def _weights_bytes(model: KnownModel) -> int:
    """Two bytes a parameter; a transformer's are its blocks' matrices, which are 98 % of it or more."""
    t = model.transformer
    attention = 8 * t.dim**2 + (2 * t.dim**2 if t.added_kv_proj_dim else 0)
    transformer = t.num_layers * (attention + 2 * t.dim * t.ffn_dim)
    experts = 1 if model.boundary_ratio is None else 2
    clip = _CLIP if t.image_dim else 0
    vae = _VAE22 if model.vae.is_residual else _VAE21
    return 2 * (experts * transformer + _UMT5 + clip + vae)


def _download(name: str) -> Path:
    if name == "pocket":
        raise RequestError("the pocket model is embedded; there is nothing to download.")
    known = KNOWN_MODELS.get(name)
    if known is None and "/" not in name:
        raise RequestError(f"model is '{name}'." + did_you_mean(name, KNOWN_MODELS))
    from swiftwan.weights.download import download

    return download(known.hub_id if known else name)
