"""`pocket-tasks`: what the embedded model does with images and videos, counted by the judge of `swiftwan.pocket`.

    python benchmarks/pocket_tasks.py [--scenes 32] [--steps 20] [--task blend] >> benchmarks/pocket_tasks.jsonl

One row a task. Scenes have one thing each, drawn by the world, half of them with a combination of colour, shape and
motion that training never saw. `psnr` is in dB against the given pixels: the smallest, the median and the mean.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import swiftwan as sw
from swiftwan.device import versions
from swiftwan.pocket.judge import judge, read_clip
from swiftwan.pocket.scenes import COLOURS, SHAPES, Scene, sample_scenes
from swiftwan.pocket.world import draw

CREATIVITY = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device")
    parser.add_argument("--task", choices=[measure.__name__ for measure in MEASURES], action="append")
    options = parser.parse_args()
    engine = sw.Engine.load("pocket", device=options.device)
    half = options.scenes // 2
    scenes = [*one_thing(half, "held-out"), *one_thing(half, "train")]
    settings = {"num_inference_steps": options.steps}
    for measure in MEASURES:
        if options.task and measure.__name__ not in options.task:
            continue
        row = {"case": "pocket-tasks", "rung": "exact", "plan": [], "task": measure.__name__, "scenes": len(scenes)}
        row |= measure(engine, scenes, settings)
        row |= {
            **settings,
            "dtype": engine.dtype_name,
            "device": engine.device.name,
            "versions": versions(engine.device),
            "date": datetime.date.today().isoformat(),
        }
        print(json.dumps(row), flush=True)


def one_thing(count: int, split: str) -> list[Scene]:
    return [scene for scene in sample_scenes(4 * count, 907, split) if len(scene.things) == 1][:count]


def drawn(scene: Scene, seed: int, num_frames: int = 33) -> Tensor:
    """uint8 (F, H, W, 3)."""
    clip = draw([scene], seed, num_frames=num_frames)[0]
    return ((clip.permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def images(frames: Tensor) -> list[Image.Image]:
    return [Image.fromarray(frame.numpy()) for frame in frames]


def still(scene: Scene, **changes: str) -> Scene:
    return replace(scene, things=(replace(scene.things[0], motion="stays still", size="large", **changes),))


def other(scene: Scene, step: int) -> Scene:
    """The same place with a thing of another colour and shape."""
    colours, shapes = list(COLOURS), list(SHAPES)
    colour = colours[(colours.index(scene.things[0].colour) + step) % len(colours)]
    shape = shapes[(shapes.index(scene.things[0].shape) + 1) % len(shapes)]
    return still(scene, colour=colour, shape=shape)


def psnr(a: Tensor, b: Tensor) -> float:
    return (10 * torch.log10(255**2 / (a.float() - b.float()).square().mean())).item()


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "smallest": round(min(values), 2),
        "median": round(statistics.median(values), 2),
        "mean": round(statistics.mean(values), 2),
    }


def percent(marks: Sequence[bool]) -> float:
    return round(100 * sum(marks) / len(marks), 1)


def words_right(verdicts: Sequence[Any]) -> dict[str, float]:
    return {"background": percent([v.background for v in verdicts])} | {
        what: percent([bool(getattr(v.things[0], what)) for v in verdicts])
        for what in ("colour", "shape", "motion", "size")
    }


def image_to_video(engine: sw.Engine, scenes: list[Scene], settings: dict[str, Any]) -> dict[str, Any]:
    kept, verdicts = [], []
    for seed, scene in enumerate(scenes):
        first = drawn(scene, seed)[:1]
        result = engine.run(sw.ImageToVideo(scene.prompt, image=images(first)[0], seed=seed, **settings))
        kept.append(psnr(result.frames[:1], first))
        verdicts.append(judge(result.frames, scene))
    over = percent([value > 28 for value in kept])
    return {"first_frame_psnr": spread(kept), "percent_over_28_dB": over, "percent_right": words_right(verdicts)}


def video_to_video(engine: sw.Engine, scenes: list[Scene], settings: dict[str, Any]) -> dict[str, Any]:
    """The prompt asks for another colour; shape, motion and background should stay."""
    verdicts = []
    for seed, scene in enumerate(scenes):
        colours = list(COLOURS)
        colour = colours[(colours.index(scene.things[0].colour) + 1) % len(colours)]
        asked = replace(scene, things=(replace(scene.things[0], colour=colour),))
        video = images(drawn(scene, seed))
        result = engine.run(sw.VideoToVideo(asked.prompt, video=video, creativity=0.75, seed=seed, **settings))
        verdicts.append(judge(result.frames, asked))
    return {"creativity": 0.75, "percent_right": words_right(verdicts)}


def image_to_image(engine: sw.Engine, scenes: list[Scene], settings: dict[str, Any]) -> dict[str, Any]:
    rows = {}
    for creativity in CREATIVITY:
        kept, image_colour, text_colour = [], [], []
        for seed, scene in enumerate(scenes):
            given, asked = still(scene), other(scene, 3)
            pixels = drawn(given, seed, num_frames=1)
            request = sw.ImageToImage(
                asked.prompt, image=images(pixels)[0], creativity=creativity, seed=seed, **settings
            )
            result = engine.run(request)
            colours = {thing.colour for thing in read_clip(result.frames).things}
            kept.append(psnr(result.frames, pixels))
            image_colour.append(given.things[0].colour in colours)
            text_colour.append(asked.things[0].colour in colours)
        rows[str(creativity)] = {
            "psnr": spread(kept),
            "percent_with_the_images_colour": percent(image_colour),
            "percent_with_the_texts_colour": percent(text_colour),
        }
    return {"creativity": rows}


def blend(engine: sw.Engine, scenes: list[Scene], settings: dict[str, Any]) -> dict[str, Any]:
    rows = {}
    for creativity in (0.0, 0.3, 0.5, 0.7):
        both = [shows_both(engine, pair, seed, creativity, settings) for seed, pair in enumerate(pairs(scenes))]
        rows[str(creativity)] = {"percent_with_both_colours": percent(both)}
    return {"creativity": rows}


def pairs(scenes: list[Scene]) -> Iterator[tuple[Scene, Scene]]:
    for scene in scenes:
        yield still(scene), other(scene, 3)


def shows_both(
    engine: sw.Engine, pair: tuple[Scene, Scene], seed: int, creativity: float, settings: dict[str, Any]
) -> bool:
    words = " and ".join(scene.things[0].phrase for scene in pair)
    given = [images(drawn(scene, seed + 500 * k, num_frames=1))[0] for k, scene in enumerate(pair)]
    prompt = f"{words} over a {pair[0].background} background"
    result = engine.run(sw.Blend(prompt, images=given, creativity=creativity, seed=seed, **settings))
    seen = {thing.colour for thing in read_clip(result.frames).things}
    return seen >= {scene.things[0].colour for scene in pair}


MEASURES = (image_to_video, video_to_video, image_to_image, blend)

if __name__ == "__main__":
    main()
