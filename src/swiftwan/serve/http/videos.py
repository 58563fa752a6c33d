"""``/v1/videos``: create, look, list, fetch, follow, stop, delete."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, ConfigDict

from swiftwan.serve.http.answers import ApiError
from swiftwan.serve.http.asked import Asked, Body, model_named, read_body, understand
from swiftwan.serve.http.described import video_body
from swiftwan.serve.http.shapes import public_name, video
from swiftwan.serve.jobs.admission import stand_in
from swiftwan.serve.jobs.job import Job
from swiftwan.serve.jobs.service import Service, fingerprint
from swiftwan.serve.jobs.store import UnknownJobError

router = APIRouter(prefix="/v1/videos")

MEDIA_TYPES = {".mp4": "video/mp4", ".png": "image/png", ".webp": "image/webp", ".jpg": "image/jpeg"}

_FOLLOW_S = 0.25


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Desk = Annotated[Service, Depends(service_of)]
Brought = Annotated[Body, Depends(read_body)]
Key = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=255)]


def existing(job_id: str, service: Desk) -> Job:
    """A job, looked up before a stream begins: afterwards it is too late for a 404."""
    return service.store.get(job_id)


def ask(service: Service, body: Body, *, picture: bool) -> Asked:
    """Understand a body as the model that it names can; without a name it is the server's first."""
    model = model_named(body.said.get("model"), service.models)
    fps = service.admission(model).facts.known.defaults.fps
    return understand(body, model=model, fps=fps, picture=picture, folder=service.folder)


def enqueue(service: Service, body: Body, *, picture: bool, key: str | None = None) -> Job:
    """Understand a body and queue it; its files go again if it is not taken, or was already there."""
    asked = ask(service, body, picture=picture)
    new = False
    try:
        told = fingerprint(body.said, (chunk for upload in body.uploads for chunk in upload.chunks()))
        job, new = service.submit(
            asked.request,
            model=asked.model,
            plan=asked.plan,
            inputs=asked.inputs,
            sizes=asked.sizes,
            key=key,
            fingerprint=told,
        )
    finally:
        if not new:
            service.folder.remove(asked.inputs)
    return job


@router.post("", openapi_extra=video_body())
def create(body: Brought, service: Desk, key: Key = None) -> dict[str, Any]:
    """Queue a video; JSON or a form."""
    return video(service, enqueue(service, body, picture=False, key=key))


@router.post("/explain", openapi_extra=video_body())
def explain(body: Brought, service: Desk) -> dict[str, Any]:
    """Say what a video would take, and whether it fits; queue nothing."""
    asked = ask(service, body, picture=False)
    service.folder.remove(asked.inputs)
    admission = service.admission(asked.model)
    explanation = admission.explain(stand_in(asked.request, asked.sizes), asked.plan)
    fits = explanation.load.peak_bytes <= admission.device.total_bytes
    model = public_name(asked.model)
    return explanation.to_json() | {"model": model, "lines": explanation.lines(), "fits": fits}


@router.get("")
def page(
    service: Desk,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """List videos by arrival."""
    jobs, more = service.store.page(prefix="video", after=after, limit=limit, order=order)
    ids = [job.id for job in jobs]
    return {
        "object": "list",
        "data": [video(service, job) for job in jobs],
        "has_more": more,
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
    }


@router.get("/{job_id}")
def look(job_id: str, service: Desk) -> dict[str, Any]:
    """Show one job."""
    return video(service, service.store.get(job_id))


@router.delete("/{job_id}")
def delete(job_id: str, service: Desk) -> dict[str, Any]:
    """Remove a job and its files; one that runs is stopped within its step."""
    service.delete(job_id)
    return {"id": job_id, "deleted": True, "object": "video.deleted"}


@router.get("/{job_id}/content", response_class=FileResponse)
def content(
    job_id: str, service: Desk, variant: Literal["video", "thumbnail", "spritesheet"] = "video"
) -> FileResponse:
    """The finished file, ranges included."""
    return send_file(service, job_id, "image" if variant == "video" and job_id.startswith("image_") else variant)


def send_file(service: Service, job_id: str, variant: str) -> FileResponse:
    """A variant of a finished job.

    Raises:
        ApiError: 409: it is not finished; 410: its files have expired.
    """
    job = service.store.get(job_id)
    if job.state != "completed":
        raise ApiError(409, f"this job is {job.state}; its content is there once it is completed.", code="not_ready")
    if job.expired:
        raise ApiError(
            410, "the files of this job have expired; its record has the seed to make it anew.", code="expired"
        )
    path = service.folder.path(job.files[variant])
    return FileResponse(path, media_type=MEDIA_TYPES[path.suffix], filename=f"{job.id}.{variant}{path.suffix}")


@router.get("/{job_id}/preview", response_class=FileResponse)
def preview(job_id: str, service: Desk) -> FileResponse:
    """A picture of what is being made."""
    path = service.folder.path(service.folder.preview(service.store.get(job_id)))
    if not path.exists():
        raise ApiError(404, "there is no preview yet; the first comes with the second step.", code="not_found")
    return FileResponse(path, media_type="image/jpeg")


@router.get("/{job_id}/events", response_class=EventSourceResponse)
async def events(job: Annotated[Job, Depends(existing)], service: Desk) -> AsyncIterator[ServerSentEvent]:
    """Follow a job: ``progress`` whenever it changes, then ``done``."""
    told: dict[str, Any] | None = None
    while True:
        try:
            job = await run_in_threadpool(service.store.get, job.id)
        except UnknownJobError:
            yield ServerSentEvent(event="done", data={"id": job.id, "deleted": True})
            return
        now = await run_in_threadpool(video, service, job)
        if job.ended:
            yield ServerSentEvent(event="done", data=now)
            return
        if now != told:
            told = now
            yield ServerSentEvent(event="progress", data=now)
        if not service.admitting:  # a server that stops must not wait for its listeners
            return
        await asyncio.sleep(_FOLLOW_S)


@router.post("/{job_id}/cancel")
def cancel(job_id: str, service: Desk) -> dict[str, Any]:
    """Stop a job and keep its record."""
    return video(service, service.store.cancel(job_id))


@router.post("/{job_id}/retry")
def retry(job_id: str, service: Desk) -> dict[str, Any]:
    """Queue a failed or cancelled job again."""
    service.admission()
    return video(service, service.store.retry(job_id))


class Position(BaseModel):
    model_config = ConfigDict(extra="forbid")

    position: int


@router.post("/{job_id}/move")
def move(job_id: str, to: Position, service: Desk) -> dict[str, Any]:
    """Put a waiting job at a position of the queue; 0 runs next."""
    return video(service, service.store.move(job_id, to.position))
