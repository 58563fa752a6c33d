"""What must be known of a model before a run, and a request completed by it: nothing is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from swiftwan import inputs
from swiftwan.models.config import KNOWN_MODELS, POCKET, KnownModel
from swiftwan.pipelines.request import Grid, Request
from swiftwan.sampling import check_scheduler
from swiftwan.weights.build import UMT5_XXL, text_parameter_count
from swiftwan.weights.find import identify, known_model, locate, published_file, read_layout
from swiftwan.weights.layout import RandomModel, WeightsFile


@dataclass(frozen=True)
class Facts:
    """What must be known of a model before a run, without its weights."""

    name: str
    known: KnownModel
    text_parameters: int
    text_kept_parameters: int
    text_block_parameters: int

    @property
    def grid(self) -> Grid:
        vae, patch = self.known.vae, self.known.transformer.patch_size
        return Grid(spatial=vae.scale_factor_spatial * patch[1], temporal=vae.scale_factor_temporal)

    @property
    def experts(self) -> int:
        return 2 if self.known.boundary_ratio else 1


def describe(model: str) -> Facts:
    """Find a model's sizes and defaults: published ones from the table, others from their config files.

    Raises:
        WeightsError: there is no such model.
    """
    if model == POCKET.name:
        return Facts(
            model, POCKET, text_parameters=1_181_184, text_kept_parameters=294_528, text_block_parameters=369_280
        )
    if known := known_model(model):
        return Facts(model, known, *_text_parameters(UMT5_XXL))
    source = locate(model)
    assert not isinstance(source, RandomModel)
    if isinstance(source, WeightsFile) and (known := published_file(source)):
        # Its other parts are the published ones: no need to bring them to know their sizes.
        return Facts(model, known, *_text_parameters(UMT5_XXL))
    layout = read_layout(source)
    text_sizes = {k: v for k, v in layout.configs["text_encoder"].items() if k in UMT5_XXL}
    family = identify(layout) or _family(layout.boundary_ratio, layout.expand_timesteps, layout.transformer.in_channels)
    sized = KnownModel(
        name=source.name,
        hub_id="",
        transformer=layout.transformer,
        vae=layout.vae,
        defaults=family.defaults,
        boundary_ratio=layout.boundary_ratio if layout.transformer_2 else None,
        expand_timesteps=layout.expand_timesteps,
        sizes=family.sizes,
    )
    return Facts(model, sized, *_text_parameters(text_sizes))


def _text_parameters(sizes: dict[str, Any]) -> tuple[int, int, int]:
    """All; those that quantize leaves as they are: the embedding, and each layer's wo; those of one layer."""
    layers, embedding = sizes["num_layers"], sizes["d_model"] * sizes["vocab_size"]
    parameters = text_parameter_count(sizes)
    kept = embedding + layers * sizes["d_model"] * sizes["d_ff"]
    return parameters, kept, (parameters - embedding) // layers


def _family(boundary_ratio: float | None, expand_timesteps: bool, in_channels: int) -> KnownModel:
    """Whose defaults a model of unknown sizes takes: those of the published one that works the same way."""
    if boundary_ratio is not None:
        return KNOWN_MODELS["wan2.2-i2v-a14b" if in_channels == 36 else "wan2.2-t2v-a14b"]
    if expand_timesteps:
        return KNOWN_MODELS["wan2.2-ti2v-5b"]
    return KNOWN_MODELS["wan2.1-i2v-14b-480p" if in_channels == 36 else "wan2.1-t2v-1.3b"]


def complete(request: Request, facts: Facts) -> Request:
    """Fill a request with the model's defaults and check it.

    Raises:
        RequestError: a task or a value that the model cannot take, or an input that cannot be read.
    """
    request.check_model(facts.known)
    request = inputs.sized(request, facts.known.defaults, facts.grid).completed(facts.known.defaults)
    check_scheduler(request.scheduler or "")
    request.check(facts.grid, experts=facts.experts)
    return request
