"""Jobs as pieces of the page. Every text of a user is escaped."""

from __future__ import annotations

import time
from collections.abc import Mapping
from html import escape
from typing import Any

from swiftwan.serve.jobs.job import Job
from swiftwan.serve.jobs.service import Service
from swiftwan.serve.page.hardware import Reading


def stage(service: Service, job: Job | None) -> str:
    """The video, or what is seen of it so far, with its progress."""
    if job is None:
        return '<div class="stage"><p>Your video appears here.</p></div>'
    return _picture(service, job) + _progress(service, job)


def _picture(service: Service, job: Job) -> str:
    prompt = escape(job.request["prompt"], quote=True)
    if job.state == "completed":
        if "image" in job.files:
            inner = f'<img src="/v1/images/{job.id}/content" alt="{prompt}">'
        else:
            inner = (
                f'<video src="/v1/videos/{job.id}/content" controls autoplay loop muted playsinline '
                f'aria-label="{prompt}"></video>'
            )
    elif job.state == "in_progress" and service.folder.path(service.folder.preview(job)).exists():
        source = f"/v1/videos/{job.id}/preview?step={job.step}"
        inner = f'<img class="preview" src="{source}" alt="Preview of: {prompt}">'
    elif job.ended:
        inner = f'<p class="wrong">{escape(job.error_message or job.state)}</p>'
    else:
        inner = f"<p>{escape(_waiting(service, job))}</p>"
    return f'<div class="stage">{inner}</div>'


def _waiting(service: Service, job: Job) -> str:
    position = service.store.position(job)
    if position is None:
        return "The model is being loaded." if job.phase == "load" else "The first picture comes with the second step."
    ahead = "next in the queue" if position == 0 else f"{position} ahead in the queue"
    wait_s = service.wait_s(job)
    return ahead.capitalize() + (f", about {seconds(wait_s)}." if wait_s else ".")


def _progress(service: Service, job: Job) -> str:
    told = [f"<b>{job.state.replace('_', ' ')}</b>"]
    if job.state == "in_progress":
        told.append(f"{job.phase} {job.step} of {job.steps}" if job.steps else job.phase)
        if job.eta_s is not None:
            told.append(f"{seconds(job.eta_s)} left")
    elif job.state == "completed" and job.finished_at and job.started_at:
        told.append(f"{seconds(job.finished_at - job.started_at)}")
    request = job.request
    told += [f"{request['width']}x{request['height']}, {request['num_frames']} frames", f"seed {request['seed']}"]
    bar = (
        f'<div class="bar" role="progressbar" aria-label="Progress" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{job.progress}"><div style="width:{job.progress}%"></div></div>'
    )
    spans = "".join(f"<span>{part}</span>" for part in told)
    return f'{bar}<div class="told" role="status">{spans}</div>'


def facts(values: Mapping[str, Any]) -> str:
    """Names and values; a dash for what is not known."""
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape('–' if value is None else str(value))}</dd>"
        for name, value in values.items()
    )
    return f'<dl class="facts">{rows}</dl>'


def hardware(device: str, reading: Reading | None) -> str:
    now = reading or Reading(0)
    return facts(
        {
            "Device": device,
            "Memory used": _unit(now.used_gb, "GB"),
            "Memory free": _unit(now.free_gb, "GB"),
            "Busy": _unit(now.busy_percent, "%"),
            "Temperature": _unit(now.celsius, "°C"),
            "Power": _unit(now.watts, "W"),
        }
    )


def efficiency(job: Job | None) -> str:
    record = job.record if job is not None else {}
    steps, total = record.get("step_seconds") or [], record.get("seconds", {}).get("total")
    later = steps[1:] or steps
    return facts(
        {
            "First step (warm-up)": seconds(steps[0]) if steps else None,
            "A step": seconds(sum(later) / len(later)) if later else None,
            "Text": seconds(record["seconds"].get("text")) if record else None,
            "Denoising": seconds(record["seconds"].get("denoise")) if record else None,
            "Decoding": seconds(record["seconds"].get("decode")) if record else None,
            "Latency": seconds(total),
            "Throughput": f"{job.request['num_frames'] / total:.2f} frames/s" if job is not None and total else None,
        }
    )


def others(service: Service, job: Job | None) -> str:
    record = job.record if job is not None else {}
    peak = record.get("peak_bytes")
    return facts(
        {
            "Model": service.settings.model,
            "Queue": f"{service.store.counts()['queued']} waiting",
            "Server": service.readiness.lower().replace("_", " "),
            "Peak memory": f"{peak / 2**30:.2f} GiB" if peak else None,
            "Number format": record.get("dtype"),
            "Plan": " ".join(record["plan"]) or "plain" if record else None,
            "torch": record.get("versions", {}).get("torch"),
        }
    )


def title(job: Job) -> str:
    """One line for a list."""
    at = time.strftime("%H:%M:%S", time.localtime(job.created_at))
    return f"{at} · {job.state.replace('_', ' ')} · seed {job.request['seed']} · {job.request['prompt'][:60]}"


def pair(one: Job | None, other: Job | None) -> str:
    """Two videos side by side with what they took."""
    return f'<div class="pair">{"".join(_side(job) for job in (one, other))}</div>'


def _side(job: Job | None) -> str:
    if job is None or job.state != "completed" or "video" not in job.files:
        return '<div class="stage"><p>Choose a finished video.</p></div>'
    label = escape(title(job), quote=True)
    return (
        f'<div><video class="compared" src="/v1/videos/{job.id}/content" controls loop muted playsinline '
        f'aria-label="{label}"></video><p>{label}</p>{efficiency(job)}</div>'
    )


def seconds(value: float | None) -> str:
    if value is None:
        return "–"
    if value < 1:
        return f"{value * 1000:.0f} ms"
    return f"{value:.1f} s" if value < 90 else f"{value / 60:.1f} min"


def _unit(value: float | None, unit: str) -> str | None:
    return None if value is None else f"{value:.1f} {unit}"
