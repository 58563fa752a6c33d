"""What those who run a server ask: is it well, how long is the queue, what does it do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from swiftwan.serve.http.shapes import public_name, video
from swiftwan.serve.http.videos import Desk
from swiftwan.serve.jobs.service import Service

router = APIRouter()


@router.get("/health/live")
def live() -> dict[str, str]:
    """The process answers; the one route without a key."""
    return {"status": "live"}


@router.get("/health/ready")
def ready(service: Desk) -> JSONResponse:
    """Whether a job would be taken: READY or BUSY, else 503."""
    status = service.readiness
    workers = [
        {"name": slot.settings.name, "state": slot.state, "restarts": slot.restarts}
        for slot in service.supervisor.slots
    ]
    fine = status in ("READY", "BUSY")
    return JSONResponse({"status": status, "workers": workers}, 200 if fine else 503)


@router.get("/v1/models")
def models(service: Desk) -> dict[str, Any]:
    """The models that can be asked for, the one that is loaded at the start first."""
    names = map(public_name, service.models)
    told = [{"id": name, "object": "model", "created": 0, "owned_by": "swiftwan"} for name in names]
    return {"object": "list", "data": told}


@router.post("/v1/models/reload")
def reload(service: Desk) -> dict[str, bool]:
    """Have every worker load its model anew for its next job: weights or libraries on the disk have changed."""
    service.supervisor.reload()
    return {"reloaded": True}


@router.get("/v1/queue")
def queue(service: Desk) -> dict[str, Any]:
    """What runs and what waits, in order."""
    store = service.store
    return {
        "paused": store.paused,
        "limit": store.limit,
        "counts": store.counts(),
        "running": [video(service, job) for job in store.running()],
        "waiting": [video(service, job) for job in store.queue()],
    }


@router.post("/v1/queue/pause")
def pause(service: Desk) -> dict[str, bool]:
    """Start no more jobs; those that run go on."""
    service.store.pause(paused=True)
    return {"paused": True}


@router.post("/v1/queue/resume")
def resume(service: Desk) -> dict[str, bool]:
    """Start jobs again."""
    service.store.pause(paused=False)
    return {"paused": False}


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(request: Request) -> Response:
    """Numbers for Prometheus, read from the queue when asked, so that a restart keeps them."""
    return Response(generate_latest(request.app.state.metrics), media_type=CONTENT_TYPE_LATEST)


def registry(service: Service) -> CollectorRegistry:
    """The metrics of one service; the process-wide registry stays untouched."""
    made = CollectorRegistry()
    made.register(_Numbers(service))
    return made


class _Numbers(Collector):
    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterator[Metric]:
        store, slots = self.service.store, self.service.supervisor.slots
        jobs = GaugeMetricFamily("swiftwan_jobs", "Jobs that the queue holds, by state.", labels=["state"])
        for state, count in store.counts().items():
            jobs.add_metric([state], count)
        yield jobs
        count, seconds = store.seconds_of_jobs()
        yield SummaryMetricFamily("swiftwan_job_seconds", "Time of completed jobs.", count, seconds)
        yield GaugeMetricFamily("swiftwan_queue_limit", "Jobs that may wait.", store.limit)
        yield GaugeMetricFamily("swiftwan_queue_paused", "1 while no job is started.", int(store.paused))
        workers = GaugeMetricFamily("swiftwan_worker_up", "1 for a worker that can work.", labels=["worker"])
        restarts = CounterMetricFamily("swiftwan_worker_restarts", "Times a worker was replaced.", labels=["worker"])
        for slot in slots:
            workers.add_metric([slot.settings.name], int(slot.state in ("ready", "busy")))
            restarts.add_metric([slot.settings.name], slot.restarts)
        yield from (workers, restarts)

    def describe(self) -> Iterator[Metric]:
        return iter(())
