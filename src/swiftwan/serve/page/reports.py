"""Reports of benchmarks: what ``swiftwan bench MATRIX --out DATA/benchmarks/NAME`` left in the server's folder."""

from __future__ import annotations

import re
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

from swiftwan.serve.http.answers import ApiError
from swiftwan.serve.http.videos import MEDIA_TYPES, Desk

router = APIRouter()

PAGE = "report.html"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_TYPES = MEDIA_TYPES | {".html": "text/html; charset=utf-8"}


def found(root: Path) -> list[str]:
    """Names of the reports in a server's folder, the newest first."""
    pages = [page for page in (root / "benchmarks").glob(f"*/{PAGE}") if _NAME.fullmatch(page.parent.name)]
    return [page.parent.name for page in sorted(pages, key=lambda page: page.stat().st_mtime, reverse=True)]


@router.get("/benchmarks/{name}/{path:path}", include_in_schema=False)
def file(name: str, path: str, service: Desk) -> FileResponse:
    """A report, or a video or picture beside it."""
    folder = service.folder.root / "benchmarks" / name
    whole = folder / path
    fine = all(map(_NAME.fullmatch, [name, *path.split("/")])) and whole.suffix in _TYPES
    if not fine or not whole.is_file() or not whole.resolve().is_relative_to(folder.resolve()):
        raise ApiError(404, "there is no such report.", code="not_found")
    return FileResponse(whole, media_type=_TYPES[whole.suffix])


def frame(name: str | None) -> str:
    """A report inside the page, or how to make one."""
    if not name:
        return (
            '<p class="note">No report yet. <code>swiftwan bench pocket --out DATA/benchmarks/pocket</code> '
            "makes one, DATA being the folder that this server was started with.</p>"
        )
    assert _NAME.fullmatch(name), name
    return f'<iframe class="report" src="/benchmarks/{name}/{PAGE}" title="Benchmark report {name}"></iframe>'
