"""``swiftwan train``: a LoRA, and the parts of the embedded model.

No ``from __future__ import annotations`` here: Typer reads the annotations as objects.
"""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from swiftwan.errors import Cancelled, OutputError, RequestError
from swiftwan.train import pocket

app = typer.Typer(add_completion=False, no_args_is_help=True)
app.registered_commands += pocket.app.registered_commands

_DATA = "Data"
_LEARN = "What is learnt, and how"
_TOLD = "What is told and kept"
_MACHINE = "Machine"


@app.command("style-clips")
def style_clips(
    out: Annotated[Path, typer.Argument(help="Folder for the clips and their captions.", show_default=False)],
    count: int = 20,
    seed: int = 20,
) -> None:
    """Draw clips to try a LoRA with: the embedded model's world as silhouettes at sunset."""
    from swiftwan import media
    from swiftwan.pocket.style import training_clips
    from swiftwan.whole_file import write_text

    if count < 1:
        raise RequestError(f"--count is {count}; it must be 1 or more.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder '{out}' cannot be made: {error.strerror}; choose another.") from None
    for number, (frames, caption) in enumerate(training_clips(count, seed)):
        media.write(out / f"clip{number:02}.mp4", frames, fps=16, record={"request": {"prompt": caption}})
        write_text(out / f"clip{number:02}.txt", caption)
    typer.echo(f"{count} clips in {out}")


@app.command()
def lora(
    data: Annotated[
        str, typer.Argument(help="Folder of clips with .txt captions beside, .csv, .jsonl, or hf:NAME.", metavar="DATA")
    ],
    out: Annotated[Path, typer.Option(help="The run's folder; a run in it goes on.", rich_help_panel=_TOLD)],
    model: Annotated[str, typer.Option(help="Name, hub id, folder or random:NAME.", rich_help_panel=_DATA)] = "pocket",
    cache: Annotated[
        Path | None, typer.Option(help="Latents and embeddings. Unset: OUT/cache.", rich_help_panel=_DATA)
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only check data and settings.", rich_help_panel=_DATA)
    ] = False,
    width: Annotated[int | None, typer.Option(help="With height: most pixels.", rich_help_panel=_DATA)] = None,
    height: Annotated[int | None, typer.Option(help="Aspects are kept.", rich_help_panel=_DATA)] = None,
    frames: Annotated[int | None, typer.Option(help="Most of an item; 4k + 1.", rich_help_panel=_DATA)] = None,
    held_out: Annotated[float, typer.Option(help="Share of clips for the loss.", rich_help_panel=_DATA)] = 0.1,
    steps: Annotated[int, typer.Option(help="In all.", rich_help_panel=_LEARN)] = 1000,
    rank: Annotated[int, typer.Option(help="Of the adapter.", rich_help_panel=_LEARN)] = 32,
    alpha: Annotated[float | None, typer.Option(help="Unset: the rank.", rich_help_panel=_LEARN)] = None,
    targets: Annotated[
        str, typer.Option(help="all, attention, self, cross, ffn, self-q, ...; with commas.", rich_help_panel=_LEARN)
    ] = "all",
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.", rich_help_panel=_LEARN)] = 1e-4,
    warmup: Annotated[int, typer.Option(help="Steps to reach it.", rich_help_panel=_LEARN)] = 20,
    weight_decay: Annotated[float, typer.Option(rich_help_panel=_LEARN)] = 0.01,
    optimizer: Annotated[str, typer.Option(help="adamw or adamw8bit.", rich_help_panel=_LEARN)] = "adamw",
    batch_tokens: Annotated[
        int, typer.Option(help="Most tokens of a batch; one item at least.", rich_help_panel=_LEARN)
    ] = 0,
    accumulate: Annotated[int, typer.Option(help="Batches a step.", rich_help_panel=_LEARN)] = 1,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient.", rich_help_panel=_LEARN)] = 1.0,
    timesteps: Annotated[str, typer.Option(help="logit-normal or uniform.", rich_help_panel=_LEARN)] = "logit-normal",
    shift: Annotated[
        float | None, typer.Option(help="Of noise levels. Unset: the model's.", rich_help_panel=_LEARN)
    ] = None,
    weighting: Annotated[str, typer.Option(help="Of levels: none or bell.", rich_help_panel=_LEARN)] = "none",
    experts: Annotated[
        str, typer.Option(help="Of two: high, low, both, or shared (one LoRA).", rich_help_panel=_LEARN)
    ] = "both",
    first_frame: Annotated[
        float, typer.Option(help="Share of clips that begin with a given frame.", rich_help_panel=_LEARN)
    ] = 0.0,
    drop_caption: Annotated[float, typer.Option(help="Share of captions left out.", rich_help_panel=_LEARN)] = 0.1,
    ema: Annotated[float, typer.Option(help="Decay of the average; 0 keeps none.", rich_help_panel=_LEARN)] = 0.0,
    seed: Annotated[int, typer.Option(rich_help_panel=_LEARN)] = 0,
    validate_every: Annotated[int, typer.Option(help="Steps.", rich_help_panel=_TOLD)] = 100,
    sample_every: Annotated[int, typer.Option(help="Steps; 0 never.", rich_help_panel=_TOLD)] = 0,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Of a sample; repeat for more. Unset: a caption.", rich_help_panel=_TOLD)
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(help="Steps.", rich_help_panel=_TOLD)] = 100,
    log: Annotated[
        list[str] | None, typer.Option(help="tensorboard, wandb, ...; repeat for more.", rich_help_panel=_TOLD)
    ] = None,
    format: Annotated[str, typer.Option(help="diffusers, comfyui or kohya.", rich_help_panel=_TOLD)] = "diffusers",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=_TOLD)] = False,
    keep: Annotated[
        str,
        typer.Option(
            help="For the backward pass: auto, all, products, attention or nothing.", rich_help_panel=_MACHINE
        ),
    ] = "auto",
    base: Annotated[
        str,
        typer.Option(
            help="Frozen layers: bf16 (as loaded), fp8, or fp8-attention (forward) too.", rich_help_panel=_MACHINE
        ),
    ] = "bf16",
    weights: Annotated[
        str, typer.Option(help="Frozen ones: whole, sharded (over GPUs) or offloaded.", rich_help_panel=_MACHINE)
    ] = "whole",
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Equal to the bit on a GPU too; slower.", rich_help_panel=_MACHINE)
    ] = False,
    device: Annotated[str | None, typer.Option(rich_help_panel=_MACHINE)] = None,
    dtype: Annotated[str | None, typer.Option(rich_help_panel=_MACHINE)] = None,
) -> None:
    """Fine-tune a LoRA on your own clips or images."""
    given = dict(locals())
    from swiftwan.cli.progress import cancellable, shown
    from swiftwan.pipelines.result import StepEvent
    from swiftwan.train.settings import Settings

    names = Settings.__dataclass_fields__.keys() - {"prompts", "targets"}
    chosen = {name: value for name, value in given.items() if name in names}
    settings = Settings(**chosen, prompts=tuple(prompt or ()), targets=tuple(targets.split(",")))
    began = time.perf_counter()
    with shown(plain=as_json) as display, cancellable(display):

        def on_step(phase: str, done: int, of: int) -> None:
            display.on_step(StepEvent(phase, done, of, time.perf_counter() - began))  # type: ignore[arg-type]

        display.begin("load")
        # peft brings transformers with it: seconds, in which something shall be seen.
        from swiftwan.train.lora import check as check_data
        from swiftwan.train.lora import open_engine, trackers, train

        engine = open_engine(model, device=device, dtype=dtype, weights=settings.weights, deterministic=deterministic)
        try:
            if check:
                files = []
                check_data(engine, data, settings, out)
            else:
                files = train(
                    engine, data, out, settings, cache=cache, on_step=on_step, log_to=trackers(log or (), out)
                )
        except KeyboardInterrupt:
            told = f"stopped at {display.where}; the same command goes on from the last checkpoint in {out}"
            raise Cancelled(told) from None
        display.end()
    report = (out / "data.txt").read_text(encoding="utf-8").splitlines()
    if as_json:
        typer.echo(json.dumps({"data": report, "files": [str(file) for file in files]}))
        return
    for line in report:
        typer.echo(line, err=True)
    for file in files:
        typer.echo(f"{file}: try it with --with lora:{file}")
