"""The bodies of calls as the OpenAPI description tells them: read off the tasks, so that the two cannot differ."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from swiftwan.pipelines.request import TASKS
from swiftwan.sampling import SCHEDULERS
from swiftwan.serve.jobs.admission import FILE_FIELDS

_FILE = {"type": "string", "description": "a base64 data: URL in JSON, a file in a form"}
_OPENAI: dict[str, Any] = {
    "model": {"type": "string", "description": "one of /v1/models"},
    "size": {"type": "string", "pattern": "^(auto|[0-9]{1,5}x[0-9]{1,5})$"},
    "input_reference": _FILE,
}
_VIDEO: dict[str, Any] = {"seconds": {"type": "string", "pattern": "^[0-9]{1,3}$"}}
_PICTURES: dict[str, Any] = {
    "n": {"type": "integer", "minimum": 1, "maximum": 10},
    "response_format": {"enum": ["b64_json", "url"]},
}
_OURS: dict[str, Any] = {
    "task": {"enum": sorted(TASKS)},
    "plan": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
}

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": description,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {"error": {"type": "object", "required": ["message", "type", "param", "code"]}},
                }
            }
        },
    }
    for status, description in (("4XX", "What is wrong with the call."), ("5XX", "What is wrong with the server."))
}


def video_body() -> dict[str, Any]:
    """What ``openapi_extra`` takes for a call that asks for a video."""
    return _body(_OPENAI | _VIDEO | _OURS)


def pictures_body() -> dict[str, Any]:
    """The same for pictures."""
    return _body(_OPENAI | _PICTURES | _OURS)


def _body(more: dict[str, Any]) -> dict[str, Any]:
    properties = {name: _schema(name, kind) for name, kind in _fields().items()} | more
    schema = {"type": "object", "required": ["prompt"], "additionalProperties": False, "properties": properties}
    content = {kind: {"schema": schema} for kind in ("application/json", "multipart/form-data")}
    return {"requestBody": {"required": True, "content": content}}


def _fields() -> dict[str, str]:
    return {field.name: str(field.type) for task in TASKS.values() for field in fields(task)}


def _schema(name: str, kind: str) -> dict[str, Any]:
    if name in FILE_FIELDS:
        return {"type": "array", "items": _FILE} if name == "images" else _FILE
    if name == "scheduler":
        return {"enum": sorted(SCHEDULERS)}
    if name == "weights":
        return {"type": "array", "items": {"type": "number"}}
    if "float" in kind:
        return {"type": "number"}
    if "int" in kind or "Literal[1]" in kind:
        return {"type": "integer"}
    return {"type": "string", "minLength": 1} if name == "prompt" else {"type": "string"}
