"""The page: a viewer of the queue. It holds nothing: closing it loses nothing, and another browser sees the same.

A click only queues a job and remembers its id; a timer shows what the queue says of it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from swiftwan.errors import PlanError, RequestError, SwiftwanError
from swiftwan.measure.hardware import HardwareSampler, ProcessReader, Sample, gpu_readers
from swiftwan.measure.missing import Missing
from swiftwan.pipelines.request import request_from_json
from swiftwan.serve.http.asked import Body, model_named
from swiftwan.serve.http.shapes import public_name
from swiftwan.serve.http.uploads import Upload
from swiftwan.serve.http.videos import enqueue
from swiftwan.serve.jobs.admission import Admission, check_plan_of_client, stand_in
from swiftwan.serve.jobs.job import ENDED, Job
from swiftwan.serve.jobs.service import Service
from swiftwan.serve.jobs.store import UnknownJobError
from swiftwan.serve.page import layout, reports, show
from swiftwan.serve.page.accuracy import Accuracy
from swiftwan.serve.page.inputs import CHOSEN, FILES, Inputs, from_request
from swiftwan.serve.page.record import read_settings
from swiftwan.serve.page.techniques import refused_beside
from swiftwan.serve.page.theme import css, theme

SHOWN = 60
KEPT_READINGS = 300
"""Five minutes, one a second."""


def mount(app: FastAPI, service: Service) -> FastAPI:
    """Put the page at the root of the server's application; the guard stands before it too."""
    uploads = service.folder.root / "uploads"
    uploads.mkdir(mode=0o700, exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)  # gradio knows no other way; its own would be open to other users
    page = Page(service)
    app.include_router(reports.router)
    return gr.mount_gradio_app(
        app,
        layout.build(page),
        path="/",
        theme=theme(),
        css=css(),
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        max_file_size="256mb",
    )


class Page:
    """What the components call. All state is the service's."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.device = service.admission().device.name
        self.models = [public_name(model) for model in service.models]
        self.accuracy = Accuracy(service.folder)
        self.hardware = _sampler(service)
        self.hardware.__enter__()  # for as long as the process lives; its thread ends with it

    def admission(self, model: str) -> Admission:
        return self.service.admission(model_named(model or None, self.service.models))

    # From the inputs to a job

    def explain(self, *values: Any) -> str:
        """What the run would take, or why it cannot be; told before any click."""
        inputs = Inputs(*values)
        try:
            admission = self.admission(inputs.model)
            said = inputs.said(admission.facts.known, admission.facts.grid)
            plan = check_plan_of_client(said.pop("plan")) if "plan" in said else None
            del said["model"]
            said["prompt"] = said["prompt"].strip() or "a prompt"
            request = request_from_json(said | _placeholders(inputs.task))
            explanation = admission.check(stand_in(request, ()), plan)
        except SwiftwanError as problem:
            return show.wrong(problem)
        load = explanation.load
        rate = self.service.store.seconds_per_tflop()
        return show.explained(
            explanation,
            None if rate is None else rate * load.forwards * load.tflop_per_forward,
            self.service.wait_for_new_s(),
            refused_beside(inputs.techniques, admission) if inputs.plan == CHOSEN else {},
        )

    def generate(self, files: Mapping[str, Sequence[str]], *values: Any) -> str:
        """Queue a job; return its id."""
        inputs = Inputs(*values)
        try:
            admission = self.admission(inputs.model)
            said = inputs.said(admission.facts.known, admission.facts.grid)
            with ExitStack() as stack:
                uploads = tuple(
                    Upload(field, stack.enter_context(Path(path).open("rb")))
                    for field in FILES.get(inputs.task, ())
                    for path in files.get(field, ())
                )
                return enqueue(self.service, Body(said, uploads), picture=inputs.picture).id
        except SwiftwanError as problem:
            raise told(problem) from None

    # What is done to jobs

    def cancel(self, job_id: str) -> None:
        if self.job(job_id) is not None:
            self.service.store.cancel(job_id)

    def delete(self, job_id: str) -> str:
        """Remove a job; return the one to show then."""
        if self.job(job_id) is not None:
            self.service.delete(job_id)
        return self.newest()

    def again(self, job_id: str) -> str:
        """Queue the same request with a new seed; return the new job's id."""
        job = self.job(job_id)
        if job is None:
            return ""
        request = replace(self.service.request_of(job), seed=None)
        folder = self.service.folder
        inputs: list[str] = []
        try:
            if job.inputs:  # files of its own: the first job may be deleted before the second runs
                if job.expired:
                    raise RequestError("the images of this job have expired; choose them again.")
                inputs = [folder.copy_input(name) for name in job.inputs]
                request = _with_files(request, dict(zip(job.inputs, inputs, strict=True)))
            made, _ = self.service.submit(request, model=job.model, plan=job.plan, inputs=inputs)
        except SwiftwanError as problem:
            folder.remove(inputs)
            raise told(problem) from None
        return made.id

    def retry(self, job_id: str) -> str:
        """Queue a failed or cancelled job again; return its id."""
        try:
            return self.service.store.retry(job_id).id
        except SwiftwanError as problem:
            raise told(problem) from None

    def move(self, job_id: str, act: str) -> None:
        """Bring a waiting job forward: ``first``, or ``up`` by one."""
        job = self.job(job_id)
        position = self.service.store.position(job) if job is not None else None
        if position:
            self.service.store.move(job_id, 0 if act == "first" else position - 1)

    def pause(self) -> None:
        self.service.store.pause(paused=not self.service.store.paused)

    # Settings

    def settings_of_job(self, job_id: str) -> Inputs | None:
        job = self.job(job_id)
        return None if job is None else from_request(job.request, job.plan, public_name(job.model))

    def settings_of_file(self, path: str) -> Inputs:
        """What made a file that swiftwan wrote.

        Raises:
            gr.Error: it carries no settings.
        """
        try:
            record = read_settings(Path(path))
            request = request_from_json(record["request"]).to_json()
            named = public_name(str(record.get("model")))
            return from_request(request, record.get("plan") or [], named if named in self.models else self.models[0])
        except SwiftwanError as problem:
            raise told(problem) from None
        except (KeyError, TypeError):
            raise gr.Error("the settings in this file are not complete.", print_exception=False) from None

    # What is shown

    def job(self, job_id: str) -> Job | None:
        try:
            return self.service.store.get(job_id) if job_id else None
        except UnknownJobError:
            return None

    def newest(self) -> str:
        """The job to show to a browser that has just come."""
        running = self.service.store.running()
        jobs = running or self.service.store.page(limit=1)[0]
        return jobs[0].id if jobs else ""

    def refresh(self, job_id: str) -> tuple[str, ...]:
        """Everything that changes by itself; in the order of the components that show it."""
        job = self.job(job_id)
        reference = self.reference_of(job) if job is not None else None
        values = self.accuracy.look(job, reference) if job is not None and _has_result(job) else {}
        return (
            show.header(self.service, job.model if job else self.service.settings.model, self.device),
            show.stage(self.service, job),
            show.announcement(job),
            show.hardware(self.readings()),
            show.efficiency(job),
            show.accuracy(job, reference, values),
            show.others(self.service, job),
            show.queue(self.service),
        )

    def readings(self) -> list[tuple[str, Sequence[Sample]]]:
        names = [slot.settings.name for slot in self.service.supervisor.slots]
        return list(zip(names, self.hardware.seen(), strict=False)) or [(names[0], ())]

    def reference_of(self, job: Job) -> Job | None:
        """The plain run of the same request, if there is one."""
        if not _has_result(job) or not job.record.get("plan"):
            return None
        for other in self.ended(200):
            if other.request == job.request and other.model == job.model and not other.record.get("plan", True):
                return other
        return None

    def ended(self, limit: int = SHOWN) -> list[Job]:
        """Ended jobs, the newest first."""
        return self.service.store.page(limit=limit, states=ENDED)[0]

    def gallery(self) -> str:
        return show.gallery(self.ended())

    def choices(self) -> list[tuple[str, str]]:
        """Finished videos by their titles."""
        return [(show.title(job), job.id) for job in self.ended() if _has_result(job) and "video" in job.files]

    def pair(self, left: str | None, right: str | None) -> str:
        one, other = self.job(left or ""), self.job(right or "")
        alike = one is not None and other is not None and _shape(one) == _shape(other) and one.id != other.id
        values = self.accuracy.look(other, one) if alike and other is not None else {}
        return show.pair(one, other, values)


def told(problem: SwiftwanError) -> gr.Error:
    return gr.Error(str(problem), print_exception=False, duration=None if isinstance(problem, PlanError) else 10)


def _has_result(job: Job) -> bool:
    return job.state == "completed" and not job.expired


def _shape(job: Job) -> tuple[int, ...]:
    return tuple(job.request[side] for side in ("num_frames", "height", "width"))


def _sampler(service: Service) -> HardwareSampler:
    """Of the workers' devices; GPUs through NVML by what the workers told, so that this process needs no CUDA."""
    slots = service.supervisor.slots
    readers = gpu_readers([slot.gpu for slot in slots if slot.gpu])
    if isinstance(readers, Missing) or not readers:
        readers = [ProcessReader(lambda slot=slot: slot.process and slot.process.pid) for slot in slots]  # type: ignore[misc]
    return HardwareSampler(readers, interval_seconds=1.0, kept=KEPT_READINGS)


def _placeholders(task: str) -> dict[str, Any]:
    """Names where files will be: what a run takes does not depend on what is in them."""
    fields = {name for name in FILES.get(task, ()) if name != "last_image"}
    return {name: ["-", "-"] if name == "images" else "-" for name in fields}


def _with_files(request: Any, names: Mapping[str, str]) -> Any:
    """The same request with files of other names."""
    told = request.to_json()
    for field in ("image", "last_image", "video"):
        if field in told:
            told[field] = names[told[field]]
    if "images" in told:
        told["images"] = [names[name] for name in told["images"]]
    return request_from_json(told)
