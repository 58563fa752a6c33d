"""``swiftwan info``: what a file holds, and how it was made."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def info(
    file: Annotated[Path, typer.Argument(help="An .mp4 or .png that swiftwan wrote.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a file's size and the record of the run that made it."""
    from swiftwan.media import media_facts, read_record

    record, facts = read_record(file), media_facts(file)
    if as_json:
        typer.echo(json.dumps({"path": str(file), "media": asdict(facts), "record": record}))
        return
    rows = {f"media.{name}": value for name, value in asdict(facts).items()}
    for name, value in record.items():
        if isinstance(value, dict):
            rows |= {f"{name}.{inner}": told for inner, told in value.items()}
        elif name == "inputs":
            rows |= {f"input {number}": _told(given) for number, given in enumerate(value, 1)}
        else:
            rows[name] = (" ".join(value) or "none") if isinstance(value, list) else value
    width = max(map(len, rows))
    for name, told in rows.items():
        typer.echo(f"{name:<{width}}  {told}")


def _told(given: dict[str, str]) -> str:
    return f"{given['name']}: {given['fitted'] or 'used as it is'} (sha256 {given['sha256'][:16]})"
