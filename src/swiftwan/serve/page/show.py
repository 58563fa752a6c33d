"""Jobs as pieces of the page. Every text of a user is escaped."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from swiftwan.measure.hardware import Reading, Sample
from swiftwan.plan import Explanation, Load
from swiftwan.serve.http.shapes import public_name
from swiftwan.serve.jobs.job import Job
from swiftwan.serve.jobs.service import Service
from swiftwan.serve.page import chart

# The job on the stage


def stage(service: Service, job: Job | None) -> str:
    """The video, or what is seen of it so far, with its progress."""
    if job is None:
        return '<div class="stage"><p>Your video appears here.</p></div>'
    return _picture(service, job) + _progress(service, job)


def _picture(service: Service, job: Job) -> str:
    prompt = escape(job.request["prompt"], quote=True)
    if job.expired:
        inner = "<p>The files of this job have expired. Its settings are kept.</p>"
    elif job.state == "completed" and "image" in job.files:
        inner = f'<img src="/v1/images/{job.id}/content" alt="{prompt}">'
    elif job.state == "completed":
        inner = (
            f'<video src="/v1/videos/{job.id}/content" controls autoplay loop muted playsinline '
            f'aria-label="{prompt}"></video>'
        )
    elif job.state == "in_progress" and (preview := _preview(service, job)):
        inner = f'<img class="preview" src="{preview}" alt="Preview of: {prompt}">'
    elif job.ended:
        inner = f'<p class="wrong">{escape(job.error_message or job.state)}</p>'
    else:
        inner = f"<p>{escape(_waiting(service, job))}</p>"
    shape = f"aspect-ratio:{job.request['width']}/{job.request['height']}"
    return f'<div class="stage" style="{shape}">{inner}</div>'


def _preview(service: Service, job: Job) -> str:
    """Inside the page: one that is fetched would flicker at each step."""
    try:
        data = service.folder.path(service.folder.preview(job)).read_bytes()
    except OSError:
        return ""
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def _waiting(service: Service, job: Job) -> str:
    position = service.store.position(job)
    if position is None:
        return "The model is being loaded." if job.phase == "load" else "The first picture comes with the second step."
    if service.store.paused:
        return "The queue is paused."
    ahead = "next in the queue" if position == 0 else f"{position} ahead in the queue"
    wait_s = service.wait_s(job)
    return ahead.capitalize() + (f", about {seconds(wait_s)}." if wait_s else ".")


def _progress(service: Service, job: Job) -> str:
    request = job.request
    told = [f"{request['width']}x{request['height']}", _frames(request), f"seed {request['seed']}"]
    told += [f'<a href="{_content(job)}" download>Download</a>'] if job.state == "completed" and not job.expired else []
    bar = (
        f'<div class="bar {job.state}" role="progressbar" aria-label="Progress" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{job.progress}"><div style="width:{job.progress}%"></div></div>'
    )
    return bar + f'<div class="told">{state(job)}{"".join(f"<span>{part}</span>" for part in told)}</div>'


def state(job: Job) -> str:
    """Where a job is, in a few words."""
    told = [f'<b class="state {job.state}">{job.state.replace("_", " ")}</b>']
    if job.state == "in_progress":
        told.append(f"{job.phase} {job.step} of {job.steps}" if job.steps else job.phase)
        if job.eta_s is not None:
            told.append(f"{seconds(job.eta_s)} left")
    elif job.state == "completed" and job.finished_at and job.started_at:
        told.append(f"in {seconds(job.finished_at - job.started_at)}")
    return "".join(part if part.startswith("<b") else f"<span>{part}</span>" for part in told)


def announcement(job: Job | None) -> str:
    """What a screen reader hears: only what changes seldom."""
    return "" if job is None else escape(f"{job.state.replace('_', ' ')}: {job.request['prompt'][:80]}")


def header(service: Service, model: str, device: str) -> str:
    ready = service.readiness
    counts = service.store.counts()
    waiting = f"{counts['queued']} waiting" + (", paused" if service.store.paused else "")
    chips = (
        f'<span class="chip">{escape(public_name(model))}</span><span class="chip">{escape(device)}</span>'
        f'<span class="chip {ready.lower()}"><i></i>{ready.lower().replace("_", " ")}</span>'
        f'<span class="chip">{waiting}</span>'
    )
    return f'<div class="banner"><h1>swift<em>wan</em></h1><div class="chips">{chips}</div></div>'


# The panels beside it


def facts(values: Mapping[str, Any]) -> str:
    """Names and values; a dash for what is not known."""
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape('–' if value is None else str(value))}</dd>"
        for name, value in values.items()
    )
    return f'<dl class="facts">{rows}</dl>'


def hardware(devices: Sequence[tuple[str, Sequence[Sample]]]) -> str:
    """A table and a plot a device; its name stands above them where there are several."""
    parts = []
    for name, samples in devices:
        now = samples[-1].reading if samples else Reading()
        used = [(s.seconds, s.reading.memory_used_bytes / 1e9) for s in samples if s.reading.memory_used_bytes]
        highest = max((value for _, value in used), default=None)
        told = {
            "Memory used": _unit(now.memory_used_bytes, "GB", 1e9),
            "Memory free": _unit(now.memory_free_bytes, "GB", 1e9),
            "Utilisation": _unit(now.utilisation_percent, "%"),
            "Temperature": _unit(now.temperature_celsius, "°C"),
            "Power": _unit(now.power_watts, "W"),
        }
        said = f"Memory in use on {name}: highest {_unit(highest, 'GB')} in the time shown."
        parts.append((f"<h3>{escape(name)}</h3>" if len(devices) > 1 else "") + facts(told))
        parts.append(f"<h3>Memory in use</h3>{chart.area(used, unit='GB', said=said)}")
    return "".join(parts)


def efficiency(job: Job | None) -> str:
    record = job.record if job is not None else {}
    steps = record.get("step_seconds") or []
    return facts(times(job)) + "<h3>Time of each denoising step</h3>" + chart.bars(steps, unit="s", said=_said(steps))


def times(job: Job | None) -> dict[str, str | None]:
    """What a finished job took."""
    record = job.record if job is not None else {}
    steps, stages = record.get("step_seconds") or [], record.get("seconds", {})
    total, later = stages.get("total"), steps[1:] or steps
    return {
        "Latency": _seconds(total),
        "Throughput": f"{job.request['num_frames'] / total:.2f} frames/s" if job is not None and total else None,
        "First step (warm-up)": _seconds(steps[0] if steps else None),
        "A step": _seconds(sum(later) / len(later) if later else None),
        "Text": _seconds(stages.get("text")),
        "Denoising": _seconds(stages.get("denoise")),
        "Decoding": _seconds(stages.get("decode")),
    }


def _said(steps: Sequence[float]) -> str:
    return f"Time of {len(steps)} denoising steps, the longest {seconds(max(steps))}." if steps else ""


_METRICS = {
    "judge": ("Prompt, by the judge", "{:.0f} %"),
    "clip-score": ("CLIP score", "{:.3f}"),
    "temporal-lpips": ("LPIPS, frame to frame", "{:.3f}"),
    "lpips": ("LPIPS", "{:.4f}"),
    "psnr": ("PSNR", "{:.1f} dB"),
    "ssim": ("SSIM", "{:.4f}"),
}
_BESIDE_REFERENCE = ("lpips", "psnr", "ssim")


def accuracy(job: Job | None, reference: Job | None, values: Mapping[str, Any] | None) -> str:
    """What was measured of a finished job; what could not be says why on demand."""
    if job is None or job.state != "completed":
        return facts(dict.fromkeys((label for label, _ in _METRICS.values()), None))
    if values is None:
        return '<p class="note">Being measured …</p>'
    parts = [facts(measured(values, [name for name in _METRICS if name not in _BESIDE_REFERENCE]))]
    if reference is None:
        parts.append('<p class="note">PSNR, SSIM and LPIPS need the same request and seed run with the plan Plain.</p>')
    else:
        parts.append("<h3>Against the plain run</h3>" + facts(measured(values, _BESIDE_REFERENCE)))
    missing = [f"{_METRICS[n][0]}: {v['missing']}" for n, v in values.items() if isinstance(v, dict) and n in _METRICS]
    if missing:
        parts.append(f"<details><summary>Not measured</summary>{_list(missing)}</details>")
    return "".join(parts)


def measured(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, str | None]:
    """Metrics by their labels; None for one that could not be measured."""
    known = {name: value for name in names if isinstance(value := values.get(name), int | float)}
    return {_METRICS[name][0]: _METRICS[name][1].format(known[name]) if name in known else None for name in names}


def others(service: Service, job: Job | None) -> str:
    record = job.record if job is not None else {}
    peak = record.get("peak_bytes")
    return facts(
        {
            "Model": public_name(job.model if job is not None else service.settings.model),
            "Load time": _seconds(record.get("load_seconds")),
            "Peak memory": _gb(peak) if peak else None,
            "Number format": record.get("dtype"),
            "Plan": " ".join(record["plan"]) or "plain" if record else None,
            "torch": record.get("versions", {}).get("torch"),
        }
    )


def explained(explanation: Explanation, time_s: float | None, wait_s: float | None, refused: Mapping[str, str]) -> str:
    """What a run would take, and what cannot be added to it."""
    load, request = explanation.load, explanation.request
    fits = load.peak_bytes <= explanation.device.total_bytes
    size = f"{request.width}x{request.height}" + (f", {request.num_frames} frames" if request.num_frames != 1 else "")
    rows = [
        ("Work", f"{size}: {load.forwards} passes of {load.tokens} tokens"),
        ("Time", _time(load, time_s)),
        (
            "Memory",
            f"{_gb(load.weight_bytes)} of weights + about {_gb(load.activation_bytes)} of "
            f"{_gb(explanation.device.total_bytes)}: {'fits' if fits else 'does not fit'}",
        ),
    ]
    if wait_s:
        rows.append(("Begins", f"in about {seconds(wait_s)}"))
    table = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in rows)
    used = [f"{t.spec} ({t.kind}): {t.reason}" for t in explanation.plan.techniques]
    many = "1 technique" if len(used) == 1 else f"{len(used)} techniques"
    told = f"<details><summary>{many}</summary>{_list(used)}</details>" if used else ""
    if refused:
        lines = [f"{name}: {why}" for name, why in refused.items()]
        told += f"<details><summary>{len(refused)} cannot be added here</summary>{_list(lines)}</details>"
    return f'<div class="fine" role="status"><dl>{table}</dl>{told}</div>'


def _time(load: Load, time_s: float | None) -> str:
    """From the speed of the last jobs here, else as the planner tells it for known chips."""
    if time_s is not None:
        return f"about {seconds(time_s)}"
    if load.denoise_seconds is None or load.decode_seconds is None:
        return "known once a first job has run here"
    return f"{'at most' if load.at_most else 'about'} {seconds(load.denoise_seconds + load.decode_seconds)}"


def wrong(problem: Exception) -> str:
    return f'<div class="wrong" role="status">{escape(str(problem))}</div>'


# Lists of jobs


def queue(service: Service) -> str:
    """What runs and what waits, in order, with what can be done about it."""
    running, waiting = service.store.running(), service.store.queue()
    if not running and not waiting:
        return '<p class="note">Nothing runs and nothing waits.</p>'
    rows = [_row("▶", job, state(job), [("show", "Show"), ("cancel", "Cancel")]) for job in running]
    for place, job in enumerate(waiting, 1):
        wait_s = service.wait_s(job)
        told = f"<span>{'starts in about ' + seconds(wait_s) if wait_s else 'waits'}</span>"
        doing = [("show", "Show"), ("cancel", "Cancel")]
        if place > 1:
            doing = [("first", "First"), ("up", "Up"), *doing]
        rows.append(_row(str(place), job, told, doing))
    return f'<ul class="rows">{"".join(rows)}</ul>'


def _row(place: str, job: Job, told: str, doing: Sequence[tuple[str, str]]) -> str:
    return (
        f'<li><span class="place" aria-hidden="true">{place}</span><div class="what"><p>{escape(job.request["prompt"])}'
        f'</p><div class="told">{told}<span>{job.request["width"]}x{job.request["height"]}, {_frames(job.request)}'
        f'</span></div></div><div class="doing">{_buttons(job, doing)}</div></li>'
    )


def gallery(jobs: Sequence[Job]) -> str:
    """Ended jobs, the newest first: a picture or the reason why there is none."""
    if not jobs:
        return '<p class="note">What is finished appears here, and stays.</p>'
    return f'<ul class="cards">{"".join(map(_card, jobs))}</ul>'


def _card(job: Job) -> str:
    label = escape(title(job), quote=True)
    if job.state == "completed" and not job.expired:
        source = f"/v1/videos/{job.id}/content?variant=thumbnail"
        face = f'<img src="{source}" alt="" loading="lazy">' + ("" if "image" in job.files else "<i>▶</i>")
        doing = [("fill", "Settings"), ("again", "Again"), ("delete", "Delete")]
    else:
        why = "Its files have expired." if job.expired else job.error_message or job.state
        face = f"<span>{escape(why)}</span>"
        doing = [("fill", "Settings"), ("retry", "Retry"), ("delete", "Delete")]
        doing = doing if job.state != "completed" else [doing[0], doing[2]]
    return (
        f'<li><button class="face" data-act="show" data-job="{job.id}" aria-label="Show {label}">{face}</button>'
        f'<p>{escape(job.request["prompt"])}</p><div class="told">{state(job)}<span>{_clock(job.created_at)}</span>'
        f'<span>seed {job.request["seed"]}</span></div><div class="doing">{_buttons(job, doing)}</div></li>'
    )


def _buttons(job: Job, doing: Sequence[tuple[str, str]]) -> str:
    about = escape(job.request["prompt"][:60], quote=True)
    return "".join(
        f'<button data-act="{act}" data-job="{job.id}" aria-label="{word}: {about}">{word}</button>'
        for act, word in doing
    )


def title(job: Job) -> str:
    """One line for a list."""
    plan = " ".join(job.record.get("plan") or []) or "plain"
    return f"{_clock(job.created_at)} · {job.request['prompt'][:60]} · seed {job.request['seed']} · {plan}"


# Two beside each other


def pair(one: Job | None, other: Job | None, values: Mapping[str, Any] | None) -> str:
    """Two videos, and one table of what they took and how far the second is from the first.

    Args:
        values: of the second against the first; None while they are measured, {} for what cannot be compared.
    """
    videos = f'<div class="pair">{_side(one, "Left")}{_side(other, "Right")}</div>'
    if one is None or other is None:
        return videos
    left, right = (
        times(job) | {"Peak memory": _unit(job.record.get("peak_bytes"), "GB", 1e9), "Seed": job.request["seed"]}
        for job in (one, other)
    )
    rows = "".join(
        f'<tr><th scope="row">{name}</th><td>{left[name] or "–"}</td><td>{right[name] or "–"}</td></tr>'
        for name in left
    )
    told = measured(values, _BESIDE_REFERENCE) if values else {}
    rows += "".join(
        f'<tr><th scope="row">{n}, right to left</th><td></td><td>{v or "–"}</td></tr>' for n, v in told.items()
    )
    note = '<p class="note">The distance of the two is being measured …</p>' if values is None else ""
    head = '<tr><th scope="col">Figure</th><th scope="col">Left</th><th scope="col">Right</th></tr>'
    return f'{videos}<table class="figures"><thead>{head}</thead><tbody>{rows}</tbody></table>{note}'


def _side(job: Job | None, where: str) -> str:
    if job is None or job.state != "completed" or job.expired:
        return '<div class="stage"><p>Choose a finished video.</p></div>'
    label = escape(title(job), quote=True)
    return (
        f'<figure><video src="/v1/videos/{job.id}/content" loop muted playsinline '
        f'aria-label="{where}: {label}"></video><figcaption>{label}</figcaption></figure>'
    )


# Values


def seconds(value: float | None) -> str:
    if value is None:
        return "–"
    if value < 1:
        return f"{value * 1000:.0f} ms"
    return f"{value:.1f} s" if value < 90 else f"{value / 60:.1f} min"


def _seconds(value: float | None) -> str | None:
    return None if value is None else seconds(value)


def _unit(value: float | None, unit: str, size: float = 1) -> str | None:
    return None if value is None else f"{value / size:.1f} {unit}"


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _frames(request: Mapping[str, Any]) -> str:
    return "one picture" if request["num_frames"] == 1 else f"{request['num_frames']} frames"


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


def _content(job: Job) -> str:
    return f"/v1/{'images' if 'image' in job.files else 'videos'}/{job.id}/content"


def _list(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
