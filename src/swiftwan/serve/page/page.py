"""The page: a viewer of the queue. It holds nothing: closing it loses nothing, and another browser sees the same.

A click only queues a job and remembers its id; a timer shows what the queue says of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
from fastapi import FastAPI

from swiftwan.errors import PlanError, RequestError, SwiftwanError
from swiftwan.models.config import Defaults
from swiftwan.pipelines.request import TASKS
from swiftwan.plan import parse
from swiftwan.serve.http.asked import Body
from swiftwan.serve.http.uploads import Upload
from swiftwan.serve.http.videos import ask, enqueue
from swiftwan.serve.jobs.job import Job
from swiftwan.serve.jobs.service import Service
from swiftwan.serve.jobs.store import UnknownJobError
from swiftwan.serve.page import show
from swiftwan.serve.page.hardware import Hardware
from swiftwan.serve.page.theme import css, theme
from swiftwan.techniques import TECHNIQUES

SCHEDULERS = ["unipc", "euler", "heun", "dpm++", "lcm"]
HEIGHTS = {"240p": 240, "360p": 360, "480p": 480, "540p": 544, "720p": 720}
KINDS = {
    "Text to video": "TextToVideo",
    "Image to video": "ImageToVideo",
    "Text to image": "TextToImage",
    "Image to image": "ImageToImage",
    "Blend": "Blend",
}
SHOWN = 24

_PLAY_BOTH = (
    "() => { const v = document.querySelectorAll('video.compared'); v.forEach(x => { x.currentTime = 0; x.play(); }); }"
)


def mount(app: FastAPI, service: Service) -> FastAPI:
    """Put the page at the root of the server's application; the guard stands before it too."""
    page = Page(service)
    return gr.mount_gradio_app(
        app,
        page.build(),
        path="/",
        theme=theme(),
        css=css(),
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        max_file_size="64mb",
        allowed_paths=[str(service.folder.root / "results")],
    )


class Page:
    """What the components call. All state is the service's."""

    def __init__(self, service: Service) -> None:
        self.service = service
        admission = service.admission()
        self.defaults: Defaults = admission.facts.known.defaults
        self.grid = admission.facts.grid
        processes = [slot.process.pid for slot in service.supervisor.slots if slot.process is not None]
        self.hardware = Hardware(admission.device.torch_device, processes)
        self.device = admission.device.name
        self.kinds = [kind for kind, task in KINDS.items() if task in TASKS]

    # From the inputs to a job

    def said(self, kind: str, prompt: str, negative: str, size: str, *rest: Any) -> tuple[dict[str, Any], bool]:
        """The inputs as the HTTP interface would get them, and whether a picture is wanted."""
        frames, fps, steps, guidance, seed, scheduler, creativity, techniques, options = rest
        task = KINDS[kind]
        picture = task in ("TextToImage", "ImageToImage", "Blend")
        said: dict[str, Any] = {"task": task, "prompt": prompt, "num_inference_steps": int(steps)}
        said |= {"guidance_scale": float(guidance), "scheduler": scheduler, "fps": int(fps)}
        said["width"], said["height"] = self.size(size)
        if negative:
            said["negative_prompt"] = negative
        if seed.strip():
            if not seed.strip().isdecimal():
                raise RequestError(f"seed is '{seed[:40]}'; it is a whole number, or empty to draw one.")
            said["seed"] = int(seed)
        if not picture:
            said["num_frames"] = int(frames)
        if task in ("ImageToImage", "Blend"):
            said["creativity"] = float(creativity)
        specs = [*techniques, *options.split()]
        if specs:
            said["plan"] = specs
        return said, picture

    def size(self, name: str) -> tuple[int, int]:
        """Width and height on the model's grid, in the shape of its default."""
        if name not in HEIGHTS:
            return self.defaults.width, self.defaults.height
        step = self.grid.spatial
        height = HEIGHTS[name] // step * step
        return round(height * self.defaults.width / self.defaults.height / step) * step, height

    def explain(self, *inputs: Any) -> str:
        """What the run would take, or why it cannot be; told before any click."""
        try:
            said, picture = self.said(*inputs)
            if KINDS[inputs[0]] not in ("TextToVideo", "TextToImage"):
                said |= {"task": "TextToImage" if picture else "TextToVideo"}  # memory is that of the same size
                said.pop("creativity", None)
            said["prompt"] = said["prompt"] or "a prompt"
            admission = self.service.admission()
            asked = ask(self.service, Body(said, ()), picture=picture)
            explanation = admission.check(asked.request, asked.plan)
        except SwiftwanError as problem:
            return f'<div class="wrong" role="status">{escape(str(problem))}</div>'
        load = explanation.load
        rate = self.service.store.seconds_per_tflop()
        about = f", about {show.seconds(rate * load.forwards * load.tflop_per_forward)}" if rate else ""
        lines = [
            f"{load.forwards} forwards of {load.tokens} tokens{about}",
            f"{load.weight_bytes / 2**30:.2f} GiB of weights + about {load.activation_bytes / 2**30:.2f} GiB; "
            f"the device has {explanation.device.total_bytes / 2**30:.1f} GiB: fits",
            *(f"{t.spec} ({t.kind}): {t.reason}" for t in explanation.plan.techniques),
        ]
        return f'<div class="fine" role="status">{escape(chr(10).join(lines))}</div>'

    def generate(self, images: Sequence[str] | None, *inputs: Any) -> str:
        """Queue a job; return its id."""
        task = KINDS[inputs[0]]
        paths = (images or ()) if task not in ("TextToVideo", "TextToImage") else ()
        field = "images" if task == "Blend" else "image"
        try:
            said, picture = self.said(*inputs)
            with ExitStack() as stack:
                uploads = tuple(Upload(field, stack.enter_context(Path(path).open("rb"))) for path in paths)
                return enqueue(self.service, Body(said, uploads), picture=picture).id
        except SwiftwanError as problem:
            raise gr.Error(str(problem), print_exception=False) from None

    def cancel(self, job_id: str) -> None:
        if self.job(job_id) is not None:
            self.service.store.cancel(job_id)

    def delete(self, job_id: str) -> str:
        if self.job(job_id) is not None:
            self.service.delete(job_id)
        return self.newest()

    def again(self, job_id: str) -> str:
        """Queue the same request with a new seed."""
        job = self.job(job_id)
        if job is None:
            return ""
        request = self.service.request_of(job)
        try:
            made, _ = self.service.submit(replace(request, seed=None), plan=job.plan, inputs=job.inputs)
        except SwiftwanError as problem:
            raise gr.Error(str(problem), print_exception=False) from None
        return made.id

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

    def refresh(self, job_id: str) -> tuple[Any, ...]:
        job = self.job(job_id)
        readings = list(self.hardware.readings)
        memory = pd.DataFrame({"seconds": [r.at for r in readings], "GB": [r.used_gb or 0.0 for r in readings]})
        steps = (job.record.get("step_seconds") if job is not None else None) or []
        times = pd.DataFrame({"step": range(1, len(steps) + 1), "seconds": steps})
        return (
            show.stage(self.service, job),
            show.hardware(self.device, readings[-1] if readings else None),
            memory,
            show.efficiency(job),
            times,
            show.others(self.service, job),
        )

    def gallery(self) -> list[tuple[str, str]]:
        """Finished jobs with their thumbnails, the newest first."""
        return [(str(self.service.folder.path(j.files["thumbnail"])), show.title(j)) for j in self._finished()]

    def choices(self) -> list[tuple[str, str]]:
        return [(show.title(job), job.id) for job in self._finished() if "video" in job.files]

    def _finished(self) -> list[Job]:
        return self.service.store.page(limit=SHOWN, states=("completed",))[0]

    def pick(self, event: gr.SelectData) -> str:
        finished = self._finished()
        return finished[event.index].id if event.index < len(finished) else self.newest()

    # The layout

    def build(self) -> gr.Blocks:
        with gr.Blocks(title="swiftwan", analytics_enabled=False, fill_width=True) as blocks:
            current = gr.State("")
            gr.HTML(
                f"<h1>swiftwan</h1><p>{escape(self.service.settings.model)} on {escape(self.device)}</p>",
                elem_id="title",
            )
            with gr.Tabs():
                with gr.Tab("Generate"), gr.Row():
                    with gr.Column(scale=3, min_width=260, elem_id="metrics"):
                        panels = self._metrics()
                    with gr.Column(scale=4, min_width=320):
                        inputs, images = self._inputs()
                    with gr.Column(scale=5, min_width=340, elem_id="result"):
                        stage, run, stop, again, gone = self._result(inputs)
                with gr.Tab("Gallery"), gr.Column(elem_classes="glass"):
                    gallery = gr.Gallery(
                        columns=4,
                        object_fit="contain",
                        label="Finished, newest first",
                        allow_preview=False,
                        height="auto",
                    )
                with gr.Tab("Compare"), gr.Column(elem_classes="glass"):
                    self._compare(blocks)
            shown = [stage, *panels]
            run.click(self.generate, [images, *inputs], current, concurrency_limit=8).then(self.refresh, current, shown)
            stop.click(self.cancel, current, None)
            again.click(self.again, current, current)
            gone.click(self.delete, current, current)
            gallery.select(self.pick, None, current).then(self.refresh, current, shown)
            gr.Timer(1.0).tick(self.refresh, current, shown, show_progress="hidden", queue=False)
            gr.Timer(4.0).tick(self.gallery, None, gallery, show_progress="hidden", queue=False)
            blocks.load(self.newest, None, current).then(self.refresh, current, shown)
            blocks.load(self.gallery, None, gallery)
        return blocks

    def _metrics(self) -> list[Any]:
        with gr.Accordion("Hardware", open=True, elem_classes="glass"):
            hardware = gr.HTML()
            memory = gr.LinePlot(x="seconds", y="GB", title="Memory in use", height=150, colors_in_legend=["#a5b4fc"])
        with gr.Accordion("Efficiency", open=True, elem_classes="glass"):
            efficiency = gr.HTML()
            times = gr.LinePlot(x="step", y="seconds", title="Time of each denoising step", height=150)
        with gr.Accordion("Accuracy", open=False, elem_classes="glass"):
            gr.HTML(
                '<p class="told">PSNR, SSIM and LPIPS need a reference run, CLIP a model of its own: '
                "<code>swiftwan bench</code> measures them.</p>"
            )
        with gr.Accordion("Others", open=False, elem_classes="glass"):
            others = gr.HTML()
        return [hardware, memory, efficiency, times, others]

    def _inputs(self) -> tuple[list[Any], Any]:
        values = self.defaults
        with gr.Column(elem_classes="glass"):
            kind = gr.Radio(self.kinds, value=self.kinds[0], label="Task")
            prompt = gr.Textbox(
                "",
                label="Prompt",
                lines=3,
                autofocus=True,
                placeholder="a red circle moves left over a blue background",
            )
            negative = gr.Textbox("", label="Negative prompt", lines=1, placeholder="Empty: the model's official one")
            images = gr.File(label="Images", file_count="multiple", file_types=["image"], visible=False, height=120)
            creativity = gr.Slider(0, 1, 0.6, step=0.05, label="Creativity", visible=False)
            size = gr.Radio(["model", *HEIGHTS], value="model", label="Resolution")
            with gr.Row():
                frames = gr.Slider(1, max(129, values.num_frames), values.num_frames, step=4, label="Frames")
                fps = gr.Slider(4, 60, values.fps, step=1, label="FPS")
            with gr.Row():
                steps = gr.Slider(1, 100, values.num_inference_steps, step=1, label="Steps")
                guidance = gr.Slider(1, 15, values.guidance_scale, step=0.1, label="Guidance")
            with gr.Row():
                scheduler = gr.Dropdown(SCHEDULERS, value=values.scheduler, label="Scheduler")
                seed = gr.Textbox("", label="Seed", placeholder="drawn, and recorded", max_lines=1)
        with gr.Column(elem_classes="glass"):
            techniques = gr.CheckboxGroup(_plain_techniques(), label="Techniques")
            options = gr.Textbox(
                "", label="Techniques with options", placeholder="quantize:fp8 vae:tiling=...", lines=1
            )
        inputs = [
            kind,
            prompt,
            negative,
            size,
            frames,
            fps,
            steps,
            guidance,
            seed,
            scheduler,
            creativity,
            techniques,
            options,
        ]
        kind.change(_visible, kind, [images, creativity])
        return inputs, images

    def _result(self, inputs: list[Any]) -> tuple[Any, ...]:
        with gr.Column(elem_classes="glass"):
            stage = gr.HTML(show.stage(self.service, None))
            told = gr.HTML(self.explain(*(one.value for one in inputs)))
            run = gr.Button("Generate", variant="primary", size="lg")
            with gr.Row():
                stop = gr.Button("Cancel")
                again = gr.Button("Again, another seed")
                gone = gr.Button("Delete")
        changes = [one.change for one in inputs]
        gr.on(changes, self.explain, inputs, told, show_progress="hidden", trigger_mode="always_last")
        return stage, run, stop, again, gone

    def _compare(self, blocks: gr.Blocks) -> None:
        with gr.Row():
            one, other = (gr.Dropdown([], label=label, interactive=True) for label in ("Left", "Right"))
            fill = gr.Button("Refresh the lists")
            both = gr.Button("Play both from the start", variant="primary")
        view = gr.HTML(show.pair(None, None))

        def lists() -> tuple[Any, Any]:
            choices = self.choices()
            picked = [value for _, value in choices[:2]] + [None, None]
            return gr.Dropdown(choices, value=picked[0]), gr.Dropdown(choices, value=picked[1])

        blocks.load(lists, None, [one, other])
        fill.click(lists, None, [one, other])
        gr.on([one.change, other.change], lambda a, b: show.pair(self.job(a), self.job(b)), [one, other], view)
        both.click(None, js=_PLAY_BOTH)


def _plain_techniques() -> list[str]:
    """Those that need no value."""
    plain = []
    for name in sorted(TECHNIQUES):
        try:
            parse(name)
        except PlanError:
            continue
        plain.append(name)
    return plain


def _visible(kind: str) -> tuple[Any, Any]:
    task = KINDS[kind]
    return (
        gr.File(visible=task not in ("TextToVideo", "TextToImage")),
        gr.Slider(visible=task in ("ImageToImage", "Blend")),
    )
