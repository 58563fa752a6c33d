"""``swiftwan info``: what a file is, and how it was made."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

_WEIGHTS = (".safetensors", ".gguf", ".pth")


def info(
    file: Annotated[
        Path,
        typer.Argument(help="An .mp4 or .png that swiftwan wrote, a weights file, or a LoRA.", show_default=False),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a video's size and the record of its run; of weights what they hold; of a LoRA the models it fits."""
    facts = _of_weights(file) if file.suffix in _WEIGHTS else _of_media(file)
    typer.echo(json.dumps(facts) if as_json else "\n".join(_table(facts)))


def _of_media(file: Path) -> dict[str, Any]:
    from swiftwan.media import media_facts, read_record

    record = read_record(file)
    return {"path": str(file), "media": asdict(media_facts(file)), "record": record}


def _of_weights(file: Path) -> dict[str, Any]:
    from math import prod

    from swiftwan.weights import lora
    from swiftwan.weights.shapes import looks_like
    from swiftwan.weights.sources import open_file

    source = open_file(file)
    holds = looks_like(source)
    if "LoRA" in holds:
        return {"path": str(file), "lora": lora.describe(file)}
    types = ", ".join(sorted(set(source.dtypes.values())))
    return {"path": str(file), "holds": holds, "types": types, "parameters": sum(map(prod, source.shapes.values()))}


def _table(facts: dict[str, Any]) -> list[str]:
    rows = dict(_rows(facts))
    width = max(map(len, rows))
    return [f"{name:<{width}}  {told}" for name, told in rows.items()]


def _rows(facts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """One row a value, named by its path: ``request.seed``."""
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from _rows(value, "" if name in ("record", "lora") else f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for number, item in enumerate(value, 1):
                yield from _rows(item, f"{prefix}{name}.{number}.")
        else:
            yield f"{prefix}{name}", (" ".join(map(str, value)) or "none") if isinstance(value, list) else value
