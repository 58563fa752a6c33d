"""``/v1/images``: pictures, answered when they are done, as OpenAI's clients expect."""

from __future__ import annotations

import asyncio
import base64
import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse

from swiftwan.serve.http.answers import ApiError, wrong_field
from swiftwan.serve.http.asked import Body
from swiftwan.serve.http.described import pictures_body
from swiftwan.serve.http.shapes import wan
from swiftwan.serve.http.videos import Brought, Desk, enqueue, send_file
from swiftwan.serve.jobs.job import Job
from swiftwan.serve.jobs.service import Service
from swiftwan.serve.jobs.store import UnknownJobError

router = APIRouter(prefix="/v1/images")

MAX_IMAGES = 10
WAIT_S = 600.0

_STATUS = {"invalid_request": 400, "disk_full": 507, "cancelled": 409}


@router.post("/generations", openapi_extra=pictures_body())
async def generations(call: Request, body: Brought, service: Desk) -> dict[str, Any]:
    """Pictures from words."""
    return await _pictures(call, service, body)


@router.post("/edits", openapi_extra=pictures_body())
async def edits(call: Request, body: Brought, service: Desk) -> dict[str, Any]:
    """A picture from a picture, or from several blended."""
    if not body.uploads:
        raise wrong_field("image", "image is missing; send it as a file.")
    return await _pictures(call, service, body)


@router.get("/{job_id}/content", response_class=FileResponse)
def content(job_id: str, service: Desk) -> FileResponse:
    """The picture."""
    if not job_id.startswith("image_"):
        raise UnknownJobError("there is no such picture.")
    return send_file(service, job_id, "image")


async def _pictures(call: Request, service: Service, body: Body) -> dict[str, Any]:
    said = dict(body.said)
    count, kind = said.pop("n", 1), said.pop("response_format", "b64_json")
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_IMAGES:
        raise wrong_field("n", f"n is {count!r}; 1 to {MAX_IMAGES} pictures a call.")
    if kind not in ("b64_json", "url"):
        raise wrong_field("response_format", "response_format must be b64_json or url.")
    seed = said.get("seed")
    jobs: list[Job] = []
    try:
        for number in range(count):
            mine = said if not isinstance(seed, int) else said | {"seed": seed + number}
            jobs.append(await run_in_threadpool(enqueue, service, Body(mine, body.uploads), picture=True))
        ended = [await _ended(call, service, job) for job in jobs]
    except BaseException:  # a client that left, or a full queue: nobody waits for these any more
        for job in jobs:
            service.store.cancel(job.id)
        raise
    return {
        "created": int(time.time()),
        "data": [await run_in_threadpool(_told, service, job, kind) for job in ended],
    }


async def _ended(call: Request, service: Service, job: Job) -> Job:
    """Wait for a picture.

    Raises:
        ApiError: it failed, or takes too long.
    """
    end = time.monotonic() + WAIT_S
    while not (job := await run_in_threadpool(service.store.get, job.id)).ended:
        if await call.is_disconnected() or time.monotonic() > end or not service.admitting:
            raise ApiError(503, "the picture was not done in time.", code="timeout", headers={"Retry-After": "10"})
        await asyncio.sleep(0.05)
    if job.state != "completed":
        code = job.error_code or "internal"
        raise ApiError(_STATUS.get(code, 500), job.error_message or "the picture failed.", code=code)
    return job


def _told(service: Service, job: Job, kind: str) -> dict[str, Any]:
    more = {"revised_prompt": None, "wan": {"id": job.id} | wan(service, job)}
    if kind == "url":
        return {"url": f"/v1/images/{job.id}/content"} | more
    data = service.folder.path(job.files["image"]).read_bytes()
    return {"b64_json": base64.b64encode(data).decode()} | more
