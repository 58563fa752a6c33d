"""Whether a run learns: loss on clips kept aside, sample videos, and a plot of both."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from swiftwan.bench.charts import Series, lines
from swiftwan.pipelines.request import ImageToVideo, Request, TextToVideo
from swiftwan.train import flow
from swiftwan.whole_file import write_text

if TYPE_CHECKING:
    from swiftwan.engine import Engine
    from swiftwan.models.dit import WanTransformer
    from swiftwan.train.buckets import Item

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Of the run's own distribution of noise levels, where the held-out loss is taken; its noise never changes."""

_STYLE = "svg{font:12px sans-serif}.grid{stroke:#ddd}"


@torch.no_grad()
def held_out_loss(
    transformer: WanTransformer, batches: Iterable[flow.Batch], levels: flow.Levels, seed: int
) -> dict[str, float]:
    """Loss by quantile of the noise level, and their mean, over batches that are the same at every check."""
    at = levels.quantile(torch.tensor(QUANTILES))
    sums = torch.zeros(len(QUANTILES))
    clips = 0
    for number, batch in enumerate(batches):
        device, count = batch.latents.device, len(batch.latents)
        noise = torch.randn(batch.latents.shape, generator=flow.generator(seed, number, device), device=device)
        for i, level in enumerate(at.tolist()):
            sums[i] += count * flow.loss(transformer, batch, torch.full((count,), level, device=device), noise).cpu()
        clips += count
    means = (sums / clips).tolist()
    told = {f"held_out_{q}": value for q, value in zip(QUANTILES, means, strict=True)}
    return told | {"held_out": sum(means) / len(means)}


def sample(engine: Engine, prompts: Sequence[str], item: Item, folder: Path | None, step: int, seed: int) -> list[Path]:
    """Generate a video a prompt with the model as it is now, in the shape of an item; the clip's first frame begins it
    for models that need one. The seed does not change with the step, so that videos can be compared. Without a folder
    nothing is written: a process that only lends its share of the weights.
    """
    written = []
    for number, prompt in enumerate(prompts):
        # Compiled blocks were compiled for training's shapes; a sample now and then is not worth another compilation.
        with torch.compiler.set_stance("force_eager"):
            result = engine.run(request(engine, prompt, item, seed + number))
        if folder is None:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{step:06d}-{number}{'.mp4' if item.bucket.frames > 1 else '.png'}"
        result.save(path)
        written.append(path)
    return written


def request(engine: Engine, prompt: str, item: Item, seed: int) -> Request:
    """A prompt in the shape of an item."""
    shape: dict[str, Any] = {
        "width": item.bucket.width,
        "height": item.bucket.height,
        "num_frames": item.bucket.frames,
        "seed": seed,
    }
    if engine.facts.known.image_start == "channels":
        return ImageToVideo(prompt, image=_first_frame(item), **shape)
    return TextToVideo(prompt, **shape)


def _first_frame(item: Item) -> Any:
    from PIL import Image

    from swiftwan.train.cache import pixels

    return Image.fromarray(pixels(item)[0].numpy())


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of a run's log; a last line that a kill cut off is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def forget_after(path: Path, step: int) -> None:
    """Take away the rows of steps that a resumed run will take again."""
    rows = [row for row in read_log(path) if row["step"] <= step]
    if path.is_file():
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw training and held-out loss as an SVG that stands alone."""
    drawn = [
        Series(word, number, [(row["step"], row[key]) for row in rows if key in row])
        for number, (word, key) in enumerate((("training", "loss"), ("held out", "held_out")))
    ]
    chart = lines([one for one in drawn if one.points], x="step", y="loss")
    svg = chart[: chart.index("</svg>") + len("</svg>")]
    head = svg.index(">") + 1
    text = svg[:head].replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ') + f"<style>{_STYLE}</style>"
    write_text(path, text + svg[head:])
