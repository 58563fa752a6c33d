"""From a model's name to its files.

``locate`` answers where a model is, ``read_layout`` what it consists of, ``identify`` which published model
that is. Nothing here reads a tensor.
"""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path
from typing import Any

from swiftwan.errors import WeightsError, did_you_mean
from swiftwan.models.config import KNOWN_MODELS, KnownModel, TransformerConfig, VAEConfig
from swiftwan.weights import check, shapes
from swiftwan.weights.download import download
from swiftwan.weights.gather import (
    expert_files,
    is_original,
    open_transformer,
    published,
    read_file,
    read_original,
)
from swiftwan.weights.layout import (
    PICKLES,
    WAY_OUT,
    Folder,
    Layout,
    OriginalFolder,
    RandomModel,
    Source,
    WeightsFile,
    read_folder,
)
from swiftwan.weights.sources import WEIGHTS_SUFFIXES

POCKET = "pocket"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def locate(model: str, *, revision: str | None = None) -> Source:
    """Find a model by name; downloads what the hub has and this machine has not.

    ``model`` is ``pocket``, a folder in diffusers or the original layout, a ``.safetensors`` or ``.gguf``
    file of a transformer, a hub id ``owner/name``, a name of ``KNOWN_MODELS`` or ``random:NAME``. A local
    folder goes before a hub id of the same name only when it holds a model or is written with ``./`` or ``/``.

    Raises WeightsError for a name that is nothing of these, for a folder in another format (saying what it
    looks like), and for damaged files; OutputError when the disk is too small.
    """
    if model.startswith("random:"):
        return RandomModel(_known_or_raise(model.removeprefix("random:"), among="random: "))
    if model == POCKET:
        return _checked(Folder(_pocket_folder(), POCKET))
    path = Path(model).expanduser()
    if (path / "model_index.json").is_file():
        return _checked(Folder(path.resolve(), model))
    if model and is_original(path):
        check.verify(path.resolve(), check.hub_digests(path.resolve()))
        return OriginalFolder(path.resolve(), model)
    if path.suffix in WEIGHTS_SUFFIXES and path.is_file():
        return WeightsFile(path.absolute(), model)
    if model.startswith(("./", "../", "/", "~", ".\\")) or path.is_absolute():
        raise WeightsError(_what_is_wrong_with(path))
    if known := KNOWN_MODELS.get(model.lower()):
        return Folder(download(known.hub_id, revision), known.name)
    if _HUB_ID.fullmatch(model):
        return Folder(download(model, revision), model)
    if model and path.exists() or path.suffix in (*WEIGHTS_SUFFIXES, *PICKLES):
        raise WeightsError(_what_is_wrong_with(path))
    _known_or_raise(model)
    raise AssertionError(model)


def known_model(model: str) -> KnownModel | None:
    """The published model that a name or hub id means, without asking the network; None for others."""
    name = model.removeprefix("random:").lower()
    return next((k for k in KNOWN_MODELS.values() if name in (k.name, k.hub_id.lower())), None)


def _known_or_raise(name: str, among: str = "") -> KnownModel:
    if known := KNOWN_MODELS.get(name.lower()):
        return known
    names = [*KNOWN_MODELS] if among else [POCKET, *KNOWN_MODELS]
    raise WeightsError(f"There is no model {among}{name!r}, nor a folder or hub id.{did_you_mean(name, names)}")


def _pocket_folder() -> Path:
    folder = Path(str(importlib.resources.files("swiftwan.pocket") / "model"))
    if not (folder / "model_index.json").is_file():
        raise WeightsError(f"this installation lacks the pocket model ({folder}); install swiftwan again")
    return folder


def _checked(folder: Folder) -> Folder:
    if not check.verify_manifest(folder.path):
        check.verify(folder.path, check.hub_digests(folder.path))
    return folder


def _what_is_wrong_with(path: Path) -> str:
    """One line for a path that is no diffusers folder: what it looks like, and the way out."""
    if not path.exists():
        return f"{path} does not exist"
    if path.is_file():
        return f"{path} is no weights file that swiftwan reads ({', '.join(WEIGHTS_SUFFIXES)}); {WAY_OUT}"
    names = {p.name for p in path.iterdir()}
    if not names:
        kind = "it is empty"
    elif "config.json" in names:
        kind = "it looks like one component of a model"
        if (path.parent / "model_index.json").is_file():
            return f"{path} has no model_index.json: {kind}; the model is the folder above, {path.parent}"
    elif any(n.endswith((".gguf", ".safetensors", *PICKLES)) for n in names):
        first = next(n for n in sorted(names) if n.endswith((".gguf", ".safetensors", *PICKLES)))
        kind = f"it holds single weights files; name the transformer's own file, for example {path / first}"
    else:
        kind = f"it holds {', '.join(sorted(names)[:5])}"
    return f"{path} has no model_index.json: {kind}; {WAY_OUT}"


def read_layout(source: Folder | OriginalFolder | WeightsFile, model: KnownModel | None = None) -> Layout:
    """What a located model consists of; ``model`` decides where shapes cannot, and must agree with them.

    Raises WeightsError: parts that are missing, damaged or of another model.
    """
    if isinstance(source, OriginalFolder):
        layout = read_original(source)
    elif isinstance(source, WeightsFile):
        layout = read_file(source, model)
    else:
        layout = read_folder(source)
    if model is None:
        return layout
    if _sizes(layout.transformer) != _sizes(model.transformer):
        like = " or ".join(m.name for m in shapes.published(layout.transformer)) or "a Wan of unpublished size"
        raise WeightsError(f"{source.path} looks like {like}, not {model.name}; take the files of {model.name}")
    if (layout.transformer_2 is None) != (model.boundary_ratio is None):
        found, wanted = ("one", "two") if layout.transformer_2 is None else ("two", "one")
        raise WeightsError(f"{source.path} has {found} transformer(s), {model.name} has {wanted}; take its own files")
    return layout


def published_file(source: WeightsFile) -> KnownModel | None:
    """Which published model a file is of, its other expert being there; None for sizes that are nobody's."""
    config = shapes.transformer_config(open_transformer(source.path))
    expert_files(source.path)
    return published(source.path, source.name, config)


def identify(layout: Layout) -> KnownModel | None:
    """Which published model this is, from the sizes in its configs; None for sizes that are nobody's.

    Wan2.1-I2V-14B has the same sizes for 480p and 720p. There, and only there, names decide: the model's
    name, else the folder's, if it says 480p or 720p; else the scheduler's ``flow_shift`` (5 means 720p);
    else 480p, whose defaults run on the smaller machine.
    """
    sizes = (_sizes(layout.transformer), _vae_sizes(layout.vae), layout.transformer_2 is not None)
    fits = [
        model
        for model in KNOWN_MODELS.values()
        if sizes == (_sizes(model.transformer), _vae_sizes(model.vae), model.boundary_ratio is not None)
    ]
    if len(fits) < 2:
        return fits[0] if fits else None
    for text in (layout.name, layout.folder.name):
        for model in fits:
            if model.name.rpartition("-")[2] in text.lower():
                return model
    flow_shift = layout.configs.get("scheduler", {}).get("flow_shift")
    return next((m for m in fits if m.defaults.flow_shift == flow_shift), fits[0])


def _sizes(config: TransformerConfig) -> tuple[Any, ...]:
    return (
        config.num_attention_heads,
        config.attention_head_dim,
        config.in_channels,
        config.out_channels,
        config.text_dim,
        config.ffn_dim,
        config.num_layers,
        config.patch_size,
        config.image_dim,
        config.added_kv_proj_dim,
        config.pos_embed_seq_len,
    )


def _vae_sizes(config: VAEConfig) -> tuple[Any, ...]:
    return (config.base_dim, config.decoder_base_dim, config.z_dim, config.dim_mult, config.patch_size)
