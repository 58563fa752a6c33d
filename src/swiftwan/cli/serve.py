"""``swiftwan serve``: the queue and its HTTP interface."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from swiftwan.errors import RequestError, UnavailableError


def serve(
    model: Annotated[str, typer.Option(help="Name, hub id, folder or random:NAME.", metavar="M")] = "pocket",
    plan: Annotated[str, typer.Option(help="A recipe's name, auto, or none.", metavar="P")] = "auto",
    techniques: Annotated[
        list[str] | None,
        typer.Option("--with", help="A technique; repeat for more.", metavar="T[:k=v,...]", show_default=False),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32.", metavar="T")] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(help="A worker's device; repeat for more. Unset: every GPU, else the CPU.", show_default=False),
    ] = None,
    host: Annotated[str, typer.Option(help="Another than this machine's own needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    data: Annotated[Path, typer.Option(help="Folder of the queue and its files.", metavar="DIR")] = Path(
        "swiftwan-data"
    ),
    key_file: Annotated[
        Path | None,
        typer.Option(help="File with the key of calls; or set SWIFTWAN_API_KEY.", metavar="FILE", show_default=False),
    ] = None,
    queue: Annotated[int, typer.Option(help="Jobs that may wait.", min=1, metavar="N")] = 100,
    grace: Annotated[float, typer.Option(help="Seconds for running jobs when stopped.", min=0, metavar="S")] = 30.0,
) -> None:
    """Serve videos over HTTP, as OpenAI's clients ask for them."""
    try:
        from swiftwan.serve.http.app import make_app
        from swiftwan.serve.http.server import check_safe
        from swiftwan.serve.http.server import serve as answer_calls
        from swiftwan.serve.jobs.service import Service, ServiceSettings
    except ImportError as error:
        raise UnavailableError(f"{error.name} is not installed; 'pip install swiftwan[serve]'.") from None
    if plan != "auto" and techniques:
        raise RequestError(f"--plan {plan} and --with {techniques[0]} are both given; give one.")
    key = _key(key_file)
    check_safe(host, key)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    settings = ServiceSettings(
        folder=data,
        model=str(Path(model).resolve()) if Path(model).is_dir() else model,
        plan=techniques or ([] if plan == "none" else plan),
        dtype=dtype,
        devices=device or _devices(),
        queue_limit=queue,
        grace_s=grace,
    )
    _check(settings.model, settings.plan)
    service = Service(settings)
    service.start()
    try:
        typer.echo(f"http://{host}:{port}/v1/videos", err=True)
        answer_calls(make_app(service, key=key), service, host=host, port=port)
    finally:
        if service.admitting:
            service.drain()
        service.close()


def _key(file: Path | None) -> str | None:
    """The key, from a file or the environment: an argument would show in the list of processes."""
    if file is None:
        return os.environ.get("SWIFTWAN_API_KEY") or None
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise RequestError(f"the key file '{file}' cannot be read.") from None


def _devices() -> list[str]:
    """Every GPU; counting them makes no CUDA context here."""
    import torch

    return [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]


def _check(model: str, plan: str | Sequence[str]) -> None:
    """Raise now what every job would fail with."""
    from swiftwan.plan import describe, parse

    describe(model)
    for spec in () if isinstance(plan, str) else plan:
        parse(spec)
