"""From a located model to its parts, on the device and in the dtype they will run in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from swiftwan.errors import WeightsError
from swiftwan.models.clip import ImageEncoder
from swiftwan.models.config import POCKET, ClipConfig, KnownModel, TransformerConfig, VAEConfig
from swiftwan.models.dit import KEEP_FP32, WanTransformer
from swiftwan.models.text import TextEncoder
from swiftwan.models.umt5 import TextConfig, UMT5Encoder
from swiftwan.models.vae import WanVAE
from swiftwan.quiet import silence
from swiftwan.weights import check
from swiftwan.weights.find import locate, read_layout
from swiftwan.weights.layout import Folder, Layout, RandomModel, Source
from swiftwan.weights.load import AsLoaded, Place, load_weights, randomize

UMT5_XXL = {
    "vocab_size": 256_384,
    "d_model": 4096,
    "d_kv": 64,
    "num_heads": 64,
    "d_ff": 10_240,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
}
"""Sizes of google/umt5-xxl, which every published Wan reads its text with."""

ResidentBlocks = Callable[[int, int, int, int], int]
"""(transformers, blocks of each, bytes of one without its blocks, bytes of a block) to how many blocks of each stay on
the device."""

RestOn = Callable[[TransformerConfig, int], Place | None]
"""(sizes of a transformer, how many there are) to where its layers rest; None is on the device."""


@dataclass
class Parts:
    """What a run is made of. Techniques change it, before the first run.

    ``enter`` is told which component works next, by its name here; a technique may bring it to the device then.
    ``transformer_2`` is the low-noise expert of two-expert models; it takes over below
    ``boundary_ratio`` of the 1000 training timesteps.
    """

    text: TextEncoder
    transformer: WanTransformer
    transformer_2: WanTransformer | None
    vae: WanVAE
    boundary_ratio: float | None
    image_encoder: ImageEncoder | None = None
    enter: Callable[[str], None] = lambda component: None
    weights_move: bool = False
    """Whether the transformers' weights change their place between two uses, so that no view of them stays true."""

    @property
    def device(self) -> torch.device:
        """Where latents, embeddings and frames are."""
        return self.text.device


def build(
    source: Source,
    *,
    device: torch.device,
    dtype: torch.dtype,
    vae_dtype: torch.dtype | None = None,
    transformers_on_host: bool = False,
    resident_blocks: ResidentBlocks | None = None,
    text_home: str = "gpu",
    as_loaded: AsLoaded | None = None,
    first: Callable[[TextEncoder], None] = lambda text: None,
) -> Parts:
    """Load, or for ``random:`` models make, every part; weights go shard by shard straight to the device.

    Args:
        vae_dtype: of the VAE, if it is not that of the rest.
        transformers_on_host: whether a technique brings them from there to the device.
        resident_blocks: how many blocks of each transformer it leaves on the device; these load straight there.
        text_home: ``cpu`` if the text encoder works in host memory, ``blocks`` if it only waits there.
        as_loaded: changes the transformers' layers one by one, as soon as each has its weights.
        first: told of the text encoder, whose weights may begin to load then, before all else loads.

    Raises:
        WeightsError: files are missing, damaged or of another model.
    """
    host, vae_dtype = torch.device("cpu"), vae_dtype or dtype

    def rest_on(config: TransformerConfig, experts: int) -> Place | None:
        if not transformers_on_host:
            return None
        # Layers that change as they load are smaller than told here: they all come later.
        if resident_blocks is None or as_loaded is not None:
            return lambda path: host
        blocks, rest = transformer_bytes(config, dtype)
        here = resident_blocks(experts, config.num_layers, rest, blocks // config.num_layers)
        return lambda path: host if _block_of(path) >= here else device

    if isinstance(source, RandomModel):
        text, others = _random_text(device, dtype), partial(_random, source.known)
    else:
        layout = read_layout(source)
        text, others = _text(layout, device, dtype), partial(_load, layout)
    text.runs_on = host if text_home == "cpu" else device
    text.rests_on = host if text_home in ("cpu", "blocks") else device
    try:
        first(text)
        _ = text.tokenizer  # what is wrong with it is told now
        return others(text, device, dtype, vae_dtype, rest_on, as_loaded)
    except BaseException:
        text.give_up()
        raise


def _block_of(path: str) -> int:
    """The number of the transformer block that a path is in; -1 for none."""
    first, *others = path.split(".")
    return int(others[0]) if first == "blocks" and others else -1


def _text(layout: Layout, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    def encoder(rests_on: torch.device, is_wanted: Callable[[], bool]) -> nn.Module:
        model: nn.Module = _on_meta(_encoder, layout.classes["text_encoder"], dict(layout.configs["text_encoder"]))
        load_weights(
            model,
            layout.files["text_encoder"],
            device=rests_on,
            dtype=dtype,
            component="text_encoder",
            is_wanted=is_wanted,
        )
        return model

    identity = check.fingerprint((*layout.files["text_encoder"].paths, *_files_in(layout.tokenizer)))
    return TextEncoder(partial(_tokenizer, layout.tokenizer), encoder, identity=identity, device=device, dtype=dtype)


def _load(
    layout: Layout,
    text: TextEncoder,
    device: torch.device,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    rest_on: RestOn,
    as_loaded: AsLoaded | None,
) -> Parts:
    experts = 2 if layout.transformer_2 else 1

    def transformer(component: str, config: TransformerConfig) -> WanTransformer:
        model = _on_meta(WanTransformer, config)
        load_weights(
            model,
            layout.files[component],
            device=device,
            dtype=dtype,
            component=component,
            keep_fp32=KEEP_FP32,
            ignore=("*.norm_added_q.*",),
            rest_on=rest_on(config, experts),
            as_loaded=as_loaded,
        )
        return model

    vae = _on_meta(WanVAE, layout.vae)
    load_weights(vae, layout.files["vae"], device=device, dtype=vae_dtype, component="vae")

    return Parts(
        text=text,
        transformer=transformer("transformer", layout.transformer),
        transformer_2=transformer("transformer_2", layout.transformer_2) if layout.transformer_2 else None,
        vae=vae.prepare(device),
        boundary_ratio=layout.boundary_ratio,
        image_encoder=_image_encoder(layout, device, dtype) if layout.transformer.image_dim else None,
    )


def _image_encoder(layout: Layout, device: torch.device, dtype: torch.dtype) -> ImageEncoder:
    import transformers

    files = layout.files["image_encoder"]
    sizes = transformers.CLIPVisionConfig(**layout.configs["image_encoder"]).to_dict()
    model = _on_meta(ImageEncoder, ClipConfig.from_json(sizes))
    prefixed = any(name.startswith("vision_model.") for name in files.shapes)
    load_weights(
        # Published files have the prefix; those that transformers 5 writes have not.
        torch.nn.ModuleDict({"vision_model": model}) if prefixed else model,
        files,
        device=device,
        dtype=dtype,
        component="image_encoder",
        ignore=(
            f"*encoder.layers.{sizes['num_hidden_layers'] - 1}.*",
            "*post_layernorm.*",
            "visual_projection.*",
            "*position_ids",
        ),
    )
    return model


def _random_text(device: torch.device, dtype: torch.dtype) -> TextEncoder:
    def encoder(rests_on: torch.device, is_wanted: Callable[[], bool]) -> nn.Module:
        model: nn.Module = _on_meta(_encoder, "UMT5EncoderModel", UMT5_XXL)
        randomize(model, device=device, dtype=dtype, rest_on=lambda path: rests_on)
        return model

    pocket = locate(POCKET.name)
    assert isinstance(pocket, Folder)
    # Random weights know no words, so the embedded tokenizer serves: its ids are valid ones.
    words = partial(_tokenizer, pocket.path / "tokenizer")
    return TextEncoder(words, encoder, identity="random", device=device, dtype=dtype)


def _random(
    known: KnownModel,
    text: TextEncoder,
    device: torch.device,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    rest_on: RestOn,
    as_loaded: AsLoaded | None,
) -> Parts:
    def transformer(seed: int) -> WanTransformer:
        model = _on_meta(WanTransformer, known.transformer)
        randomize(
            model,
            device=device,
            dtype=dtype,
            keep_fp32=KEEP_FP32,
            seed=seed,
            rest_on=rest_on(known.transformer, 2 if known.boundary_ratio else 1),
            as_loaded=as_loaded,
        )
        return model

    def image_encoder() -> ImageEncoder | None:
        if known.transformer.image_dim is None:
            return None
        model = _on_meta(ImageEncoder, ClipConfig())
        randomize(model, device=device, dtype=dtype)
        return model

    vae = _on_meta(WanVAE, known.vae)
    randomize(vae, device=device, dtype=vae_dtype)

    return Parts(
        text=text,
        transformer=transformer(0),
        transformer_2=transformer(1) if known.boundary_ratio else None,
        vae=vae.prepare(device),
        boundary_ratio=known.boundary_ratio,
        image_encoder=image_encoder(),
    )


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def _on_meta(kind: Any, *sizes: Any) -> Any:
    with torch.device("meta"):
        return kind(*sizes).eval().requires_grad_(False)


def _encoder(name: str, sizes: Mapping[str, Any]) -> nn.Module:
    return UMT5Encoder(TextConfig.from_json(sizes, own_bias=name != "T5EncoderModel"))


def _tokenizer(folder: Path) -> Any:
    """The ``tokenizers.Tokenizer`` of a folder: its ``tokenizer.json``, as official Wan reads it.

    Without transformers, which would take 2 to 10 s to import, by what else is installed; it is only asked for where
    ``spiece.model`` has to be converted.

    Raises:
        WeightsError: the file is damaged, or ``spiece.model`` cannot be converted.
    """
    file = folder / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the package names no other
            raise WeightsError(f"{file} is damaged ({error}); download it again") from None
    else:
        silence()
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
        except Exception:  # transformers tries several ways, and tells of the last
            raise WeightsError(
                f"{folder} has no tokenizer.json, and its spiece.model cannot be converted; put the tokenizer.json of "
                "google/umt5-xxl beside it, or pip install sentencepiece protobuf"
            ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


_KINDS: dict[type, type[nn.Module]] = {TransformerConfig: WanTransformer, VAEConfig: WanVAE, ClipConfig: ImageEncoder}


@cache
def parameter_count(config: TransformerConfig | VAEConfig | ClipConfig) -> int:
    """How many weights a transformer, VAE or image encoder of these sizes has; nothing is allocated."""
    model: nn.Module = _on_meta(_KINDS[type(config)], config)
    return _count(model.parameters())


@cache
def transformer_bytes(config: TransformerConfig, dtype: torch.dtype) -> tuple[int, int]:
    """What a transformer's blocks, and the rest of it, take at rest in a dtype; nothing is allocated."""
    blocks = rest = 0
    for name, parameter in _on_meta(WanTransformer, config).named_parameters():
        kept = any(fnmatchcase(name, glob) for glob in KEEP_FP32)
        size = parameter.numel() * (4 if kept else dtype.itemsize)
        if name.startswith("blocks."):
            blocks += size
        else:
            rest += size
    return blocks, rest


def text_parameter_count(sizes: dict[str, Any]) -> int:
    """The same for a UMT5 encoder."""
    return _count(_on_meta(_encoder, "UMT5EncoderModel", sizes).parameters())


def _count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)
