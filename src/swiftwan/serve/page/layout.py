"""Where things stand on the page, and what calls what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

from swiftwan.sampling import SCHEDULERS
from swiftwan.serve.page import reports, show, techniques
from swiftwan.serve.page.inputs import (
    CHOSEN,
    DEFAULT,
    FASTEST,
    FILES,
    HEIGHTS,
    KINDS,
    NAMES,
    OWN,
    PICTURES,
    PLANS,
    WITH_CREATIVITY,
    Inputs,
)

if TYPE_CHECKING:
    from swiftwan.serve.page.page import Page

_ACTS = """
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-act]');
  if (button) trigger('act', {act: button.dataset.act, job: button.dataset.job});
});
"""

_IN_STEP = """
const videos = () => [...element.querySelectorAll('video')];
const [play, seek, speed] = ['[data-play]', '[data-seek]', '[data-speed]'].map(one => element.querySelector(one));
const say = () => { play.textContent = videos()[0]?.paused === false ? 'Pause' : 'Play'; };
play.onclick = () => {
  const [lead, ...others] = videos();
  if (!lead) return;
  if (lead.paused) { others.forEach(v => { v.currentTime = lead.currentTime; }); videos().forEach(v => v.play()); }
  else videos().forEach(v => v.pause());
  setTimeout(say, 50);
};
seek.oninput = () => videos().forEach(v => { v.currentTime = seek.value / 1000 * (v.duration || 0); });
speed.onchange = () => videos().forEach(v => { v.playbackRate = Number(speed.value); });
setInterval(() => {
  const [lead, ...others] = videos();
  if (!lead) return;
  say();
  if (document.activeElement !== seek) seek.value = 1000 * lead.currentTime / (lead.duration || 1);
  if (!lead.paused) others.forEach(v => {
    if (Math.abs(v.currentTime - lead.currentTime) > 0.06) v.currentTime = lead.currentTime;
  });
}, 100);
"""

_CONTROLS = """
<div class="controls"><button type="button" data-play>Play</button>
<input type="range" min="0" max="1000" value="0" data-seek aria-label="Position of both videos">
<label>Speed <select data-speed><option>0.25</option><option>0.5</option><option selected>1</option></select></label>
</div>${value}
"""


@dataclass
class Form:
    """The inputs' components, in the order of :class:`Inputs`, and those of their files."""

    values: list[Any]
    files: dict[str, Any]


def build(page: Page) -> gr.Blocks:
    with gr.Blocks(title="swiftwan", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)) as blocks:
        current = gr.State("")
        header = gr.HTML(show.header(page.service, page.service.settings.model, page.device), elem_id="title")
        announcement = gr.HTML("", elem_id="announcement", html_template='<p role="status">${value}</p>')
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Generate", id="generate"), gr.Row(elem_id="columns"):
                with gr.Column(scale=3, min_width=270, elem_id="metrics"):
                    panels = _metrics()
                with gr.Column(scale=4, min_width=320, elem_id="inputs"):
                    form, given = _inputs(page)
                with gr.Column(scale=5, min_width=320, elem_id="result"), gr.Column(elem_classes="glass"):
                    stage = gr.HTML(show.stage(page.service, None))
                    explained = gr.HTML(page.explain(*(one.value for one in form.values)), elem_id="explained")
                    run = gr.Button("Generate", variant="primary", size="lg", elem_id="run")
                    with gr.Row(elem_classes="few"):
                        stop, again, gone = (gr.Button(word) for word in ("Cancel", "Again", "Delete"))
            with gr.Tab("Queue", id="queue"), gr.Column(elem_classes="glass"):
                queue = _list(show.queue(page.service))
                pause = gr.Button("Pause or resume the queue", elem_classes="small")
            with gr.Tab("Gallery", id="gallery"), gr.Column(elem_classes="glass"):
                gallery = _list(page.gallery())
            with gr.Tab("Compare", id="compare") as compare, gr.Column(elem_classes="glass"):
                _compare(page, [blocks.load, compare.select])
            with gr.Tab("Benchmark", id="benchmark"), gr.Column(elem_classes="glass"):
                _benchmark(page, blocks)
        shown = (page.refresh, current, [header, stage, announcement, *panels, queue])

        run.click(_generate(page, form), [*form.files.values(), *form.values], current, concurrency_limit=8).then(
            *shown
        )
        stop.click(page.cancel, current, None).then(*shown)
        again.click(page.again, current, current).then(*shown)
        gone.click(page.delete, current, current).then(*shown)
        pause.click(page.pause, None, None).then(*shown)
        for listed in (queue, gallery):
            listed.act(_act(page), current, [current, tabs, *form.values]).then(*shown).then(
                page.gallery, None, gallery
            )
        given.upload(lambda path: _filled(page.settings_of_file(path)), given, form.values)

        quietly: dict[str, Any] = {"show_progress": "hidden", "queue": False}
        changes = [one.change for one in form.values]
        changes += [blocks.load, announcement.change]  # what ended tells how long the next will take
        gr.on(changes, page.explain, form.values, explained, trigger_mode="always_last", **quietly)
        gr.Timer(1.0).tick(*shown, **quietly)
        gr.Timer(4.0).tick(page.gallery, None, gallery, **quietly)
        blocks.load(page.newest, None, current).then(*shown)
    return blocks


def _list(value: str) -> Any:
    return gr.HTML(value, js_on_load=_ACTS)


# The left side


def _metrics() -> list[Any]:
    panels = []
    for name, opened in (("Hardware", True), ("Efficiency", True), ("Accuracy", False), ("Others", False)):
        with gr.Accordion(name, open=opened, elem_classes="glass"):
            panels.append(gr.HTML(""))
    return panels


# The middle


def _inputs(page: Page) -> tuple[Form, Any]:
    known = page.admission("").facts.known
    values = known.defaults
    with gr.Column(elem_classes="glass"):
        kind = gr.Radio(list(KINDS), value=next(iter(KINDS)), label="Task", elem_id="kinds")
        prompt = gr.Textbox(
            "", label="Prompt", lines=3, autofocus=True, placeholder="a red circle moves left over a blue background"
        )
        files = _files()
        with gr.Row():
            creativity = gr.Slider(
                0, 1, 0.6, step=0.05, label="Creativity", visible=False, info="0 keeps what is given, 1 ignores it"
            )
            weights = gr.Textbox("", label="Weights", visible=False, placeholder="alike", info="one an image")
        negative = gr.Textbox("", label="Negative prompt", lines=1, placeholder="Empty: the model's official one")
    with gr.Column(elem_classes="glass"):
        resolution = gr.Radio([DEFAULT, *HEIGHTS, OWN], value=DEFAULT, label="Resolution", elem_classes="pills")
        with gr.Row():
            width = gr.Number(values.width, label="Width", precision=0, visible=False)
            height = gr.Number(values.height, label="Height", precision=0, visible=False)
        with gr.Row():
            frames = gr.Slider(1, max(161, values.num_frames), values.num_frames, step=4, label="Frames")
            fps = gr.Slider(1, 60, values.fps, step=1, label="FPS")
        with gr.Row():
            steps = gr.Slider(1, 100, values.num_inference_steps, step=1, label="Steps")
            guidance = gr.Slider(1, 15, values.guidance_scale, step=0.1, label="Guidance")
        with gr.Row():
            scheduler = gr.Dropdown(list(SCHEDULERS), value=values.scheduler, label="Scheduler")
            seed = gr.Textbox("", label="Seed", placeholder="drawn, and recorded", max_lines=1)
        with gr.Row():
            model = gr.Dropdown(page.models, value=page.models[0], label="Model", scale=3)
            reload = gr.Button("Reload", scale=1, min_width=90, elem_id="reload")
    with gr.Column(elem_classes="glass"):
        plan = gr.Radio(PLANS, value=FASTEST, label="Techniques", elem_classes="pills")
        with gr.Column(visible=False) as checklist:
            line = _techniques()
    with gr.Accordion("Settings from a file", open=False, elem_classes="glass"):
        given = gr.File(
            label="An .mp4 or .png that swiftwan wrote", file_types=[".mp4", ".png"], height=110, elem_classes="drop"
        )

    components: dict[str, Any] = {
        "kind": kind,
        "prompt": prompt,
        "negative": negative,
        "resolution": resolution,
        "width": width,
        "height": height,
        "frames": frames,
        "fps": fps,
        "steps": steps,
        "guidance": guidance,
        "scheduler": scheduler,
        "seed": seed,
        "model": model,
        "creativity": creativity,
        "weights": weights,
        "plan": plan,
        "techniques": line,
    }
    form = Form([components[name] for name in NAMES], files)
    quietly: dict[str, Any] = {"show_progress": "hidden", "queue": False}
    kind.change(_for_kind, kind, [*files.values(), creativity, weights, frames], **quietly)
    plan.change(lambda chosen: gr.Column(visible=chosen == CHOSEN), plan, checklist, **quietly)
    resolution.change(lambda chosen: [gr.Number(visible=chosen == OWN)] * 2, resolution, [width, height], **quietly)
    reload.click(lambda: _reload(page), None, None)
    return form, given


def _files() -> dict[str, Any]:
    """Inputs for files; a browser shows no picture of them, since nothing decodes them here."""
    pictures: dict[str, Any] = {
        "file_types": [".png", ".jpg", ".jpeg", ".webp"],
        "visible": False,
        "height": 110,
        "elem_classes": "drop",
    }
    with gr.Row():
        image = gr.File(label="Image", **pictures)
        last = gr.File(label="Last image, if the model knows one", **pictures)
    images = gr.File(label="Two or more images of one size", file_count="multiple", **pictures)
    clip = gr.File(**pictures | {"label": "Clip", "file_types": [".mp4"]})
    return {"image": image, "last_image": last, "images": images, "video": clip}


def _for_kind(kind: str) -> list[Any]:
    task = KINDS[kind]
    wanted = FILES.get(task, ())
    return [
        *(gr.File(visible=name in wanted) for name in ("image", "last_image", "images", "video")),
        gr.Slider(visible=task in WITH_CREATIVITY),
        gr.Textbox(visible=task == "Blend"),
        gr.Slider(visible=task not in PICTURES),
    ]


def _techniques() -> Any:
    """The checklist, and the line that it writes and that can be edited: it is what counts."""
    what = techniques.reasons()
    ticks = [
        gr.CheckboxGroup(names, label=kind.capitalize(), elem_classes="ticks") for kind, names in techniques.by_kind()
    ]
    line = gr.Textbox("", label="With their options", lines=2, placeholder="quantize:fp8 step-cache:threshold=0.1")
    reasons = "".join(f"<dt>{name}</dt><dd>{reason}</dd>" for name, reason in what.items())
    gr.HTML(f'<details class="about"><summary>What they do</summary><dl>{reasons}</dl></details>')
    for group in ticks:
        group.input(None, [line, *ticks], line, js=techniques.script("lineOf"))
    line.change(None, line, ticks, js=techniques.script("ticksOf"))  # also where settings were filled in
    return line


def _reload(page: Page) -> None:
    page.service.supervisor.reload()
    gr.Info("The next job loads its model anew.")


def _filled(inputs: Inputs | None) -> list[Any]:
    """The inputs' new values."""
    if inputs is None:
        return [gr.skip()] * len(NAMES)
    return list(asdict(inputs).values())


# The clicks


def _generate(page: Page, form: Form) -> Any:
    names = list(form.files)

    def generate(*values: Any) -> str:
        given = dict(zip(names, values[: len(names)], strict=True))
        files = {name: _paths(one) for name, one in given.items()}
        return page.generate(files, *values[len(names) :])

    return generate


def _paths(given: str | Sequence[str] | None) -> Sequence[str]:
    return [given] if isinstance(given, str) else given or ()


def _act(page: Page) -> Any:
    """What the buttons of a list do to a job."""

    def act(current: str, event: gr.EventData) -> list[Any]:
        what, job_id = str(event.act), str(event.job)
        filled = _filled(page.settings_of_job(job_id) if what == "fill" else None)
        match what:
            case "show":
                current = job_id
            case "again":
                current = page.again(job_id)
            case "retry":
                current = page.retry(job_id)
            case "cancel":
                page.cancel(job_id)
            case "first" | "up":
                page.move(job_id, what)
            case "delete":
                left = page.delete(job_id)
                current = left if job_id == current else current
        goes = what in ("show", "again", "retry", "fill")
        return [current, gr.Tabs(selected="generate") if goes else gr.skip(), *filled]

    return act


# The other tabs


def _compare(page: Page, opened: Sequence[Any]) -> None:
    """Two videos in step: the two newest whenever the tab is opened, until a user picks others."""
    picked = gr.State(False)
    with gr.Row(elem_classes="few"):
        left, right = (gr.Dropdown([], label=label, interactive=True, scale=4) for label in ("Left", "Right"))
        fill = gr.Button("Refresh the lists", scale=1, min_width=120)
    view = gr.HTML(show.pair(None, None, {}), html_template=_CONTROLS, js_on_load=_IN_STEP)

    def lists(one: str | None, other: str | None, picked: bool) -> tuple[Any, Any]:
        choices = page.choices()
        known = [value for _, value in choices]
        newest = [*known[:2], None, None]
        sides = zip((one, other), (newest[1], newest[0]), strict=True)
        values = [old if picked and old in known else new for old, new in sides]
        return gr.Dropdown(choices, value=values[0]), gr.Dropdown(choices, value=values[1])

    gr.on([*opened, fill.click], lists, [left, right, picked], [left, right])
    gr.on([left.input, right.input], lambda: True, None, picked, show_progress="hidden", queue=False)
    gr.on([left.change, right.change], page.pair, [left, right], view)
    gr.Timer(3.0).tick(page.pair, [left, right], view, show_progress="hidden", queue=False)


def _benchmark(page: Page, blocks: gr.Blocks) -> None:
    names = gr.Dropdown([], label="Report", interactive=True)
    frame = gr.HTML(reports.frame(None))

    def listed() -> Any:
        found = reports.found(page.service.folder.root)
        return gr.Dropdown(found, value=found[0] if found else None)

    blocks.load(listed, None, names)
    names.change(reports.frame, names, frame)
