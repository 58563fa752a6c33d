"""``swiftwan info``: what a file holds, and how it was made."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer


def info(
    file: Annotated[Path, typer.Argument(help="An .mp4 or .png that swiftwan wrote, or a LoRA.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a file's size and the record of the run that made it; of a LoRA its family and the models it fits."""
    if file.suffix == ".safetensors":
        from swiftwan.weights.lora import describe

        facts_of_lora = describe(file)
        told = [json.dumps({"path": str(file), "lora": facts_of_lora})] if as_json else _table(facts_of_lora)
        typer.echo("\n".join(told))
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
    typer.echo("\n".join(_table(rows)))


def _table(rows: dict[str, Any]) -> list[str]:
    width = max(map(len, rows))
    return [f"{name:<{width}}  {told}" for name, told in rows.items()]
