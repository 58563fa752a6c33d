"""Models that are not in diffusers layout: folders of the original Wan, and single files of a transformer.

Both end as the same :class:`Layout` that a diffusers folder gives. What a file is, its tensors' shapes say; a
file's name decides one thing only: whether a transformer of 14B that makes video from text is Wan2.1's, or one
expert of Wan2.2's, and which. Their shapes are the same.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from swiftwan.errors import WeightsError, did_you_mean
from swiftwan.models.config import KNOWN_MODELS, KnownModel, TransformerConfig, VAEConfig
from swiftwan.weights import check, shapes
from swiftwan.weights.download import download
from swiftwan.weights.keys import components
from swiftwan.weights.layout import (
    Layout,
    OriginalFolder,
    WeightsFile,
    read_component,
    weights_files,
)
from swiftwan.weights.sources import WEIGHTS_SUFFIXES, Shards, Tensors, open_file

log = logging.getLogger(__name__)

HIGH, LOW = "high_noise_model", "low_noise_model"
_CLASSES = {
    "transformer": "WanTransformer3DModel",
    "transformer_2": "WanTransformer3DModel",
    "vae": "AutoencoderKLWan",
    "text_encoder": "UMT5EncoderModel",
    "image_encoder": "CLIPVisionModel",
}
_TOLD = {
    "vae": "a VAE (Wan2.1_VAE.pth or Wan2.2_VAE.pth)",
    "text_encoder": "a text encoder (models_t5_umt5-xxl-enc-bf16.pth)",
    "image_encoder": "a CLIP vision encoder (models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth)",
    "tokenizer": "a tokenizer (google/umt5-xxl)",
}
_SIDE = re.compile(
    r"(?:(?<![A-Za-z])(high|low|High|Low|HIGH|LOW)|(?<=[a-z\d])(High|Low|HIGH|LOW))"
    r"(?:[ _-]?[Nn](?:oise|OISE))?(?![a-z])"
)
"""The word of an expert, as a word: not in ``flow``, ``slow`` or ``highres``."""
_SIDE_FOLDER = re.compile(_SIDE.pattern + "(?:[ _-]?[Mm]odel)?")
_TWO_EXPERTS = re.compile(r"a14b|wan[ _-]?2[._]?2", re.IGNORECASE)
_COMFY_TRANSFORMERS = ("diffusion_models", "unet")
_COMFY = ("vae", "text_encoders", "clip", "clip_vision", "tokenizer")
_TOKENIZERS = ("google/umt5-xxl", "tokenizer", "text_encoders", "clip", ".")


# The original layout


def is_original(folder: Path) -> bool:
    """Whether a folder looks like one of the original Wan, complete or not."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    config = check.read_json(folder / "config.json") or {}
    return (
        bool({HIGH, LOW} & names)
        or config.get("_class_name") == "WanModel"
        or any(name.startswith(("models_t5_", "Wan2.1_VAE", "Wan2.2_VAE")) for name in names)
    )


def read_original(source: OriginalFolder) -> Layout:
    """Read a folder in the original layout of Wan2.1 or Wan2.2.

    Raises WeightsError: an expert or another part is missing (all at once), damaged, or of another model.
    """
    folder = source.path.resolve()
    problems: list[str] = []
    two = any((folder / side).is_dir() for side in (HIGH, LOW))
    experts = {}
    for component, side in (("transformer", HIGH), ("transformer_2", LOW)) if two else (("transformer", "."),):
        what = f"{side}/, the {side.partition('_')[0]}-noise expert" if two else "diffusion_pytorch_model.safetensors"
        if not any((folder / side).glob("diffusion_pytorch_model*")):
            problems.append(f"{what} is missing")
        elif paths := weights_files(folder, side, problems):
            experts[component] = (_one(Shards(paths), "transformer"), check.read_json(folder / side / "config.json"))
    loose = [p for p in _weights_in(folder) if not p.name.startswith("diffusion_pytorch_model")]
    configs = {name: _transformer_config(tensors, told) for name, (tensors, told) in experts.items()}
    parts = _choose(loose, next(iter(configs.values()), None))
    tokenizer = _tokenizer_in(folder)
    reads_image = any(config.image_dim for config in configs.values())
    needed = ("vae", "text_encoder", *(("image_encoder",) if reads_image else ()))
    for name in (name for name in needed if name not in parts):
        other = _choose(loose, None).get(name)
        unfit = f"{other.origin} looks like {shapes.looks_like(other)}, made for another model" if other else None
        problems.append(unfit or f"{_TOLD[name]} is missing")
    if tokenizer is None:
        problems.append(f"{_TOLD['tokenizer']} is missing")
    if problems:
        raise WeightsError(f"{folder}: {'; '.join(problems)}; complete the folder or download the model again")
    assert tokenizer is not None
    files = {name: tensors for name, (tensors, _) in experts.items()} | {name: parts[name] for name in needed}
    return _layout(folder, source.name, files, configs, tokenizer)


def _transformer_config(tensors: Tensors, told: Mapping[str, Any] | None) -> TransformerConfig:
    """Sizes from shapes; the original ``config.json`` adds the heads, and must agree in the rest."""
    heads = (told or {}).get("num_heads")
    config = shapes.transformer_config(tensors, num_heads=heads if isinstance(heads, int) and heads > 0 else None)
    found = {
        "dim": config.dim,
        "ffn_dim": config.ffn_dim,
        "in_dim": config.in_channels,
        "num_layers": config.num_layers,
    }
    wrong = [f"{k} {v} instead of {told[k]}" for k, v in found.items() if told and k in told and told[k] != v]
    if wrong:
        raise WeightsError(
            f"{tensors.origin} and its config.json do not belong together: {', '.join(wrong)}; "
            f"the weights look like {check.looks_like(tensors.shapes) or 'a Wan of unpublished size'}"
        )
    return config


# A single file


def read_file(source: WeightsFile, model: KnownModel | None = None) -> Layout:
    """Read a transformer from a file, and the other parts from the file itself, from around it, or from the hub.

    Around it are its own folder and, in ComfyUI's tree, ``vae``, ``text_encoders`` or ``clip``, and
    ``clip_vision``; of several that fit, the largest file, since it is rounded least.

    Raises WeightsError: not a transformer (saying what it looks like), an expert is missing (saying which
    file), or a part that is nowhere; OutputError when parts from the hub do not fit on the disk.
    """
    path = source.path  # not resolved: the hub's cache and ComfyUI's users link files under their true names
    experts = {name: open_transformer(file) for name, file in expert_files(path, model).items()}
    configs = {name: shapes.transformer_config(tensors) for name, tensors in experts.items()}
    if len(set(configs.values())) > 1:
        told = " and ".join(f"{t.origin} ({check.looks_like(t.shapes)})" for t in experts.values())
        raise WeightsError(f"the two experts are of different models: {told}; take two of one model")
    config = configs["transformer"]
    parts = _choose(_around(path), config) | _fitting(open_file(path), config)
    tokenizer = next(filter(None, map(_tokenizer_in, _roots(path))), None)
    needed = ("vae", "text_encoder", *(("image_encoder",) if config.image_dim else ()))
    absent = [*(name for name in needed if name not in parts), *(() if tokenizer else ("tokenizer",))]
    known = model or published(path, source.name, config)
    their_configs: dict[str, Mapping[str, Any]] = {}
    if absent:
        if known is None:
            raise WeightsError(
                f"{path}: {', '.join(_TOLD[name] for name in absent)} is not beside it, and its sizes are of no "
                "published model whose parts could be downloaded; put them into the same folder"
            )
        log.warning("%s: the %s come from %s", path.name, ", ".join(absent), known.hub_id)
        folder = download(known.hub_id, components=absent)
        tokenizer = tokenizer or folder / "tokenizer"
        for name in (name for name in absent if name != "tokenizer"):
            their_configs[name], parts[name] = read_component(folder, name)
    assert tokenizer is not None
    files = {**experts, **{name: parts[name] for name in needed}}
    return _layout(path.parent, source.name, files, configs, tokenizer, their_configs)


def published(path: Path, name: str, config: TransformerConfig) -> KnownModel | None:
    """The published model that a transformer's file is of; None for sizes that are nobody's.

    Where shapes are shared, the name decides: ``high`` or ``low`` means an expert, 720p the larger size.
    """
    fits = shapes.published(config)
    side = _side(path)
    fits = [m for m in fits if (m.boundary_ratio is not None) == (side is not None)] or fits
    by_name = [m for m in fits if m.name.rpartition("-")[2] in f"{name} {path.name}".lower()]
    return next(iter(by_name or fits), None)


def expert_files(path: Path, model: KnownModel | None = None) -> dict[str, Path]:
    """The file of each expert, high-noise first, of the model that a transformer's file belongs to.

    Raises WeightsError: the file is no transformer or not one of ``model``; the other expert is not there.
    """
    config = shapes.transformer_config(open_transformer(path))
    fits = shapes.published(config)
    if model is not None and model not in fits:
        like = " or ".join(m.name for m in fits) or "a Wan transformer of unpublished size"
        raise WeightsError(f"{path} looks like {like}, not {model.name}; take the file of {model.name}")
    fits = [model] if model else fits
    side = _side(path)
    pairs = [m for m in fits if m.boundary_ratio is not None]
    if not pairs or (side is None and len(pairs) < len(fits) and not _TWO_EXPERTS.search(path.name)):
        return {"transformer": path}
    if side is None:
        raise WeightsError(
            f"{path} looks like one expert of {pairs[0].name}, but its name says neither 'high' nor 'low'; name the "
            "two files alike but for that word, for example wan2.2_high_noise.gguf and wan2.2_low_noise.gguf"
        )
    if len(pairs) < len(fits) and model is None:
        log.info("%s: the word '%s' in its name makes it an expert of %s", path.name, side, pairs[0].name)
    others = [path.with_name(_other_side(path.name)), path.parent.with_name(_other_side(path.parent.name)) / path.name]
    others.append(others[1].with_name(_other_side(path.name)))
    other = next((p for p in others if p != path and p.is_file()), None)
    if other is None:
        expected = next(p for p in others if p != path)
        single = [m.name for m in fits if m.boundary_ratio is None]
        hint = f"; if it is {single[0]}, take the word '{side}' out of its name" if single else ""
        raise WeightsError(
            f"{path} is the {side}-noise expert of {pairs[0].name}; the other one is missing: expected {expected}{hint}"
        )
    high, low = (path, other) if side == "high" else (other, path)
    return {"transformer": high, "transformer_2": low}


def open_transformer(path: Path) -> Tensors:
    """The transformer in a file, under our names. Raises WeightsError saying what else the file looks like."""
    return _one(open_file(path), "transformer")


def model_named(name: str) -> KnownModel:
    """A published model by name. Raises WeightsError for others."""
    if known := KNOWN_MODELS.get(name.lower()):
        return known
    raise WeightsError(f"There is no published model {name!r}.{did_you_mean(name, KNOWN_MODELS)}")


def _one(source: Tensors, component: str) -> Tensors:
    found = components(source).get(component)
    if found is None or shapes.not_a_model(source):
        raise WeightsError(
            f"{source.origin} looks like {shapes.looks_like(source)}; a {component.replace('_', ' ')} is needed here"
        )
    return found


def _side(path: Path) -> str | None:
    """``high`` or ``low``, from the file's name, else from its folder's if that says nothing else."""
    found = _SIDE.search(path.stem) or _SIDE_FOLDER.fullmatch(path.parent.name)
    return (found[1] or found[2]).lower() if found else None


def _other_side(text: str) -> str:
    def swap(match: re.Match[str]) -> str:
        word = match[1] or match[2]
        other = "low" if word.lower() == "high" else "high"
        cased = other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other
        return cased + match[0][len(word) :]

    return _SIDE.sub(swap, text)


# Parts


def _roots(path: Path) -> list[Path]:
    """Folders that may hold the other parts: the file's own, and ComfyUI's ``models``."""
    above = [folder.parent for folder in path.parents if folder.name in _COMFY_TRANSFORMERS]
    return [path.parent, *above[:1]]


def _around(path: Path) -> Iterator[Path]:
    yield from (p for p in _weights_in(path.parent) if p != path)
    for root in _roots(path):
        for folder in _COMFY:
            yield from _weights_in(root / folder, "**/*")


def _weights_in(folder: Path, pattern: str = "*") -> list[Path]:
    suffixes = (s for s in WEIGHTS_SUFFIXES if s != ".gguf")  # which hold transformers
    return sorted(p for suffix in suffixes for p in folder.glob(f"{pattern}{suffix}") if p.is_file())


def _choose(paths: Iterable[Path], config: TransformerConfig | None) -> dict[str, Tensors]:
    """Of each part the largest file that fits the transformer; files that cannot be read are named and left."""
    chosen: dict[str, tuple[int, Tensors]] = {}
    for path in dict.fromkeys(paths):
        try:
            found = _fitting(open_file(path), config)
        except WeightsError as error:
            log.warning("passed over: %s", error)
            continue
        for component, tensors in found.items():
            if component not in chosen or path.stat().st_size > chosen[component][0]:
                chosen[component] = (path.stat().st_size, tensors)
    return {component: tensors for component, (_, tensors) in chosen.items()}


def _fitting(source: Tensors, config: TransformerConfig | None) -> dict[str, Tensors]:
    found = {name: tensors for name, tensors in components(source).items() if name != "transformer"}
    if config is None:
        return found
    signs = {
        "vae": ("post_quant_conv.weight", 0, config.out_channels),
        "text_encoder": ("shared.weight", 1, config.text_dim),
        "image_encoder": ("vision_model.embeddings.patch_embedding.weight", 0, config.image_dim),
    }
    fits = {}
    for name, tensors in found.items():
        tensor, axis, size = signs[name]
        if tensors.shapes.get(tensor, ())[axis : axis + 1] == (size,):
            fits[name] = tensors
    return fits


def _tokenizer_in(folder: Path) -> Path | None:
    for name in _TOKENIZERS:
        if any((folder / name / file).is_file() for file in ("tokenizer.json", "spiece.model")):
            return folder / name
    return None


def _layout(
    folder: Path,
    name: str,
    files: Mapping[str, Tensors],
    transformers: Mapping[str, TransformerConfig],
    tokenizer: Path,
    configs: Mapping[str, Mapping[str, Any]] | None = None,
) -> Layout:
    """``configs`` are those that parts brought with them; the others come from shapes."""
    if len(set(transformers.values())) > 1:
        raise WeightsError(f"{folder}: the two experts differ in size; take two of one model")
    all_configs: dict[str, Mapping[str, Any]] = {n: config.to_json() for n, config in transformers.items()}
    of = {"vae": lambda t: shapes.vae_config(t).to_json(), "text_encoder": shapes.text_config}
    of["image_encoder"] = shapes.image_config
    for component, tensors in files.items():
        if component in of:
            all_configs[component] = (configs or {}).get(component) or of[component](tensors)
    config = transformers["transformer"]
    two = "transformer_2" in transformers
    return Layout(
        folder=folder,
        name=name,
        classes={n: _CLASSES[n] for n in files} | {"tokenizer": "T5TokenizerFast"},
        configs=all_configs,
        files=files,
        tokenizer=tokenizer,
        transformer=config,
        transformer_2=transformers.get("transformer_2"),
        vae=VAEConfig.from_json(all_configs["vae"]),
        boundary_ratio=_boundary(config) if two else None,
        expand_timesteps=config.in_channels == config.out_channels == 48,
    )


def _boundary(config: TransformerConfig) -> float:
    """The official share of the training timesteps that the high-noise expert takes."""
    name = "wan2.2-t2v-a14b" if config.in_channels == config.out_channels else "wan2.2-i2v-a14b"
    boundary = KNOWN_MODELS[name].boundary_ratio
    assert boundary is not None
    return boundary
