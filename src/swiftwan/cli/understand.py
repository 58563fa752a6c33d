"""What a command line comes to: a request, a model, a plan, and where the result goes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any

from swiftwan.cli.asked import Asked
from swiftwan.errors import RequestError, did_you_mean
from swiftwan.pipelines.request import TASKS, Request, request_from_json

PICTURES = ("TextToImage", "ImageToImage", "Blend")
_QUALITIES = ("exact", "near", "fast")

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
    "last_image": "last_image",
    "video": "video",
    "creativity": "creativity",
    "weight": "weights",
}
"""The command line's words, and a request's; ``image`` is one or many, as the task has it."""


@dataclass(frozen=True)
class Run:
    """A command line, understood: what `Engine.load` and `Engine.run` take, and where the result goes."""

    request: Request
    model: str
    plan: str | list[str]
    device: str | None
    dtype: str | None
    out: Path


def understand(asked: Asked) -> Run:
    """Return the run asked for.

    Raises:
        RequestError: there is no prompt, options that do not go together, or an input of --like's file that changed.
        OutputError: the file of --like carries no record.
    """
    record = _record(asked.like)
    request = understand_request(asked, record.get("request", {}))
    _check_unchanged(asked, record)
    task = type(request).__name__
    return Run(
        request=request,
        model=record.get("model", "pocket") if asked.model is None else asked.model,
        plan=understand_plan(asked, record),
        device=asked.device,
        dtype=asked.dtype or record.get("dtype"),
        out=asked.out or free_name(request.prompt, ending(task)),
    )


def understand_request(asked: Asked, told: Mapping[str, Any]) -> Request:
    """The request of a command line, over that of a file, ``told``."""
    task = _task(asked, told)
    given = words_of(asked, task)
    if task == told.get("task"):
        values = {**told, **given}
    else:  # a picture's one frame says nothing about a video, nor an image about words alone
        kept = {name: told[name] for name in told if name in names_of(task) and name != "num_frames"}
        values = kept | given | {"task": task}
    if "prompt" not in values:
        raise RequestError(
            "there is no prompt; say what to show, for example "
            "swiftwan generate 'a red circle moves left over a blue background'."
        )
    if task in PICTURES:
        _check_picture(asked, task)
        values.pop("num_frames", None)
    return request_from_json(values)


def words_of(asked: Asked, task: str) -> dict[str, Any]:
    """What a command line says, as the fields of a task.

    Raises:
        RequestError: an option that the task has no field for.
    """
    values = {field: getattr(asked, word) for word, field in _FIELDS.items()}
    images = asked.image or []
    values |= {"images": images or None} if task == "Blend" else {"image": images[0] if images else None}
    values = {field: _plain(value) for field, value in values.items() if value is not None}
    words = {field: word for word, field in _FIELDS.items()}
    for field in values:
        if field not in names_of(task):
            tasks = ", ".join(name for name in TASKS if field in names_of(name))
            raise RequestError(
                f"--{words.get(field, 'image').replace('_', '-')} is for {tasks}, and this is {task} by its other "
                "options and the ending of --out; leave it out or change those."
            )
    return values


def names_of(task: str) -> set[str]:
    """The fields of a task."""
    return {field.name for field in fields(TASKS[task])}


def ending(task: str) -> str:
    return ".png" if task in PICTURES else ".mp4"


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _task(asked: Asked, told: Mapping[str, Any]) -> str:
    """What is given says which task it is, then an output's ending; without either, the file of --like does."""
    suffix = asked.out.suffix.lower() if asked.out else ""
    if asked.video is not None:
        return "VideoToVideo"
    if asked.image is not None and len(asked.image) > 1:
        return "Blend"
    if asked.image:
        is_picture = suffix == ".png" or (asked.creativity is not None and not suffix)
        return "Blend" if asked.weight else "ImageToImage" if is_picture else "ImageToVideo"
    task = str(told.get("task", "TextToVideo"))
    if suffix == ".png" and task == "TextToVideo":
        return "TextToImage"
    if suffix and suffix != ".png" and task == "TextToImage":
        return "TextToVideo"
    return task


def _check_picture(asked: Asked, task: str) -> None:
    if asked.frames not in (None, 1):
        where = f"'{asked.out}'" if asked.out else f"what {task} makes"
        raise RequestError(f"--frames is {asked.frames}, and {where} is a picture; name it .mp4 for a video.")
    if asked.out is not None and asked.out.suffix.lower() == ".mp4":
        raise RequestError(f"'{asked.out}' is a video, and {task} makes a picture; name it .png.")


def understand_plan(asked: Asked, record: Mapping[str, Any]) -> str | list[str]:
    """The plan of a command line, or that of a file.

    Raises:
        RequestError: both --plan and --with, --quality with a plan other than auto, or a quality that is none.
    """
    if asked.plan is not None and asked.techniques:
        raise RequestError(f"--plan {asked.plan} and --with {asked.techniques[0]} are both given; give one.")
    if asked.quality is not None:
        if asked.quality not in _QUALITIES:
            raise RequestError(f"--quality is '{asked.quality}'." + did_you_mean(asked.quality, _QUALITIES))
        if asked.techniques or asked.plan not in (None, "auto"):
            raise RequestError(f"--quality {asked.quality} is for --plan auto, and another plan is given.")
        return f"auto:{asked.quality}"
    if asked.techniques:
        return asked.techniques
    if asked.plan is not None:
        return [] if asked.plan == "none" else asked.plan
    plan: list[str] = record.get("plan", [])
    return plan if record else "auto"


def _record(like: Path | None) -> dict[str, Any]:
    if like is None:
        return {}
    from swiftwan.media import read_record

    return read_record(like)


def _check_unchanged(asked: Asked, record: Mapping[str, Any]) -> None:
    """A repeated run needs the same pixels; a file given anew is taken as it is."""
    if asked.image or asked.video or asked.last_image:
        return
    from swiftwan.inputs import sha256_of

    for given in record.get("inputs", []):
        if sha256_of(given["name"]) != given["sha256"]:
            raise RequestError(
                f"'{given['name']}' has changed since '{asked.like}' was made from it; give it with --image, "
                "--last-image or --video to take it as it is now."
            )


def free_name(prompt: str, ending: str) -> Path:
    """Return a name in the current folder that no file has, made of the prompt's first words."""
    stem = short_name(prompt)
    names = (f"{stem}{ending}" if n == 1 else f"{stem}-{n}{ending}" for n in count(1))
    return next(path for path in map(Path, names) if not path.exists())


def short_name(prompt: str) -> str:
    """The prompt's first words as part of a file's name."""
    stem = "-".join(re.findall(r"\w+", prompt.lower())) or "swiftwan"
    if len(stem) > 40:  # at most 160 bytes, and file systems take 255
        stem = stem[:40].rsplit("-", 1)[0]
    return stem
