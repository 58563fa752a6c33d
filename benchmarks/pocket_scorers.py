"""Do the pocket world's scorers put right before wrong? Held-out scenes, drawn, through the VAE, and generated.

    python benchmarks/pocket_scorers.py pocket_scorers.jsonl [--scorers FILE] [--scenes 200] [--generated 64]

Each row is a share of pairs in the right order (0.5 is chance), with its count. Distances stand beside those of plain
pixels (mean squared error) and of SSIM on the same pairs.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import swiftwan as sw
from swiftwan.device import pick_device, versions
from swiftwan.measure.quality import ssim
from swiftwan.pocket.judge import judge
from swiftwan.pocket.scenes import Scene, sample_scenes
from swiftwan.pocket.scorers import FILE, PocketScorers
from swiftwan.pocket.world import draw
from swiftwan.train.pocket_scorers import CHANGES, DISTORTIONS, MILD, changed

SEED = 20_000
DEGREES = (0.05, 0.1, 0.2, 0.4, 0.8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scorers", type=Path, default=FILE)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--generated", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device")
    options = parser.parse_args()
    where = pick_device(options.device)
    device = torch.device(where.torch_device)
    model = PocketScorers()
    model.load_state_dict({name: weight.float() for name, weight in load_file(options.scorers).items()})
    model.to(device).eval()
    facts = {"device": where.name, "versions": versions(where), "date": datetime.now(UTC).date().isoformat()}
    scenes = sample_scenes(options.scenes, SEED, "held-out")
    engine = sw.Engine.load("pocket", device=options.device)

    def write(rows: Iterator[dict[str, Any]]) -> None:
        for row in rows:
            with options.out.open("a") as file:
                file.write(json.dumps(row | facts) + "\n")
            print(json.dumps(row), flush=True)

    clips = [frames_of(scene, SEED + i, device) for i, scene in enumerate(scenes)]
    write(distances(model, scenes, clips, device))
    write(prompts(model, scenes, clips, "drawn"))
    few = options.scenes // 2
    rebuilt = [through_vae(engine, clip) for clip in clips[:few]]
    write(prompts(model, scenes[:few], rebuilt, "drawn, through the VAE"))
    made = []
    for i, scene in enumerate(scenes[: options.generated]):
        made.append(engine.run(sw.TextToVideo(scene.prompt, seed=i, num_inference_steps=options.steps)).frames)
    write(prompts(model, scenes[: options.generated], made, f"generated, {options.steps} steps"))
    write(beside_the_judge(model, scenes[: options.generated], made))


def frames_of(scene: Scene, seed: int, device: torch.device) -> Tensor:
    """A clip as uint8 (F, H, W, 3)."""
    drawn = draw([scene], seed, num_frames=17, device=device)[0]
    return as_frames(drawn.transpose(0, 1)).cpu()


def as_frames(pictures: Tensor) -> Tensor:
    """(F, 3, H, W) in -1 to 1 as uint8 (F, H, W, 3)."""
    return ((pictures + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@torch.no_grad()
def through_vae(engine: sw.Engine, frames: Tensor) -> Tensor:
    vae = engine.parts.vae
    weight = next(vae.parameters())
    video = (frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1).to(weight.device, weight.dtype)
    return torch.cat([chunk.cpu() for chunk in vae.stream_frames(vae.encode(video))])


def prompts(model: PocketScorers, scenes: list[Scene], clips: list[Tensor], source: str) -> Iterator[dict[str, Any]]:
    """Share of clips that score higher with their own prompt than with one word of it changed."""
    chance = random.Random(SEED)
    for what in CHANGES:
        margins = []
        for scene, clip in zip(scenes, clips, strict=True):
            if (wrong := changed(scene, what, chance)) is not None:
                margins.append(model.clip_score(clip, scene) - model.clip_score(clip, wrong))
        if margins:
            yield {
                "case": "right before wrong prompt",
                "clips": source,
                "changed": what,
                "pairs": len(margins),
                "share_in_order": sum(margin > 0 for margin in margins) / len(margins),
                "mean_margin": sum(margins) / len(margins),
            }


def beside_the_judge(model: PocketScorers, scenes: list[Scene], clips: list[Tensor]) -> Iterator[dict[str, Any]]:
    """Mean score of generated clips whose still words the judge finds right, and of the others."""
    scores = defaultdict(list)
    for scene, clip in zip(scenes, clips, strict=True):
        verdict = judge(clip, scene)
        still = [
            verdict.background,
            *(word for t in verdict.things for word in (t.colour, t.shape) if word is not None),
        ]
        scores[all(still)].append(model.clip_score(clip, scene))
    yield {
        "case": "score beside the judge",
        "right_clips": len(scores[True]),
        "right_mean": mean(scores[True]),
        "wrong_clips": len(scores[False]),
        "wrong_mean": mean(scores[False]),
    }


def distances(
    model: PocketScorers, scenes: list[Scene], clips: list[Tensor], device: torch.device
) -> Iterator[dict[str, Any]]:
    """Share of distortions in the order of their degree, and of changed words beyond mild distortions."""
    measures: dict[str, Callable[[Tensor, Tensor], float]] = {
        "pocket_perceptual": model.distance,
        "mean_squared_error": lambda a, b: (a.float() - b.float()).square().mean().item(),
        "one_minus_ssim": lambda a, b: 1 - ssim(a, b),
    }
    generator = torch.Generator(device).manual_seed(SEED)
    chance = random.Random(SEED)
    few = [(scene, clip[::4]) for scene, clip in zip(scenes, clips, strict=True)][:100]
    mild: dict[int, Tensor] = {}
    for kind, distort in DISTORTIONS.items():
        in_order: dict[str, list[bool]] = defaultdict(list)
        far = defaultdict(list)
        for i, (_, clip) in enumerate(few):
            pictures = clip.permute(0, 3, 1, 2).to(device).float() / 127.5 - 1
            worse = [as_frames(distort(pictures, degree, generator)).cpu() for degree in DEGREES]
            for name, measure in measures.items():
                values = [measure(each, clip) for each in worse]
                in_order[name] += [a < b for a, b in zip(values, values[1:], strict=False)]
                far[name].append(values)
            if chance.random() < 1 / len(DISTORTIONS) or kind == "coarse":
                mild.setdefault(i, as_frames(distort(pictures, MILD * chance.random(), generator)).cpu())
        yield {
            "case": "small before large distortion",
            "distortion": kind,
            "degrees": DEGREES,
            "pairs": len(in_order["pocket_perceptual"]),
            "share_in_order": {name: mean(shares) for name, shares in in_order.items()},
            "mean_distance": [mean(column) for column in zip(*far["pocket_perceptual"], strict=True)],
        }
    for what in CHANGES:
        in_order = defaultdict(list)
        for i, (scene, clip) in enumerate(few):
            other = changed(scene, what, chance)
            if other is None:
                continue
            wrong = frames_of(other, SEED + i, device)[::4]
            for name, measure in measures.items():
                in_order[name].append(measure(mild[i], clip) < measure(wrong, clip))
        yield {
            "case": "mild distortion before changed word",
            "changed": what,
            "pairs": len(in_order["pocket_perceptual"]),
            "share_in_order": {name: mean(shares) for name, shares in in_order.items()},
        }


def mean(values: Any) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


if __name__ == "__main__":
    main()
