"""Jobs as clients see them: OpenAI's video object, with what it has no word for under ``wan``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swiftwan.serve.jobs.admission import FILE_FIELDS
from swiftwan.serve.jobs.job import Job
from swiftwan.serve.jobs.service import Service

_STATUS = {"cancelled": "failed"}  # OpenAI knows no cancelled; its SDK would refuse the word


def public_name(model: str) -> str:
    """A model's name without the folders before it."""
    return Path(model).name if Path(model).is_absolute() else model


def video(service: Service, job: Job) -> dict[str, Any]:
    """A job as OpenAI's video object."""
    request = job.request
    expires = service.expires_at(job)
    frames, fps = request["num_frames"], request["fps"]
    error = None if job.error_code is None else {"code": job.error_code, "message": job.error_message}
    return {
        "id": job.id,
        "object": "video",
        "model": public_name(job.model),
        "status": _STATUS.get(job.state, job.state),
        "progress": job.progress,
        "created_at": int(job.created_at),
        "completed_at": int(job.finished_at) if job.state == "completed" and job.finished_at else None,
        "expires_at": None if expires is None else int(expires),
        "error": error,
        "prompt": request["prompt"],
        "seconds": f"{frames / fps:g}",
        "size": f"{request['width']}x{request['height']}",
        "remixed_from_video_id": None,
        "wan": wan(service, job),
    }


def wan(service: Service, job: Job) -> dict[str, Any]:
    """What a job was asked, where it is and what it took; nothing of where its files lie."""
    asked = {name: value for name, value in job.request.items() if name not in (*FILE_FIELDS, "prompt")}
    kind = "images" if job.id.startswith("image_") else "videos"
    wait_s, record = service.wait_s(job), job.record
    return asked | {
        "plan": job.plan,
        "state": job.state,
        "phase": job.phase or None,
        "step": job.step,
        "steps": job.steps,
        "eta_s": _rounded(job.eta_s),
        "queue_position": service.store.position(job),
        "wait_s": _rounded(wait_s),
        "attempt": job.attempt,
        "stage_durations": {stage: round(seconds, 4) for stage, seconds in record.get("seconds", {}).items()} or None,
        "step_seconds": record.get("step_seconds"),
        "peak_memory_mb": round(record["peak_bytes"] / 2**20, 1) if "peak_bytes" in record else None,
        "sha256": record.get("sha256"),
        "preview_url": f"/v1/videos/{job.id}/preview" if job.state == "in_progress" else None,
        "content_url": f"/v1/{kind}/{job.id}/content" if job.state == "completed" and not job.expired else None,
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 2)
