"""``swiftwan train distill``: its words, and what they come to for a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from swiftwan.errors import Cancelled

_BY_SIZE = "Unset: by the model's size."


def distill(
    out: Annotated[Path, typer.Option(help="The run's folder; a run in it is continued.")],
    prompts: Annotated[
        Path | None,
        typer.Argument(
            help="A text file, a prompt a line, or clips with captions as train lora takes them, of which only the "
            "captions are read. Unset: the embedded model's own world.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="The teacher: name, hub id, folder or random:NAME.")] = "pocket",
    steps: Annotated[int, typer.Option(help="Of the student.")] = 4,
    walk: Annotated[int, typer.Option(help="The teacher's steps, a multiple of the student's.")] = 48,
    guidance: Annotated[float | None, typer.Option(help="That the student learns. Unset: the model's own.")] = None,
    shift: Annotated[float | None, typer.Option(help="Flow shift. Unset: the model's own.")] = None,
    rank: Annotated[int | None, typer.Option(help=f"Of the LoRA. {_BY_SIZE}")] = None,
    batch: Annotated[int | None, typer.Option(help=f"Clips of an update. {_BY_SIZE}")] = None,
    walks: Annotated[
        int | None, typer.Option(help=f"So many prompts the teacher walks for; 0: all. {_BY_SIZE}")
    ] = None,
    regression: Annotated[int | None, typer.Option(help=f"Updates on the teacher's walks. {_BY_SIZE}")] = None,
    consistency: Annotated[int | None, typer.Option(help=f"Updates of consistency. {_BY_SIZE}")] = None,
    matching: Annotated[int, typer.Option(help="Updates of distribution matching at the end.")] = 0,
    learning_rate: Annotated[float | None, typer.Option(help=f"Highest. {_BY_SIZE}")] = None,
    start: Annotated[Path | None, typer.Option(help="A LoRA that this wrote, to go on from.")] = None,
    expert: Annotated[str, typer.Option(help="Of a two-expert model: high or low; one run each.")] = "",
    width: Annotated[int | None, typer.Option(help="Pixels. Unset: the model's own.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels. Unset: the model's own.")] = None,
    frames: Annotated[int | None, typer.Option(help="4k + 1. Unset: the model's own.")] = None,
    form: Annotated[str, typer.Option("--format", help="diffusers, comfyui or kohya.")] = "diffusers",
    seed: int = 51,
    device: str | None = None,
) -> None:
    """Make a few-step student of a text-to-video model; writes OUT/few_step_STEPS.safetensors."""
    from swiftwan.engine import Engine
    from swiftwan.pipelines.request import TextToVideo
    from swiftwan.plan import complete, describe
    from swiftwan.train import distill_run
    from swiftwan.train.distill_settings import FOR_LARGE, FOR_SMALL, Settings, refuse_unfit
    from swiftwan.train.distill_world import drawn, read_prompts, world

    facts = describe(model)
    refuse_unfit(facts.known, expert)
    asked = TextToVideo(
        "", width=width, height=height, num_frames=frames, guidance_scale=guidance, flow_shift=shift, seed=seed
    )
    scenes = world(facts.known, seed) if prompts is None else []
    lines = [scene.prompt for scene in scenes] if prompts is None else read_prompts(prompts)
    request = complete(replace(asked, prompt=lines[0]), facts)
    assert request.flow_shift is not None
    assert request.guidance_scale is not None
    small = distill_run.is_small(facts.known.transformer)
    sized: dict[str, Any] = {
        "rank": rank,
        "batch": batch,
        "walks": walks,
        "regression": regression,
        "consistency": consistency,
        "learning_rate": learning_rate,
    }
    given = {name: value for name, value in sized.items() if value is not None}
    settings = Settings(
        steps=steps,
        flow_shift=request.flow_shift,
        guidance_scale=request.guidance_scale,
        walk=walk,
        matching=matching,
        seed=seed,
        expert=cast('Literal["", "high", "low"]', expert),
        boundary=facts.known.boundary_ratio or 0.0,
        guidance_scale_2=request.guidance_scale_2 or request.guidance_scale,
        format=form,
        **(FOR_SMALL if small else FOR_LARGE) | given,
    )
    try:
        # A small model's weights are rounded for nothing; a large one's would not fit beside its activations.
        engine = Engine.load(model, plan=[], device=device, dtype="fp32" if small else None)
        path = distill_run.run(
            out,
            engine.parts,
            lines,
            request.negative_prompt or "",
            engine.latent_shape(request)[1:],
            settings,
            base=facts.name,
            clips=drawn(engine.parts.vae, scenes, request, seed) if scenes else None,
            start=start,
            say=lambda line: typer.echo(line, err=True),
        )
    except KeyboardInterrupt:
        raise Cancelled(f"stopped; the same command goes on from what is in '{out}'") from None
    typer.echo(json.dumps({"lora": str(path), "bytes": path.stat().st_size}))
