"""The commands that make the pocket model: ``swiftwan train pocket-vae``, ``pocket-text``, then ``pocket-dit``; and
``pocket-scorers``, which scores what it makes.

Each can be killed and started again with the same words; it goes on where it was.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from swiftwan.device import pick_device
from swiftwan.errors import WeightsError
from swiftwan.models.config import POCKET_DEFAULTS

app = typer.Typer(add_completion=False, no_args_is_help=True)
MODEL_INDEX_JSON = {
    "_class_name": "WanPipeline",
    "boundary_ratio": None,
    "expand_timesteps": True,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
SCHEDULER_JSON = {
    "_class_name": "UniPCMultistepScheduler",
    "flow_shift": POCKET_DEFAULTS.flow_shift,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}

OutOption = Annotated[Path, typer.Option(help="The run's folder; a run in it is continued.")]


@app.command("pocket-vae")
def pocket_vae(
    out: OutOption,
    steps: int = 9000,
    batch: int = 8,
    num_frames: int = 33,
    seed: int = 1,
    learning_rate: float = 1.5e-3,
    device: str | None = None,
) -> None:
    """Train the pocket VAE; writes OUT/vae in diffusers' layout."""
    import torch

    from swiftwan.train import pocket_vae as recipe
    from swiftwan.weights.load import save_weights

    where = torch.device(pick_device(device).torch_device)
    vae = recipe.train(
        out,
        steps=steps,
        batch=batch,
        num_frames=num_frames,
        device=where,
        seed=seed,
        learning_rate=learning_rate,
    )
    save_weights(vae.state_dict(), out / "vae", recipe.as_config_json(vae.config))
    report = {"psnr_held_out": recipe.evaluate(vae.float(), clip_count=64, device=where)}
    (out / "report.json").write_text(json.dumps(report))
    typer.echo(json.dumps(report))


@app.command("pocket-tiny")
def pocket_tiny(
    out: OutOption,
    steps: int = 6000,
    batch: int = 16,
    seed: int = 5,
    learning_rate: float = 2e-3,
    device: str | None = None,
) -> None:
    """Train the tiny decoder of the embedded model's VAE; writes OUT/vae_tiny."""
    import torch

    from swiftwan.engine import Engine
    from swiftwan.train import pocket_tiny as recipe
    from swiftwan.weights.load import save_weights

    vae = Engine.load("pocket", plan=[], device=device, dtype="fp32").parts.vae
    before = recipe.evaluate(vae, clip_count=32)
    vae.tiny = recipe.train(out, vae, steps=steps, batch=batch, seed=seed, learning_rate=learning_rate)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in vae.tiny.state_dict().items()}
    save_weights(weights, out / "vae_tiny", {"_class_name": "TAEHV"} | asdict(recipe.SIZES))
    report = {"psnr_held_out": recipe.evaluate(vae, clip_count=32), "psnr_of_the_vae": before}
    (out / "report.json").write_text(json.dumps(report))
    typer.echo(json.dumps(report))


@app.command("pocket-text")
def pocket_text(
    out: Annotated[Path, typer.Option(help="Folder for the text encoder.")],
    steps: int = 2000,
    batch: int = 256,
    seed: int = 31,
    learning_rate: float = 1e-3,
    start: Annotated[Path | None, typer.Option(help="A text encoder's folder to start from.")] = None,
    device: str | None = None,
) -> None:
    """Teach the text encoder which words belong together; writes it to OUT."""
    import torch

    from swiftwan.train import pocket_text as recipe
    from swiftwan.train.pocket_dit import Pocket
    from swiftwan.train.pocket_tokenizer import build

    where = torch.device(pick_device(device).torch_device)
    torch.manual_seed(seed)
    model = Pocket(len(build())).to(where)
    if start is not None:
        model.read_text(start)
    log = recipe.train(model, steps=steps, batch=batch, seed=seed, learning_rate=learning_rate, device=where)
    model.text.save_pretrained(out)
    (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    typer.echo(json.dumps({"binding": recipe.binding(model)}))


@app.command("pocket-dit")
def pocket_dit(
    vae: Annotated[Path, typer.Option(help="The folder that pocket-vae wrote, or a model's vae folder.")],
    out: OutOption,
    steps: int = 24000,
    batch: int = 256,
    clips: int = 160_000,
    two_things: Annotated[float, typer.Option(help="Share of clips with two things.")] = 0.5,
    twins: Annotated[float, typer.Option(help="Share of blue or green things on blue or green.")] = 0.2,
    start: Annotated[Path | None, typer.Option(help="A model's folder whose weights to start from.")] = None,
    text: Annotated[Path | None, typer.Option(help="The folder that pocket-text wrote.")] = None,
    stop_at: Annotated[int | None, typer.Option(help="Pause after this step.")] = None,
    seed: int = 2,
    learning_rate: float = 1e-3,
    device: str | None = None,
) -> None:
    """Train the pocket transformer and text encoder; writes OUT/transformer, OUT/text_encoder, OUT/tokenizer."""
    import torch

    from swiftwan.models.config import VAEConfig
    from swiftwan.models.vae import WanVAE
    from swiftwan.pocket.scenes import sample_scenes
    from swiftwan.train import pocket_dit as recipe
    from swiftwan.train.pocket_tokenizer import build
    from swiftwan.train.pocket_vae import channels_last
    from swiftwan.weights.load import load_weights, save_weights

    where = torch.device(pick_device(device).torch_device)
    folder = vae / "vae" if (vae / "vae").is_dir() else vae
    if not (folder / "config.json").is_file():
        raise WeightsError(f"'{vae}' holds no VAE; give the folder that swiftwan train pocket-vae wrote.")
    with torch.device("meta"):
        coder = WanVAE(VAEConfig.from_json(json.loads((folder / "config.json").read_text())))
    load_weights(coder, sorted(folder.glob("*.safetensors")), device=where, dtype=torch.float32, component="vae")
    channels_last(coder)
    scenes = recipe.training_scenes(clips, seed, two_things=two_things, twins=twins)
    data = recipe.make_latents(coder, scenes, seed=seed, device=where)
    held_out = recipe.make_latents(coder, sample_scenes(256, seed + 1, "held-out"), seed=seed + 1, device=where)
    model = recipe.train(
        out,
        data,
        held_out,
        steps=steps,
        batch=batch,
        device=where,
        seed=seed,
        learning_rate=learning_rate,
        stop_at=stop_at,
        start=start,
        text=text,
    )
    transformer_json = {"_class_name": "WanTransformer3DModel"} | model.transformer.config.to_json()
    save_weights(model.transformer.state_dict(), out / "transformer", transformer_json)
    model.text.save_pretrained(out / "text_encoder")
    build().save_pretrained(out / "tokenizer")


@app.command("pocket-scorers")
def pocket_scorers(
    out: OutOption,
    steps: int = 6000,
    batch: int = 256,
    clips: Annotated[int, typer.Option(help="Scenes drawn beforehand; 0.3 MB of memory each.")] = 16_000,
    stop_at: Annotated[int | None, typer.Option(help="Pause after this step, and write what there is.")] = None,
    seed: int = 41,
    learning_rate: float = 1e-3,
    device: str | None = None,
) -> None:
    """Train the pocket world's scorers, its stand-ins for CLIP and LPIPS; writes OUT/scorers.safetensors."""
    import torch

    from swiftwan.pocket.scorers import FILE
    from swiftwan.train import pocket_scorers as recipe
    from swiftwan.weights.write import Slot, write_shards

    where = torch.device(pick_device(device).torch_device)
    pool = recipe.make_pool(clips, seed, where)
    model = recipe.train(
        out, pool, steps=steps, batch=batch, device=where, seed=seed, learning_rate=learning_rate, stop_at=stop_at
    )
    weights = {name: weight.half().cpu() for name, weight in model.state_dict().items()}
    slots = [Slot(name, tuple(weight.shape), "F16") for name, weight in weights.items()]
    write_shards(out, FILE.stem, slots, lambda slot: weights[slot.name])
    typer.echo(out / FILE.name)


@app.command("pocket-assemble")
def pocket_assemble(
    vae: Annotated[Path, typer.Option(help="The folder that pocket-vae wrote.")],
    dit: Annotated[Path, typer.Option(help="The folder that pocket-dit wrote.")],
    out: Annotated[Path, typer.Option(help="The model's folder, in diffusers' layout; replaced.")],
) -> None:
    """Join the trained parts into one checkpoint in float16, with a manifest of its files."""
    import torch
    from safetensors.torch import load_file
    from transformers import UMT5EncoderModel

    from swiftwan.models.config import POCKET, VAEConfig
    from swiftwan.train.pocket_tokenizer import build
    from swiftwan.train.pocket_vae import as_config_json
    from swiftwan.weights.check import write_json, write_manifest
    from swiftwan.weights.load import save_weights

    def half(part: Path) -> dict[str, torch.Tensor]:
        return {k: v.half() for file in sorted(part.glob("*.safetensors")) for k, v in load_file(file).items()}

    for part in (vae / "vae", dit / "transformer", dit / "text_encoder"):
        if not (part / "config.json").is_file():
            raise WeightsError(f"'{part}' holds no trained part; run pocket-vae and pocket-dit first.")
    vae_config = VAEConfig.from_json(json.loads((vae / "vae" / "config.json").read_text()))
    transformer_json = {"_class_name": "WanTransformer3DModel"} | POCKET.transformer.to_json()
    save_weights(half(vae / "vae"), out / "vae", as_config_json(vae_config))
    save_weights(half(dit / "transformer"), out / "transformer", transformer_json)
    text_encoder = UMT5EncoderModel.from_pretrained(dit / "text_encoder", dtype=torch.float16, local_files_only=True)
    text_encoder.save_pretrained(out / "text_encoder")
    build().save_pretrained(out / "tokenizer")
    write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER_JSON)
    write_json(out / "model_index.json", MODEL_INDEX_JSON)
    write_manifest(out)
