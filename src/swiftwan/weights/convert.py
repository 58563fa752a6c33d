"""Any model that swiftwan reads, as safetensors in diffusers layout: written tensor by tensor, whole or not at all.

Names and shapes are compared with the model's before the first byte is written, just as when loading, so a
converted folder loads. Host memory holds one tensor beside the pages of the files.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swiftwan.errors import RequestError, WeightsError, did_you_mean
from swiftwan.models.config import KnownModel, TransformerConfig, VAEConfig
from swiftwan.models.dit import KEEP_FP32, WanTransformer
from swiftwan.models.vae import WanVAE
from swiftwan.quiet import silence
from swiftwan.weights import check, shapes
from swiftwan.weights.find import identify, locate, read_layout
from swiftwan.weights.gather import open_transformer
from swiftwan.weights.keys import components
from swiftwan.weights.layout import WITH_WEIGHTS, Layout, RandomModel, WeightsFile, stem_of
from swiftwan.weights.sources import Tensors, open_file
from swiftwan.weights.write import TYPES, Slot, appearing, refuse_full, write_json, write_shards

OnTensor = Callable[[str, int, int], None]
"""Told after each tensor: its component, how many of it are written, and how many there are."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
)
_IGNORED = {
    "transformer": ("*.norm_added_q.*",),
    "transformer_2": ("*.norm_added_q.*",),
    "text_encoder": ("encoder.embed_tokens.weight",),
    "image_encoder": ("*.position_ids",),
}
_TYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_LIBRARIES = {"text_encoder": "transformers", "tokenizer": "transformers", "image_encoder": "transformers"}
_CLIP_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 224},
}
"""What https://huggingface.co/openai/clip-vit-large-patch14 asks of an image, and Wan2.1-I2V with it."""


@dataclass(frozen=True)
class Conversion:
    """What was written: ``origins`` says where each component came from, ``bytes`` is all weights together."""

    folder: Path
    model: str
    origins: Mapping[str, str]
    bytes: int


def convert(
    source: str,
    out: Path,
    *,
    dtype: str | None = None,
    only: str | None = None,
    model: KnownModel | None = None,
    on_tensor: OnTensor = lambda component, done, total: None,
) -> Conversion:
    """Write ``source`` as a folder that swiftwan and diffusers load.

    Args:
        source: whatever ``locate`` finds: a folder in diffusers or the original layout, a file, a hub id.
        out: a folder that does not exist yet, or is empty.
        dtype: ``bf16``, ``fp16`` or ``fp32``; None keeps what is stored, and makes bf16 of fp8 and GGUF types.
            The transformer's parameters that Wan keeps in float32 stay so.
        only: one component's name: that one alone, without what a whole model needs.
        model: what it should be, and which of two published models of the same shapes.

    Raises:
        WeightsError: ``source`` is damaged, incomplete, or another model.
        OutputError: ``out`` holds something, or its disk is too small.
        RequestError: no such dtype or component.
    """
    if dtype is not None and dtype not in _TYPES:
        raise RequestError(f"dtype is '{dtype}'." + did_you_mean(dtype, _TYPES))
    if only is not None and only not in WITH_WEIGHTS:
        raise RequestError(f"only is '{only}'." + did_you_mean(only, WITH_WEIGHTS))
    refuse_full(out)
    located = locate(source)
    if isinstance(located, RandomModel):
        raise WeightsError(f"'{source}' has random weights: there is nothing to convert")
    if only is not None and isinstance(located, WeightsFile):
        parts = {only: _single(located.path, only)}
        return _write(out, parts, dtype, on_tensor, model=shapes.looks_like(open_file(located.path)), alone=True)
    layout = read_layout(located, model)
    known = model or identify(layout)
    parts = {name: Part(tensors, layout.configs[name], layout.classes[name]) for name, tensors in layout.files.items()}
    name = known.name if known else layout.name
    if only is None:
        return _write(out, parts, dtype, on_tensor, model=name, rest=Rest(layout, known))
    if only not in parts:
        raise WeightsError(f"'{source}' has no {only}; it has {', '.join(parts)}")
    return _write(out, {only: parts[only]}, dtype, on_tensor, model=name, alone=True)


@dataclass(frozen=True)
class Part:
    """A component on its way: its tensors under diffusers' names, its config, the class that loads it."""

    tensors: Tensors
    config: Mapping[str, Any]
    kind: str


def _single(path: Path, component: str) -> Part:
    """One component of a file, with the config that its shapes give."""
    if component.startswith("transformer"):
        tensors = open_transformer(path)
        return Part(tensors, shapes.transformer_config(tensors).to_json(), "WanTransformer3DModel")
    source = open_file(path)
    found = components(source).get(component)
    if found is None:
        asked = component.replace("_", " ")
        raise WeightsError(f"{path} looks like {shapes.looks_like(source)}; a {asked} is asked for")
    if component == "vae":
        return Part(found, shapes.vae_config(found).to_json(), "AutoencoderKLWan")
    if component == "text_encoder":
        return Part(found, shapes.text_config(found), "UMT5EncoderModel")
    return Part(found, shapes.image_config(found), "CLIPVisionModel")


@dataclass(frozen=True)
class Rest:
    """What a whole model has beside its weights, to be written once these are."""

    layout: Layout
    known: KnownModel | None

    def write(self, folder: Path, kinds: Mapping[str, str]) -> None:
        """``model_index.json``, the scheduler, the tokenizer and, with CLIP, the image processor."""
        layout = self.layout
        shift = self.known.defaults.flow_shift if self.known else 3.0
        scheduler = layout.configs.get("scheduler") or {
            "_class_name": "UniPCMultistepScheduler",
            "flow_shift": shift,
            "num_train_timesteps": 1000,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
        }
        index: dict[str, Any] = {
            "_class_name": _pipeline(layout),
            "_diffusers_version": version("diffusers"),
            "boundary_ratio": layout.boundary_ratio,
            "expand_timesteps": layout.expand_timesteps,
            "transformer_2": [None, None],
            "scheduler": ["diffusers", scheduler["_class_name"]],
            "tokenizer": ["transformers", _tokenizer_class(layout)],
        }
        for component, kind in kinds.items():
            index[component] = [_LIBRARIES.get(component, "diffusers"), kind]
        for name in ("scheduler", "tokenizer"):
            (folder / name).mkdir()
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        for name in _TOKENIZER_FILES:
            if (layout.tokenizer / name).is_file():
                shutil.copyfile(layout.tokenizer / name, folder / "tokenizer" / name)
        if index["_class_name"] == "WanImageToVideoPipeline":
            index.setdefault("image_encoder", [None, None])
            index["image_processor"] = [None, None]
        if "image_encoder" in kinds:
            index["image_processor"] = ["transformers", "CLIPImageProcessor"]
            (folder / "image_processor").mkdir()
            write_json(folder / "image_processor" / "preprocessor_config.json", _CLIP_PROCESSOR)
        write_json(folder / "model_index.json", index)


def _write(
    out: Path,
    parts: Mapping[str, Part],
    dtype: str | None,
    on_tensor: OnTensor,
    *,
    model: str,
    rest: Rest | None = None,
    alone: bool = False,
) -> Conversion:
    slots = {}
    for component, part in parts.items():
        expected = _expected(component, part)
        check.compare(expected, part.tensors.shapes, component, ignore=_IGNORED.get(component, ()))
        slots[component] = [
            Slot(name, tuple(shape), _type(component, name, part.tensors.dtypes[name], dtype))
            for name, shape in part.tensors.shapes.items()
            if name in expected
        ]
    need = sum(slot.nbytes for component in slots.values() for slot in component)
    with appearing(out, need) as folder:
        for component, part in parts.items():
            here = folder if alone else folder / component
            here.mkdir(exist_ok=True)
            write_json(here / "config.json", _config(part, dtype))
            reader = _Reader(component, part.tensors, len(slots[component]), on_tensor)
            write_shards(here, stem_of(component), slots[component], reader.read)
            part.tensors.close()
        if rest is not None:
            rest.write(folder, {component: part.kind for component, part in parts.items()})
    origins = {component: part.tensors.origin for component, part in parts.items()}
    return Conversion(out, model, origins | ({"tokenizer": str(rest.layout.tokenizer)} if rest else {}), need)


class _Reader:
    def __init__(self, component: str, tensors: Tensors, total: int, on_tensor: OnTensor) -> None:
        self.component, self.tensors, self.total, self.on_tensor = component, tensors, total, on_tensor
        self.done = 0

    def read(self, slot: Slot) -> Tensor:
        tensor = self.tensors.read(slot.name)
        cast = tensor.to(TYPES[slot.type])
        if (
            cast.dtype == torch.float16 != tensor.dtype
            and not cast.isfinite().all()
            and tensor.float().isfinite().all()
        ):
            raise WeightsError(
                f"{self.component}: {slot.name} holds {tensor.float().abs().max():.3g}, float16 ends at 65504; "
                "take bf16 or fp32"
            )
        self.done += 1
        self.on_tensor(self.component, self.done, self.total)
        return cast


def _expected(component: str, part: Part) -> dict[str, check.Shape]:
    """Name -> shape of the module that will load this component; tied parameters once."""
    with torch.device("meta"):
        if component.startswith("transformer"):
            module: nn.Module = WanTransformer(TransformerConfig.from_json(part.config))
        elif component == "vae":
            module = WanVAE(VAEConfig.from_json(part.config))
        else:
            module = _encoder(part)
    found = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found.pop("encoder.embed_tokens.weight", None)  # the same tensor as shared.weight
    if component == "image_encoder" and "embeddings.class_embedding" in found:
        # transformers 5 dropped the stem that files have.
        found = {f"vision_model.{name}": shape for name, shape in found.items()}
    return found


def _encoder(part: Part) -> nn.Module:
    silence()
    import transformers  # seconds, which a transformer or a VAE alone need not spend

    configs = {
        "UMT5EncoderModel": transformers.UMT5Config,
        "T5EncoderModel": transformers.T5Config,
        "CLIPVisionModel": transformers.CLIPVisionConfig,
        "CLIPVisionModelWithProjection": transformers.CLIPVisionConfig,
    }
    return getattr(transformers, part.kind)(configs[part.kind](**part.config))


def _type(component: str, name: str, stored: str, dtype: str | None) -> str:
    """The type a tensor is written in; whole numbers stay what they are."""
    if not stored.startswith(("F", "BF")):
        return stored
    if dtype is None:
        return stored if stored in ("F32", "F16", "BF16") else "F32" if stored == "F64" else "BF16"
    keeps = component.startswith("transformer") and any(fnmatchcase(name, glob) for glob in KEEP_FP32)
    return "F32" if keeps else _TYPES[dtype]


def _config(part: Part, dtype: str | None) -> dict[str, Any]:
    config = dict(part.config)
    if dtype is not None:
        # transformers' note of the stored type, which is another one now; it finds the new one in the file.
        for key in ("dtype", "torch_dtype"):
            config.pop(key, None)
    return config if "architectures" in config or "model_type" in config else {"_class_name": part.kind, **config}


def _pipeline(layout: Layout) -> str:
    if "scheduler" in layout.configs:  # from a diffusers folder, which says it itself
        return str((check.read_json(layout.folder / "model_index.json") or {})["_class_name"])
    reads_image = layout.transformer.in_channels != layout.transformer.out_channels
    return "WanImageToVideoPipeline" if reads_image else "WanPipeline"


def _tokenizer_class(layout: Layout) -> str:
    if layout.classes["tokenizer"] != "T5TokenizerFast":
        return layout.classes["tokenizer"]
    told = (check.read_json(layout.tokenizer / "tokenizer_config.json") or {}).get("tokenizer_class")
    return "T5TokenizerFast" if not isinstance(told, str) or told.startswith("T5") else told
