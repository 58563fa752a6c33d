"""Where a model is, and what a folder in diffusers layout holds, checked without reading a tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swiftwan.errors import WeightsError
from swiftwan.models.config import KnownModel, TransformerConfig, VAEConfig
from swiftwan.weights import check
from swiftwan.weights.sources import Shards, Tensors

COMPONENTS = {
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
WITH_WEIGHTS = ("transformer", "transformer_2", "vae", "text_encoder", "image_encoder")
PIPELINES = ("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline")
PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".msgpack")
WAY_OUT = "take the model in diffusers layout, for example 'Wan-AI/Wan2.1-T2V-1.3B-Diffusers'"


@dataclass(frozen=True)
class Folder:
    """A model's folder in diffusers layout, complete on this machine; ``name`` is what the user called it."""

    path: Path
    name: str


@dataclass(frozen=True)
class RandomModel:
    """The architecture of a published model with random weights: for timing only."""

    known: KnownModel


@dataclass(frozen=True)
class OriginalFolder:
    """A model's folder as github.com/Wan-Video/Wan2.1 and Wan2.2 read it."""

    path: Path
    name: str


@dataclass(frozen=True)
class WeightsFile:
    """One file with a transformer, the other parts lying around it or on the hub."""

    path: Path
    name: str


Source = Folder | OriginalFolder | WeightsFile | RandomModel


@dataclass(frozen=True)
class Layout:
    """What a model consists of, in diffusers' words whatever its files are.

    ``classes`` names the class of each component that is there, ``configs`` its ``config.json`` (for the
    scheduler ``scheduler_config.json``), ``files`` the tensors of each with weights, under diffusers' names,
    from files that exist and have the size their headers ask for. ``transformer`` is the high-noise expert of
    a two-expert model, ``transformer_2`` the low-noise one.
    """

    folder: Path
    name: str
    classes: Mapping[str, str]
    configs: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, Tensors]
    tokenizer: Path
    transformer: TransformerConfig
    transformer_2: TransformerConfig | None
    vae: VAEConfig
    boundary_ratio: float | None
    expand_timesteps: bool


def read_folder(source: Folder) -> Layout:
    """Read what a folder in diffusers layout holds, and check that its weights files are whole.

    Raises WeightsError: not a Wan model, missing components or shards (all at once), fp16 or other
    variants, pickles only, a damaged file, an index that names a file outside the folder.
    """
    folder = source.path.resolve()
    index = read_object(folder / "model_index.json")
    if (pipeline := index.get("_class_name")) not in PIPELINES:
        raise WeightsError(f"{folder} is a {pipeline}; swiftwan runs {', '.join(PIPELINES)}")
    classes = {
        name: str(entry[1])
        for name, entry in index.items()
        if name in COMPONENTS and isinstance(entry, list) and len(entry) == 2 and entry[1]
    }
    if missing := [n for n in _REQUIRED if n not in classes]:
        raise WeightsError(f"{folder}/model_index.json names no {', '.join(missing)}; {WAY_OUT}")
    for name, cls in classes.items():
        if (allowed := COMPONENTS[name]) and cls not in allowed:
            raise WeightsError(f"{folder}: its {name} is a {cls}; swiftwan runs {' or '.join(allowed)}")

    configs = {name: _read_config(folder, name) for name in classes}
    problems: list[str] = []
    shards = {n: weights_files(folder, n, problems) for n in classes if n in WITH_WEIGHTS}
    if not any((folder / "tokenizer" / n).is_file() for n in ("tokenizer.json", "spiece.model")):
        problems.append("tokenizer/tokenizer.json (or spiece.model) is missing")
    if configs["transformer"].get("image_dim") and "image_encoder" not in classes:
        problems.append("its transformer reads CLIP features, but there is no image_encoder")
    if problems:
        raise WeightsError(f"{folder}: {'; '.join(problems)}; complete the folder or download the model again")

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
        files={name: Shards(paths) for name, paths in shards.items()},
        tokenizer=folder / "tokenizer",
        transformer=experts["transformer"],
        transformer_2=experts.get("transformer_2"),
        vae=VAEConfig.from_json(configs["vae"]),
        # The conversion script writes a boundary into one-expert models too, where it means nothing.
        boundary_ratio=boundary if "transformer_2" in experts else None,
        expand_timesteps=bool(index.get("expand_timesteps")),
    )


def read_component(folder: Path, component: str) -> tuple[dict[str, Any], Tensors]:
    """The config and the tensors of one component of a diffusers folder, which may lack others."""
    problems: list[str] = []
    paths = weights_files(folder.resolve(), component, problems)
    if problems:
        raise WeightsError(f"{folder}: {'; '.join(problems)}; download the model again")
    return _read_config(folder, component), Shards(paths)


def stem_of(component: str) -> str:
    """How a component's weights files begin: transformers' name for the encoders, diffusers' for the rest."""
    return "model" if component.endswith("encoder") else "diffusion_pytorch_model"


def read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise WeightsError(f"{path} is missing; download the model again")
    values = check.read_json(path)
    if values is None:
        raise WeightsError(f"{path} is damaged: not a JSON object; download it again")
    return values


def _read_config(folder: Path, component: str) -> dict[str, Any]:
    """A component's own config file; the tokenizer and image processor have none that we read."""
    if component in WITH_WEIGHTS:
        return read_object(folder / component / "config.json")
    if component == "scheduler":
        return read_object(folder / component / "scheduler_config.json")
    return {}


def weights_files(folder: Path, component: str, problems: list[str]) -> tuple[Path, ...]:
    """A component's shards, in order; what is wrong with them is appended to ``problems``.

    ``component`` is a folder in ``folder``: one of diffusers' names, or ``.``, ``high_noise_model`` and
    ``low_noise_model`` of the original layout.
    """
    here = folder / component
    stem = stem_of(component)
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
    weight_map = read_object(index).get("weight_map")
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
    if pickles := [n for n in there if n.endswith(PICKLES)]:
        return f"{component} holds only {pickles[0]}, a pickle; in a diffusers folder swiftwan reads {wanted} alone"
    return f"{component}/{wanted} is missing"


def _refuse_outside(folder: Path, file: Path) -> None:
    """A file must lie in the folder, or be the hub cache's own link from ``snapshots`` to ``blobs``."""
    real = file.resolve()
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes.append(folder.parent.parent / "blobs")
    if not any(real.is_relative_to(home) for home in homes):
        raise WeightsError(f"{file} links to {real}, outside the model's folder; copy the file there instead")
