"""Errors as OpenAI's clients read them: a status, a code, the field, one line of words. Never a path or a traceback."""

from __future__ import annotations

import logging
import re
import sqlite3
from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from swiftwan.errors import OutputError, PlanError, RequestError, SwiftwanError, WeightsError
from swiftwan.memory import WillNotFitError
from swiftwan.pipelines.request import TASKS
from swiftwan.serve.jobs.folder import DiskFullError
from swiftwan.serve.jobs.service import NotReadyError
from swiftwan.serve.jobs.store import KeyReusedError, QueueFullError, UnknownJobError, WrongStateError

_log = logging.getLogger(__name__)


class ApiError(SwiftwanError):
    """An answer that is not 2xx.

    Attributes:
        status: of HTTP.
        message: one line for people.
        code: one word for programs.
        param: the field that is wrong.
    """

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers


def wrong_field(param: str, message: str) -> ApiError:
    return ApiError(400, message, code="invalid_value", param=param)


def answer(error: ApiError) -> JSONResponse:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    told = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return JSONResponse({"error": told}, error.status, error.headers)


def from_exception(error: Exception) -> ApiError:
    """The answer to what went wrong; what nobody foresaw is logged, and told as an error of ours."""
    match error:
        case ApiError():
            return error
        case WillNotFitError():
            return ApiError(422, str(error), code="will_not_fit")
        case PlanError():
            return ApiError(400, str(error), code="invalid_value", param="plan")
        case RequestError():
            return ApiError(400, str(error), code="invalid_value", param=_field_of(str(error)))
        case UnknownJobError():
            return ApiError(404, str(error), code="not_found")
        case KeyReusedError():
            return ApiError(409, str(error), code="idempotency_key_reused", param="Idempotency-Key")
        case WrongStateError():
            return ApiError(409, str(error), code="wrong_state")
        case QueueFullError():
            retry = {"Retry-After": str(max(1, round(error.wait_s)))}
            return ApiError(429, str(error), code="queue_full", headers=retry)
        case NotReadyError():
            return ApiError(503, str(error), code="not_ready", headers={"Retry-After": "5"})
        case DiskFullError():
            return ApiError(507, str(error), code="disk_full")
        case sqlite3.OperationalError() if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
            return ApiError(507, "the server's disk is full; try again later.", code="disk_full")
        case WeightsError() | OutputError():
            _log.error("%s", error)
            return ApiError(500, "the server cannot do this now; its log says why.", code="internal")
        case _:
            _log.error("unexpected", exc_info=error)
            return ApiError(500, "an error of the server; its log has more.", code="internal")


def _field_of(message: str) -> str | None:
    """The field that a message of `Request.check` begins with."""
    fields = {name for task in TASKS.values() for name in task.__dataclass_fields__} | {"task"}
    first = re.match(r"(?:unknown )?(\w+)", message)
    return first[1] if first and first[1] in fields else None


def install(app: FastAPI) -> None:
    """Make every error of an app one of these answers."""

    async def told(request: Request, error: Exception) -> JSONResponse:
        return answer(from_exception(error))

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
        headers = dict(error.headers or {})
        return answer(ApiError(error.status_code, str(error.detail), code=code, headers=headers))

    async def validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        param, message = _first_problem(error.errors())
        return answer(wrong_field(param, message))

    app.add_exception_handler(SwiftwanError, told)
    app.add_exception_handler(sqlite3.OperationalError, told)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(Exception, told)


def _first_problem(problems: Iterable[Any]) -> tuple[str, str]:
    problem = next(iter(problems))
    param = str(problem["loc"][-1]) if problem["loc"] else "body"
    return param, f"{param}: {problem['msg']}."
