"""``swiftwan serve`` and ``swiftwan ui``: the queue, its HTTP interface, and the page.

No ``from __future__ import annotations`` here: Typer reads the annotations as objects.
"""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option, echo

from swiftwan.cli.options import takes
from swiftwan.errors import RequestError, UnavailableError

if TYPE_CHECKING:
    from swiftwan.serve.jobs.service import ServiceSettings
    from swiftwan.serve.jobs.supervisor import Supervisor

_START_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of both verbs."""

    model: Annotated[
        list[str] | None,
        Option(
            help="Name, hub id, folder or random:NAME; the first is loaded at once, others may be asked for. "
            "Unset: pocket.",
            metavar="M",
            show_default=False,
        ),
    ] = None
    plan: Annotated[str, Option(help="A recipe's name, auto, or none.", metavar="P")] = "auto"
    techniques: Annotated[
        list[str] | None,
        Option("--with", help="A technique; repeat for more.", metavar="T[:k=v,...]", show_default=False),
    ] = None
    dtype: Annotated[str | None, Option(help="bf16, fp16 or fp32. Unset: the device's.", metavar="T")] = None
    device: Annotated[
        list[str] | None,
        Option(help="A worker's device; repeat for more. Unset: every GPU, else the CPU.", show_default=False),
    ] = None
    host: Annotated[str, Option(help="Another than this machine's own needs a key.")] = "127.0.0.1"
    port: Annotated[int, Option(min=1, max=65535)] = 8000
    data: Annotated[Path, Option(help="Folder of the queue and its files.", metavar="DIR")] = Path("swiftwan-data")
    key_file: Annotated[
        Path | None,
        Option(help="File with the key of calls; or set SWIFTWAN_API_KEY.", metavar="FILE", show_default=False),
    ] = None
    queue: Annotated[int, Option(help="Jobs that may wait.", min=1, metavar="N")] = 100
    grace: Annotated[float, Option(help="Seconds that running jobs get when stopped.", min=0, metavar="S")] = 30.0
    keep: Annotated[
        float | None,
        Option(
            help="Hours that files of ended jobs are kept, twice that their records. Unset: for ever.",
            min=0.001,
            metavar="H",
        ),
    ] = None


@takes(Options)
def serve(options: Options) -> None:
    """Serve videos over HTTP, as OpenAI's clients ask for them."""
    run(options, page=False)


def run(options: Options, *, page: bool) -> None:
    """Start the workers, and answer calls until a signal comes.

    Raises:
        RequestError, UnavailableError, WeightsError, OutputError: what would go wrong, before anything starts.
    """
    try:
        from swiftwan.serve.http.app import make_app
        from swiftwan.serve.http.server import check_safe, take_port
        from swiftwan.serve.http.server import serve as answer_calls
        from swiftwan.serve.jobs.service import Service, ServiceSettings

        if page:
            from swiftwan.serve.page.page import mount
    except ImportError as error:
        extra = "ui" if page else "serve"
        raise UnavailableError(f"{error.name} is not installed; 'pip install swiftwan[{extra}]'.") from None
    if options.plan != "auto" and options.techniques:
        raise RequestError(f"--plan {options.plan} and --with {options.techniques[0]} are both given; give one.")
    key = _key(options.key_file)
    check_safe(options.host, key)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("swiftwan").setLevel(logging.INFO)
    models = list(dict.fromkeys(map(_absolute, options.model or ["pocket"])))
    settings = ServiceSettings(
        folder=options.data,
        model=models[0],
        others=models[1:],
        plan=options.techniques or ([] if options.plan == "none" else options.plan),
        dtype=options.dtype,
        devices=options.device or _devices(),
        queue_limit=options.queue,
        grace_s=options.grace,
        keep_s=None if options.keep is None else 3600 * options.keep,
    )
    _check(models, settings)
    _warn_of_pillow()
    with take_port(options.host, options.port) as port:
        service = Service(settings)
        service.start()
        try:
            app = make_app(service, key=key)
            if page:
                _wait_for_a_device(service.supervisor)
                mount(app, service)
            echo(f"http://{options.host}:{options.port}{'/' if page else '/v1/videos'}", err=True)
            answer_calls(app, service, port)
        finally:
            if service.admitting:
                service.drain()
            service.close()


def _wait_for_a_device(supervisor: "Supervisor") -> None:
    """The page shows what its device can do, so one has to be known."""
    end = time.monotonic() + _START_S
    while not supervisor.devices:
        if time.monotonic() > end:
            raise UnavailableError(f"no worker came up within {_START_S:.0f} s; the lines above say why.")
        time.sleep(0.05)


def _absolute(model: str) -> str:
    """A folder's path, since workers live in the data folder; a known name is no folder, whatever lies here."""
    from swiftwan.models.config import POCKET
    from swiftwan.weights.find import known_model

    if model == POCKET.name or known_model(model) or not Path(model).is_dir():
        return model
    return str(Path(model).resolve())


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


def _warn_of_pillow() -> None:
    """gradio 6.31 brings Pillow 12 to who installs the page; it works with 13 too."""
    import PIL

    if int(PIL.__version__.partition(".")[0]) < 13:
        echo(
            f"Pillow {PIL.__version__} has a fault in its JPEG decoder (CVE-2026-112403), and reads what clients send; "
            "run 'pip install \"pillow>=13\"' (pip will say that gradio wants an older one: it works with this one)",
            err=True,
        )


def _check(models: Sequence[str], settings: "ServiceSettings") -> None:
    """Raise now what every job would fail with, or no worker would come up with."""
    from swiftwan.device import check_device, parse_dtype
    from swiftwan.plan import describe, parse
    from swiftwan.recipes import check_name, check_no_name

    for device in settings.devices:
        check_device(device)
    if settings.dtype is not None:
        parse_dtype(settings.dtype)
    for model in models:
        describe(model)
    if isinstance(settings.plan, str):
        check_name(settings.plan)
        return
    check_no_name(settings.plan)
    for spec in settings.plan:
        parse(spec)
