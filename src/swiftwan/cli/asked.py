"""The options of ``generate`` and ``explain``; what they come to is in ``understand.py``.

No ``from __future__ import annotations`` here: Typer reads the annotations as objects.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

_GIVEN = "Images and videos to start from"
_REQUEST = "Request (unset: the model's official values)"
_RUN = "Run"
_FILE = "File"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The arguments of ``generate`` and ``explain``; None where nothing was said."""

    prompt: Annotated[str | None, Argument(help="What to show. Optional with --like.", show_default=False)] = None
    model: Annotated[
        str | None,
        Option(help="Name, hub id, folder or random:NAME. Unset: pocket.", rich_help_panel=_RUN, metavar="M"),
    ] = None
    plan: Annotated[
        str | None,
        Option(
            help="A recipe's name (8gb to 141gb), auto (the fastest that fits this GPU), or none (the plain run).",
            rich_help_panel=_RUN,
            metavar="P",
        ),
    ] = None
    quality: Annotated[
        str | None,
        Option(
            help="What auto may do: exact (the same maths), near (8 bits too), fast (skip work, too).",
            rich_help_panel=_RUN,
            metavar="exact|near|fast",
        ),
    ] = None
    techniques: Annotated[
        list[str] | None,
        Option(
            "--with",
            help="A technique, for example quantize:fp8; repeat for more.",
            rich_help_panel=_RUN,
            metavar="T[:k=v,...]",
            show_default=False,
        ),
    ] = None
    device: Annotated[
        str | None,
        Option(help="cuda, cuda:N, cpu or mps. Unset: the best here.", rich_help_panel=_RUN, metavar="D"),
    ] = None
    dtype: Annotated[
        str | None, Option(help="bf16, fp16 or fp32. Unset: the device's.", rich_help_panel=_RUN, metavar="T")
    ] = None
    image: Annotated[
        list[Path] | None,
        Option(
            help="The video's first frame; with --creativity or a .png, where the picture starts; repeat to blend.",
            rich_help_panel=_GIVEN,
            metavar="FILE",
            show_default=False,
        ),
    ] = None
    last_image: Annotated[
        Path | None, Option(help="The video's last frame.", rich_help_panel=_GIVEN, metavar="FILE")
    ] = None
    video: Annotated[Path | None, Option(help="Where the video starts.", rich_help_panel=_GIVEN, metavar="FILE")] = None
    creativity: Annotated[
        float | None,
        Option(help="0 gives what was given back, 1 ignores it. Unset: 0.6.", rich_help_panel=_GIVEN, metavar="0..1"),
    ] = None
    weight: Annotated[
        list[float] | None,
        Option(
            help="Of an image in a blend; one each, in order.",
            rich_help_panel=_GIVEN,
            metavar="X",
            show_default=False,
        ),
    ] = None
    prompts: Annotated[
        Path | None,
        Option(
            help="A file of many: a prompt a line, or JSONL of requests; --out is a folder. Run again to go on.",
            rich_help_panel=_FILE,
            metavar="FILE",
        ),
    ] = None
    width: Annotated[int | None, Option(help="Pixels.", rich_help_panel=_REQUEST, metavar="N")] = None
    height: Annotated[int | None, Option(help="Pixels.", rich_help_panel=_REQUEST, metavar="N")] = None
    frames: Annotated[int | None, Option(help="4k + 1.", rich_help_panel=_REQUEST, metavar="N")] = None
    fps: Annotated[int | None, Option(help="Frames per second.", rich_help_panel=_REQUEST, metavar="N")] = None
    steps: Annotated[int | None, Option(help="Denoising steps.", rich_help_panel=_REQUEST, metavar="N")] = None
    guidance: Annotated[
        float | None, Option(help="Guidance scale; 1 turns it off.", rich_help_panel=_REQUEST, metavar="X")
    ] = None
    guidance_2: Annotated[
        float | None,
        Option("--guidance-2", help="Of the low-noise expert.", rich_help_panel=_REQUEST, metavar="X"),
    ] = None
    shift: Annotated[float | None, Option(help="Flow shift.", rich_help_panel=_REQUEST, metavar="X")] = None
    seed: Annotated[int | None, Option(help="Unset: drawn, and recorded.", rich_help_panel=_REQUEST, metavar="N")] = (
        None
    )
    scheduler: Annotated[
        str | None, Option(help="unipc, euler, heun, dpm++ or lcm.", rich_help_panel=_REQUEST, metavar="S")
    ] = None
    negative: Annotated[
        str | None, Option(help="What to steer away from.", rich_help_panel=_REQUEST, metavar="TEXT")
    ] = None
    like: Annotated[
        Path | None,
        Option(
            help="Take all that is unset from a file that swiftwan wrote.",
            rich_help_panel=_FILE,
            metavar="FILE",
        ),
    ] = None
    out: Annotated[
        Path | None,
        Option(
            help=".mp4, or .png for a picture; with --prompts a folder. Unset: a free name here.",
            rich_help_panel=_FILE,
            metavar="FILE",
        ),
    ] = None
    file_quality: Annotated[
        int,
        Option(help="1 (small) to 10 (visually lossless).", min=1, max=10, rich_help_panel=_FILE, metavar="N"),
    ] = 8
    as_json: Annotated[
        bool,
        Option("--json", help="Print one JSON object on stdout, all else on stderr.", rich_help_panel=_FILE),
    ] = False
