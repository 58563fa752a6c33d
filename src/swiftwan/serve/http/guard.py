"""What every call passes before any route: the key, where it comes from, and how much it may bring."""

from __future__ import annotations

import base64
import binascii
import hmac
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from swiftwan.serve.http.answers import ApiError, answer

OPEN_PATH = "/health/live"
"""The one route that needs no key: an orchestrator asks it, and it tells nothing."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Limits:
    """Bytes of a body: JSON is held in memory whole, a form goes to the disk."""

    json_bytes: int = 16 * 2**20
    form_bytes: int = 256 * 2**20


class Guard:
    """ASGI middleware around the whole application, mounted parts included."""

    def __init__(self, app: ASGIApp, *, key: str | None, limits: Limits) -> None:
        self.app, self.key, self.limits = app, key, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        problem = self._problem(scope, headers)
        if scope["type"] == "websocket":
            if problem is None:
                await self.app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008})
            return
        send = _with_safe_headers(send, scope["path"])
        if problem is not None:
            await answer(problem)(scope, receive, send)
            return
        counted = _Counted(receive, send, self._limit(headers))
        try:
            await self.app(scope, counted.receive, counted.send)
        except _TooLargeError:
            if not counted.answered:
                await answer(_too_large(counted.limit))(scope, receive, send)

    def _problem(self, scope: Scope, headers: Headers) -> ApiError | None:
        if scope["path"] == OPEN_PATH:
            return None
        host = headers.get("host", "")
        if self.key is None and urlsplit(f"//{host}").hostname not in LOOPBACK:
            # A page whose name an attacker points at 127.0.0.1 (DNS rebinding) would pass the Origin check.
            return ApiError(403, "this server answers to localhost only.", code="wrong_host")
        origin = headers.get("origin")
        if (origin is not None and urlsplit(origin).netloc != host) or headers.get("sec-fetch-site") == "cross-site":
            return ApiError(403, "calls from other web pages are not taken.", code="wrong_origin")
        if self.key is not None and not _has_key(headers.get("authorization", ""), self.key):
            challenge = {"WWW-Authenticate": 'Basic realm="swiftwan", Bearer'}
            return ApiError(401, "the key is missing or wrong.", code="invalid_api_key", headers=challenge)
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            return ApiError(400, "Content-Length is no number.", code="bad_request")
        limit = self._limit(headers)
        return _too_large(limit) if int(length) > limit else None

    def _limit(self, headers: Headers) -> int:
        form = headers.get("content-type", "").startswith("multipart/")
        return self.limits.form_bytes if form else self.limits.json_bytes


def _has_key(authorization: str, key: str) -> bool:
    """Whether a header carries the key: as a bearer token, or as a browser's password."""
    kind, _, told = authorization.partition(" ")
    told = told.strip()
    if kind.lower() == "basic":
        try:
            told = base64.b64decode(told, validate=True).decode(errors="replace").partition(":")[2]
        except (binascii.Error, ValueError):
            return False
    elif kind.lower() != "bearer":
        return False
    return hmac.compare_digest(told.encode(), key.encode())


class _TooLargeError(Exception):
    pass


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit / 2**20:g} MiB.", code="too_large")


class _Counted:
    """Counts a body while it comes: a client may say no length, or a wrong one."""

    def __init__(self, receive: Receive, send: Send, limit: int) -> None:
        self._receive, self._send, self.limit = receive, send, limit
        self._bytes = 0
        self.answered = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._bytes += len(message.get("body", b""))
        if self._bytes > self.limit:
            raise _TooLargeError
        return message

    async def send(self, message: Message) -> None:
        self.answered = True
        await self._send(message)


_PAGE_POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; object-src 'self'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)


def _with_safe_headers(send: Send, path: str) -> Send:
    """Nothing is sniffed, framed by others, or loaded from elsewhere, whatever the page's libraries try."""
    fixed: dict[str, Any] = {
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Content-Security-Policy": _PAGE_POLICY,
    }
    if path.startswith(("/v1", "/health", "/metrics")):
        fixed |= {"Content-Security-Policy": "default-src 'none'", "Cache-Control": "no-store"}
    elif path.startswith("/benchmarks/"):
        fixed |= {"Content-Security-Policy": _PAGE_POLICY.replace("'none'", "'self'"), "X-Frame-Options": "SAMEORIGIN"}

    async def guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(fixed)
        await send(message)

    return guarded
