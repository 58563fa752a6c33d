"""What the command line says about a run, and the request it comes to.

No ``from __future__ import annotations`` here: Typer reads the annotations as objects.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from inspect import Signature, signature
from itertools import count
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from swiftwan.errors import RequestError
from swiftwan.models.config import POCKET_DEFAULTS, Defaults
from swiftwan.pipelines.request import Request, request_from_json
from swiftwan.weights.find import known_model

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
            help="A recipe's name, auto (the fastest exact plan), or none (the plain run).",
            rich_help_panel=_RUN,
            metavar="P",
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
            help=".mp4, or .png for a picture. Unset: a free name here.",
            rich_help_panel=_FILE,
            metavar="FILE",
        ),
    ] = None
    quality: Annotated[
        int,
        Option(help="1 (small) to 10 (visually lossless).", min=1, max=10, rich_help_panel=_FILE, metavar="N"),
    ] = 8
    as_json: Annotated[
        bool,
        Option("--json", help="Print one JSON object on stdout, all else on stderr.", rich_help_panel=_FILE),
    ] = False


_FIELDS = {
    "prompt": "prompt",
    "negative": "negative_prompt",
    "width": "width",
    "height": "height",
    "frames": "num_frames",
    "fps": "fps",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "guidance_2": "guidance_scale_2",
    "shift": "flow_shift",
    "scheduler": "scheduler",
    "seed": "seed",
}
"""The command line's words, and a request's."""


@dataclass(frozen=True)
class Run:
    """A command line, understood: what `Engine.load` and `Engine.run` take, and where the result goes."""

    request: Request
    model: str
    plan: str | list[str]
    device: str | None
    dtype: str | None
    out: Path

    def size(self) -> tuple[int, int, int]:
        """Frames, height and width, with the model's defaults for what is not said."""
        completed = self.request.completed(_defaults(self.model))
        assert completed.num_frames is not None
        assert completed.height is not None
        assert completed.width is not None
        return completed.num_frames, completed.height, completed.width


def takes_asked(verb: Callable[[Asked], None]) -> Callable[..., None]:
    """Give a verb the fields of :class:`Asked` as its options."""

    @wraps(verb)
    def command(**values: Any) -> None:
        verb(Asked(**values))

    options = list(signature(Asked).parameters.values())
    command.__signature__ = Signature(options)  # type: ignore[attr-defined]
    command.__annotations__ = {option.name: option.annotation for option in options}
    del command.__wrapped__
    return command


def understand(asked: Asked) -> Run:
    """Return the run asked for.

    Raises:
        RequestError: there is no prompt, both --plan and --with, or a picture is to have many frames.
        OutputError: the file of --like carries no record.
    """
    if asked.plan is not None and asked.techniques:
        raise RequestError(f"--plan {asked.plan} and --with {asked.techniques[0]} are both given; give one.")
    record = _record(asked.like)
    fields = dict(record.get("request", {}))
    fields |= {_FIELDS[word]: value for word in _FIELDS if (value := getattr(asked, word)) is not None}
    if "prompt" not in fields:
        raise RequestError(
            "there is no prompt; say what to show, for example "
            "swiftwan generate 'a red circle moves left over a blue background'."
        )
    task = _task(asked, record)
    if task != record.get("request", {}).get("task") and asked.frames is None:
        fields.pop("num_frames", None)  # a picture's one frame says nothing about a video, nor the other way
    if task == "TextToImage" and fields.pop("num_frames", 1) != 1:
        raise RequestError(f"--frames is {asked.frames}, and '{asked.out}' is a picture; name it .mp4 for a video.")
    ending = ".png" if task == "TextToImage" else ".mp4"
    return Run(
        request=request_from_json(fields | {"task": task}),
        model=asked.model or record.get("model", "pocket"),
        plan=_plan(asked, record),
        device=asked.device,
        dtype=asked.dtype or record.get("dtype"),
        out=asked.out or free_name(fields["prompt"], ending),
    )


def free_name(prompt: str, ending: str) -> Path:
    """Return a name in the current folder that no file has, made of the prompt's first words."""
    stem = "-".join(re.findall(r"\w+", prompt.lower())) or "swiftwan"
    if len(stem) > 40:  # at most 160 bytes, and file systems take 255
        stem = stem[:40].rsplit("-", 1)[0]
    names = (f"{stem}{ending}" if n == 1 else f"{stem}-{n}{ending}" for n in count(1))
    return next(path for path in map(Path, names) if not path.exists())


def _record(like: Path | None) -> dict[str, Any]:
    if like is None:
        return {}
    from swiftwan.media import read_record

    return read_record(like)


def _task(asked: Asked, record: dict[str, Any]) -> str:
    """An output's ending says whether it is a picture; without one, the file of --like does."""
    told = record.get("request", {}).get("task", "TextToVideo")
    if asked.out is None:
        return str(told)
    if asked.out.suffix.lower() == ".png":
        return "TextToImage"
    return "TextToVideo" if told == "TextToImage" else str(told)


def _plan(asked: Asked, record: dict[str, Any]) -> str | list[str]:
    if asked.techniques:
        return asked.techniques
    if asked.plan is not None:
        return [] if asked.plan == "none" else asked.plan
    plan: list[str] = record.get("plan", [])
    return plan if record else "auto"


def _defaults(model: str) -> Defaults:
    """A known model's defaults; for a folder the pocket's small ones, which never refuse a disk wrongly."""
    known = known_model(model)
    return known.defaults if known else POCKET_DEFAULTS
