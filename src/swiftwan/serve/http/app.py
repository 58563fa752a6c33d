"""The application: routes, errors, and the guard before them."""

from __future__ import annotations

from importlib import metadata

from fastapi import FastAPI
from starlette.middleware import Middleware

from swiftwan.serve.http import answers, house, images, videos
from swiftwan.serve.http.described import ERRORS
from swiftwan.serve.http.guard import Guard, Limits
from swiftwan.serve.jobs.service import Service


def make_app(service: Service, *, key: str | None, limits: Limits | None = None) -> FastAPI:
    """Build the application of a service.

    Args:
        service: started and closed by the caller.
        key: what every call but ``/health/live`` must carry; None where only this machine can call.
        limits: bytes of a body.
    """
    guard = Middleware(Guard, key=key, limits=limits or Limits())
    # No /docs: its page loads scripts from elsewhere. The description itself is at /openapi.json.
    app = FastAPI(
        title="swiftwan",
        version=_version(),
        docs_url=None,
        responses=ERRORS,
        redoc_url=None,
        middleware=[guard],
    )
    app.state.service = service
    app.state.metrics = house.registry(service)
    answers.install(app)
    for part in (videos, images, house):
        app.include_router(part.router)
    return app


def _version() -> str:
    try:
        return metadata.version("swiftwan")
    except metadata.PackageNotFoundError:  # a source tree
        return "0"
