"""From a model's name to its files.

``locate`` answers where a model is, ``read_layout`` what a folder in diffusers layout holds, ``identify``
which published model that is. Nothing here reads a tensor.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swiftwan.errors import WeightsError, did_you_mean
from swiftwan.models.config import KNOWN_MODELS, KnownModel, TransformerConfig, VAEConfig
from swiftwan.weights import check
from swiftwan.weights.download import download

POCKET = "pocket"

_COMPONENTS = {
    "transformer": ("WanTransformer3DModel",),
    "transformer_2": ("WanTransformer3DModel",),
    "vae": ("AutoencoderKLWan",),
    "text_encoder": ("UMT5EncoderModel", "T5EncoderModel"),
    "tokenizer": None,
    "image_encoder": ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
    "image_processor": None,
    "scheduler": None,
}
_REQUIRED = ("transformer", "vae", "text_encoder", "tokenizer")
_WITH_WEIGHTS = ("transformer", "transformer_2", "vae", "text_encoder", "image_encoder")
_PIPELINES = ("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline")
_PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".msgpack")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WAY_OUT = "take the model in diffusers layout, for example 'Wan-AI/Wan2.1-T2V-1.3B-Diffusers'"


@dataclass(frozen=True)
class Folder:
    """A model's folder in diffusers layout, complete on this machine; ``name`` is what the user called it."""

    path: Path
    name: str


@dataclass(frozen=True)
class RandomModel:
    """The architecture of a published model with random weights: for timing only."""

    known: KnownModel


Source = Folder | RandomModel


@dataclass(frozen=True)
class Layout:
    """What a folder in diffusers layout holds.

    ``classes`` names the class of each component that is there, ``configs`` its ``config.json`` (for the
    scheduler ``scheduler_config.json``), ``files`` the safetensors shards of each with weights, all of them
    existing, inside the folder and of the size their headers ask for. ``transformer`` is the high-noise
    expert of a two-expert model, ``transformer_2`` the low-noise one.
    """

    folder: Path
    name: str
    classes: Mapping[str, str]
    configs: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, tuple[Path, ...]]
    transformer: TransformerConfig
    transformer_2: TransformerConfig | None
    vae: VAEConfig
    boundary_ratio: float | None
    expand_timesteps: bool


def locate(model: str, *, revision: str | None = None) -> Source:
    """Find a model by name; downloads what the hub has and this machine has not.

    ``model`` is ``pocket``, a folder, a hub id ``owner/name``, a name of ``KNOWN_MODELS`` or
    ``random:NAME``. A local folder goes before a hub id of the same name only when it holds a
    ``model_index.json`` or is written with ``./`` or ``/``.

    Raises WeightsError for a name that is nothing of these, for a folder or file in another format (saying
    what it looks like), and for damaged files; OutputError when the disk is too small.
    """
    if model.startswith("random:"):
        return RandomModel(_known_or_raise(model.removeprefix("random:"), among="random: "))
    if model == POCKET:
        return _checked(Folder(_pocket_folder(), POCKET))
    path = Path(model).expanduser()
    if (path / "model_index.json").is_file():
        return _checked(Folder(path.resolve(), model))
    if model.startswith(("./", "../", "/", "~", ".\\")) or path.is_absolute():
        raise WeightsError(_what_is_wrong_with(path))
    if known := KNOWN_MODELS.get(model.lower()):
        return Folder(download(known.hub_id, revision), known.name)
    if _HUB_ID.fullmatch(model):
        return Folder(download(model, revision), model)
    if model and path.exists() or path.suffix in (".safetensors", ".gguf", *_PICKLES):
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
        return f"{path} is a single file; single files are not supported yet: {_WAY_OUT}"
    names = {p.name for p in path.iterdir()}
    if not names:
        kind = "it is empty"
    elif any(n.startswith("models_t5_") for n in names) or names & {"high_noise_model", "low_noise_model"}:
        kind = "it looks like the original Wan layout, which is not supported yet"
    elif "config.json" in names:
        kind = "it looks like one component of a model"
        if (path.parent / "model_index.json").is_file():
            return f"{path} has no model_index.json: {kind}; the model is the folder above, {path.parent}"
    elif any(n.endswith((".gguf", ".safetensors", *_PICKLES)) for n in names):
        kind = "it looks like a folder of single weights files, which is not supported yet"
    else:
        kind = f"it holds {', '.join(sorted(names)[:5])}"
    return f"{path} has no model_index.json: {kind}; {_WAY_OUT}"


def read_layout(source: Folder) -> Layout:
    """Read what a folder in diffusers layout holds, and check that its weights files are whole.

    Raises WeightsError: not a Wan model, missing components or shards (all at once), fp16 or other
    variants, pickles only, a damaged file, an index that names a file outside the folder.
    """
    folder = source.path.resolve()
    index = _read_object(folder / "model_index.json")
    if (pipeline := index.get("_class_name")) not in _PIPELINES:
        raise WeightsError(f"{folder} is a {pipeline}; swiftwan runs {', '.join(_PIPELINES)}")
    classes = {
        name: str(entry[1])
        for name, entry in index.items()
        if name in _COMPONENTS and isinstance(entry, list) and len(entry) == 2 and entry[1]
    }
    if missing := [n for n in _REQUIRED if n not in classes]:
        raise WeightsError(f"{folder}/model_index.json names no {', '.join(missing)}; {_WAY_OUT}")
    for name, cls in classes.items():
        if (allowed := _COMPONENTS[name]) and cls not in allowed:
            raise WeightsError(f"{folder}: its {name} is a {cls}; swiftwan runs {' or '.join(allowed)}")

    configs = {name: _read_config(folder, name) for name in classes}
    problems: list[str] = []
    files = {n: _weights_files(folder, n, problems) for n in classes if n in _WITH_WEIGHTS}
    if not any((folder / "tokenizer" / n).is_file() for n in ("tokenizer.json", "spiece.model")):
        problems.append("tokenizer/tokenizer.json (or spiece.model) is missing")
    if configs["transformer"].get("image_dim") and "image_encoder" not in classes:
        problems.append("its transformer reads CLIP features, but there is no image_encoder")
    if problems:
        raise WeightsError(f"{folder}: {'; '.join(problems)}; complete the folder or download the model again")
    for file in (f for component in files.values() for f in component):
        check.check_file(file)

    experts = {n: TransformerConfig.from_json(configs[n]) for n in configs if n.startswith("transformer")}
    boundary = index.get("boundary_ratio")
    if "transformer_2" in experts and not isinstance(boundary, float):
        raise WeightsError(f"{folder}/model_index.json has two transformers but no boundary_ratio between them")
    first = experts["transformer"]
    if "transformer_2" not in experts and first.in_channels > first.out_channels and first.image_dim is None:
        raise WeightsError(
            f"{folder} is one expert of Wan2.2-I2V-A14B: its transformer takes an image without CLIP, and there is no "
            "transformer_2; complete the folder or download the model again"
        )
    return Layout(
        folder=folder,
        name=source.name,
        classes=classes,
        configs=configs,
        files=files,
        transformer=experts["transformer"],
        transformer_2=experts.get("transformer_2"),
        vae=VAEConfig.from_json(configs["vae"]),
        # The conversion script writes a boundary into one-expert models too, where it means nothing.
        boundary_ratio=boundary if "transformer_2" in experts else None,
        expand_timesteps=bool(index.get("expand_timesteps")),
    )


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


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise WeightsError(f"{path} is missing; download the model again")
    values = check.read_json(path)
    if values is None:
        raise WeightsError(f"{path} is damaged: not a JSON object; download it again")
    return values


def _read_config(folder: Path, component: str) -> dict[str, Any]:
    """A component's own config file; the tokenizer and image processor have none that we read."""
    if component in _WITH_WEIGHTS:
        return _read_object(folder / component / "config.json")
    if component == "scheduler":
        return _read_object(folder / component / "scheduler_config.json")
    return {}


def _weights_files(folder: Path, component: str, problems: list[str]) -> tuple[Path, ...]:
    """A component's shards, in order; what is wrong with them is appended to ``problems``."""
    here = folder / component
    stem = "diffusion_pytorch_model" if component in ("transformer", "transformer_2", "vae") else "model"
    single, index = here / f"{stem}.safetensors", here / f"{stem}.safetensors.index.json"
    if index.is_file() and single.is_file():
        problems.append(f"{component} holds both {single.name} and {index.name}: remove the stale one")
        return ()
    if index.is_file():
        names = _shard_names(index)
    elif single.is_file() or single.is_symlink():
        names = [single.name]
    else:
        problems.append(_no_weights(here, component, single.name))
        return ()
    if missing := [n for n in names if not (here / n).exists()]:
        problems.append(f"{component} lacks {len(missing)} of {len(names)} files ({', '.join(missing)})")
        return ()
    for name in names:
        _refuse_outside(folder, here / name)
    return tuple(here / name for name in names)


def _shard_names(index: Path) -> list[str]:
    weight_map = _read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index} is damaged: it has no weight_map; download it again")
    for name in weight_map.values():
        # An index may come from anyone: a shard is a plain file name beside it, nothing else.
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise WeightsError(f"{index} names {name!r}; a shard must be a .safetensors file in the same folder")
    return sorted(set(weight_map.values()))


def _no_weights(here: Path, component: str, wanted: str) -> str:
    there = sorted(p.name for p in here.iterdir())
    if variants := [n for n in there if re.search(r"\.(fp16|bf16|fp32|fp8|non_ema|ema)\b.*\.safetensors", n)]:
        return f"{component} holds only the variant {variants[0]}; swiftwan reads {wanted} and casts it itself"
    if shards := [n for n in there if n.endswith(".safetensors")]:
        return f"{component} holds {shards[0]} but no {wanted}.index.json"
    if pickles := [n for n in there if n.endswith(_PICKLES)]:
        return f"{component} holds only {pickles[0]}, a pickle, which swiftwan never opens; it reads {wanted}"
    return f"{component}/{wanted} is missing"


def _refuse_outside(folder: Path, file: Path) -> None:
    """A file must lie in the folder, or be the hub cache's own link from ``snapshots`` to ``blobs``."""
    real = file.resolve()
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes.append(folder.parent.parent / "blobs")
    if not any(real.is_relative_to(home) for home in homes):
        raise WeightsError(f"{file} links to {real}, outside the model's folder; copy the file there instead")
