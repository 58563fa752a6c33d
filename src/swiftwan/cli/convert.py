"""``swiftwan convert``: any model that swiftwan reads, as a folder in diffusers layout."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder in the original Wan or diffusers layout, a .safetensors, .gguf or .pth file, or a hub id.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must be new or empty.", show_default=False)],
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16 or fp32; default: as stored, and bf16 for packed types.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="One component alone: transformer, vae, text_encoder, ...", metavar="COMPONENT")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Which published model it is, where two have the same shapes.", metavar="NAME")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Convert a model to safetensors in diffusers layout, tensor by tensor."""
    from swiftwan.cli.progress import cancellable, shown
    from swiftwan.pipelines.result import StepEvent
    from swiftwan.weights.convert import convert as write
    from swiftwan.weights.gather import model_named

    known = model_named(model) if model else None
    began = time.perf_counter()
    with shown(plain=as_json) as display, cancellable(display):

        def on_tensor(component: str, done: int, total: int) -> None:
            display.on_step(StepEvent(component, done, total, time.perf_counter() - began))  # type: ignore[arg-type]

        display.begin("find")
        written = write(source, out, dtype=dtype, only=only, model=known, on_tensor=on_tensor)
        display.end()
    if as_json:
        told = {"folder": str(written.folder), "model": written.model, "bytes": written.bytes}
        typer.echo(json.dumps(told | {"origins": dict(written.origins)}))
        return
    for component, origin in written.origins.items():
        typer.echo(f"{component:<14} {origin}", err=True)
    typer.echo(f"{written.folder}: {written.model}, {written.bytes / 1e9:.2f} GB")
