"""From the body of a call, JSON or a form, to a request: OpenAI's words and Wan's own."""

from __future__ import annotations

import json
import math
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from fastapi import Request as HttpRequest
from starlette.datastructures import UploadFile

from swiftwan.errors import did_you_mean
from swiftwan.pipelines.request import TASKS, Request, request_from_json
from swiftwan.serve.http.answers import ApiError, wrong_field
from swiftwan.serve.http.shapes import public_name
from swiftwan.serve.http.uploads import Upload, from_data_url
from swiftwan.serve.jobs.admission import FILE_FIELDS, check_plan_of_client
from swiftwan.serve.jobs.folder import Folder

MAX_PROMPT = 10_000
"""Characters; Wan reads 512 tokens."""

MAX_FILES = 16
_WORDS = ("model", "plan", "task", "size", "seconds", "input_reference")


@dataclass(frozen=True)
class Body:
    """What a call said and brought."""

    said: dict[str, Any]
    uploads: tuple[Upload, ...]


async def read_body(call: HttpRequest) -> AsyncIterator[Body]:
    """Read JSON or a form, and let its files go after the answer.

    Raises:
        ApiError: 400: broken; 415: of another type.
    """
    try:
        yield await _read(call)
    finally:
        await call.close()


async def _read(call: HttpRequest) -> Body:
    kind = call.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        return await _read_form(call)
    if kind != "application/json":
        raise ApiError(415, "the body must be application/json or multipart/form-data.", code="unsupported_media_type")
    try:
        said = json.loads(await call.body(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is no valid JSON.", code="bad_request") from None
    if not isinstance(said, dict):
        raise ApiError(400, "the body must be one JSON object.", code="bad_request")
    said = {name: value for name, value in said.items() if value is not None}
    uploads = tuple(_uploads_in_json(said))
    return Body(said, uploads)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _uploads_in_json(said: dict[str, Any]) -> list[Upload]:
    """Take data: URLs out of what was said."""
    uploads = []
    for field in ("input_reference", *FILE_FIELDS):
        value = said.pop(field, None)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                item = item.get("image_url", item)
                item = item.get("url", item) if isinstance(item, dict) else item
            if item is None:
                continue
            if not isinstance(item, str):
                raise wrong_field(field, f"{field} must be an uploaded file or a base64 data: URL.")
            uploads.append(from_data_url(field, item))
    return uploads


async def _read_form(call: HttpRequest) -> Body:
    form = await call.form(max_files=MAX_FILES, max_fields=100)
    said: dict[str, Any] = {}
    uploads = []
    for name, value in form.multi_items():
        field = name.removesuffix("[]")
        if isinstance(value, UploadFile):
            uploads.append(Upload(field, value.file))
        elif field in ("input_reference", *FILE_FIELDS):
            uploads.append(from_data_url(field, value))
        elif field in said:
            said[field] = [*(said[field] if isinstance(said[field], list) else [said[field]]), value]
        else:
            said[field] = value
    return Body({name: _from_text(name, value) for name, value in said.items() if value != ""}, tuple(uploads))


def _from_text(name: str, value: Any) -> Any:
    """A form knows only text; the request's fields say what was meant."""
    if name in ("plan", "weights") and isinstance(value, str) and value.startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            raise wrong_field(name, f"{name} is no valid JSON list.") from None
    kind = _KINDS.get(name, "")
    try:
        if "tuple[float" in kind:
            return [float(item) for item in (value if isinstance(value, list) else [value])]
        if "float" in kind:
            return float(value)
        if "int" in kind or "Literal[1]" in kind:
            return int(value)
    except (TypeError, ValueError):
        raise wrong_field(name, f"{name} is {str(value)[:40]!r}; it must be a number.") from None
    return value


_KINDS = {field.name: str(field.type) for task in TASKS.values() for field in fields(task)} | {"n": "int"}


@dataclass(frozen=True)
class Asked:
    """A call, understood. ``inputs`` are names of files that were taken in for it, ``sizes`` those of its images."""

    request: Request
    model: str
    plan: str | list[str] | None
    inputs: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]


def model_named(name: object, models: Sequence[str]) -> str:
    """Which of a server's models a call names; the first if it names none.

    Raises:
        ApiError: 400: none of them.
    """
    for model in models:
        if name is None or name == public_name(model):
            return model
    known = [public_name(model) for model in models]
    told = f"model is {str(name)[:80]!r}; this server runs {' and '.join(known)}; leave it out or name one."
    raise wrong_field("model", told + did_you_mean(str(name)[:80], known))


def understand(body: Body, *, model: str, fps: int | None, picture: bool, folder: Folder) -> Asked:
    """Make a request of a body.

    Args:
        model: what :func:`model_named` found.
        fps: its default, by which ``seconds`` become frames.
        picture: whether one frame is wanted.
        folder: where the files of the call go.

    Raises:
        ApiError, RequestError, PlanError: 400, with the field.
        DiskFullError: the files have no room.
    """
    said = dict(body.said)
    for name, value in said.items():
        _check_range(name, value)
    said.pop("model", None)
    plan = check_plan_of_client(said.pop("plan")) if "plan" in said else None
    sizes = [size for upload in body.uploads if (size := upload.seen[1])]  # all are looked at before one is kept
    task = _task(said, body.uploads, picture=picture)
    _check_fields(said, task)
    _read_size(said)
    _read_seconds(said, fps)
    inputs = [folder.take_in(upload.chunks(), upload.ending) for upload in body.uploads]
    try:
        values = said | _places(task, body.uploads, inputs) | {"task": task}
        request = request_from_json(values)
    except BaseException:
        folder.remove(inputs)
        raise
    return Asked(request, model, plan, tuple(inputs), tuple(sizes))


def _check_range(name: str, value: Any) -> None:
    """Keep numbers where arithmetic holds, and text where it can be stored."""
    if isinstance(value, bool):
        return
    if isinstance(value, int) and abs(value) >= 2**63 or isinstance(value, float) and not math.isfinite(value):
        raise wrong_field(name, f"{name} is out of all range.")
    if isinstance(value, str):
        if len(value) > MAX_PROMPT:
            raise wrong_field(name, f"{name} has {len(value)} characters; at most {MAX_PROMPT} are taken.")
        if not value.isprintable() and ("\0" in value or any("\ud800" <= sign <= "\udfff" for sign in value)):
            raise wrong_field(name, f"{name} holds characters that no text has.")


def _task(said: dict[str, Any], uploads: tuple[Upload, ...], *, picture: bool) -> str:
    """The task that a call names, or that what it brings calls for."""
    named = said.pop("task", None)
    if named is not None:
        if not isinstance(named, str) or named not in TASKS:
            raise wrong_field("task", f"task is {str(named)[:40]!r}." + did_you_mean(str(named), TASKS))
        return named
    clip = any(upload.ending == ".mp4" for upload in uploads)
    if picture:
        task = {0: "TextToImage", 1: "ImageToImage"}.get(len(uploads), "Blend")
    else:
        task = "VideoToVideo" if clip else "ImageToVideo" if uploads else "TextToVideo"
    if task not in TASKS:
        raise wrong_field(uploads[0].field, f"this version of swiftwan cannot do {task}; send words alone.")
    return task


def _check_fields(said: Mapping[str, Any], task: str) -> None:
    known = {field.name for field in fields(TASKS[task])} - set(FILE_FIELDS)
    for name in said:
        if name not in known | {"size", "seconds"}:
            hint = did_you_mean(name, known | set(_WORDS))
            raise ApiError(400, f"{task} has no field '{name[:40]}'.{hint}", code="unknown_field", param=name[:40])
    if not isinstance(said.get("prompt"), str) or not said["prompt"].strip():
        raise wrong_field("prompt", "prompt is missing or empty; say what to show.")


def _read_size(said: dict[str, Any]) -> None:
    size = said.pop("size", "auto")
    if size == "auto":
        return
    found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size) if isinstance(size, str) else None
    if found is None:
        raise wrong_field("size", f"size is {str(size)[:40]!r}; write width x height, for example '832x480'.")
    if "width" in said or "height" in said:
        raise wrong_field("size", "size is given beside width or height; give one of the two.")
    said["width"], said["height"] = int(found[1]), int(found[2])


def _read_seconds(said: dict[str, Any], fps: int | None) -> None:
    """Seconds to the nearest 4k + 1 frames."""
    if "seconds" not in said:
        return
    told = said.pop("seconds")
    if "num_frames" in said:
        raise wrong_field("seconds", "seconds is given beside num_frames; give one of the two.")
    try:
        seconds = float(told) if not isinstance(told, bool) else math.nan
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 < seconds <= 3600:
        raise wrong_field("seconds", f"seconds is {str(told)[:40]!r}; it must be a number above 0, for example '4'.")
    rate = said.get("fps", fps)
    if isinstance(rate, bool) or not isinstance(rate, int) or not 0 < rate <= 240:
        raise wrong_field("fps", f"fps is {rate!r}; it must be 1 to 240.")
    said["num_frames"] = 4 * round(seconds * rate / 4) + 1


def _places(task: str, uploads: tuple[Upload, ...], names: list[str]) -> dict[str, Any]:
    """Which field of the task each file goes to; ``input_reference`` and ``image`` are its first."""
    takes = [field.name for field in fields(TASKS[task]) if field.name in FILE_FIELDS]
    if uploads and not takes:
        raise wrong_field(uploads[0].field, f"{task} takes no files.")
    placed: dict[str, Any] = {}
    for upload, name in zip(uploads, names, strict=True):
        if takes == ["images"]:
            placed.setdefault("images", []).append(name)
            continue
        field = upload.field if upload.field in takes else takes[0]
        if field in placed:
            raise wrong_field(upload.field, f"{task} takes one file as {field}.")
        if (field == "video") != name.endswith(".mp4"):
            raise wrong_field(upload.field, f"{task} needs {'a clip' if field == 'video' else 'an image'} as {field}.")
        placed[field] = name
    return placed
