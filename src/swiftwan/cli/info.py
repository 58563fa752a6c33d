"""``swiftwan info``: what a file holds, and how it was made."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def info(
    file: Annotated[
        Path, typer.Argument(help="An .mp4 or .png that swiftwan wrote, or a weights file.", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a file's size and the record of the run that made it; of a weights file, what it holds."""
    if file.suffix in (".safetensors", ".gguf", ".pth"):
        _weights(file, as_json)
        return
    from swiftwan.media import media_facts, read_record

    record, facts = read_record(file), media_facts(file)
    if as_json:
        typer.echo(json.dumps({"path": str(file), "media": asdict(facts), "record": record}))
        return
    rows = {f"media.{name}": value for name, value in asdict(facts).items()}
    for name, value in record.items():
        if isinstance(value, dict):
            rows |= {f"{name}.{inner}": told for inner, told in value.items()}
        else:
            rows[name] = (" ".join(value) or "none") if isinstance(value, list) else value
    width = max(map(len, rows))
    for name, told in rows.items():
        typer.echo(f"{name:<{width}}  {told}")


def _weights(file: Path, as_json: bool) -> None:
    from math import prod

    from swiftwan.weights.shapes import looks_like
    from swiftwan.weights.sources import open_file

    source = open_file(file)
    types = ", ".join(sorted(set(source.dtypes.values())))
    count = sum(map(prod, source.shapes.values()))
    facts = {"path": str(file), "holds": looks_like(source), "types": types, "parameters": count}
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name, told in facts.items():
        typer.echo(f"{name:<10}  {told}")
