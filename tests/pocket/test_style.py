"""The style that the shipped LoRA was trained on, and what the LoRA does."""

import pytest
import torch

from swiftwan.engine import Engine
from swiftwan.pipelines.request import TextToVideo
from swiftwan.pocket.scenes import parse_prompt, sample_scenes
from swiftwan.pocket.style import likeness, silhouette, training_clips
from swiftwan.techniques.lora import shipped
from swiftwan.weights.lora import describe


def test_training_clips_are_silhouettes_under_their_own_captions():
    clips = training_clips(3, seed=5)
    assert [caption for _, caption in clips] == [scene.prompt for scene in sample_scenes(3, 5)]
    for frames, caption in clips:
        assert (frames.shape, frames.dtype) == ((33, 128, 128, 3), torch.uint8)
        assert likeness(frames) > 0.95
        assert parse_prompt(caption) is not None


def test_a_silhouette_keeps_shape_and_motion():
    scene = parse_prompt("a small red circle moves left over a blue background")
    assert silhouette(scene).prompt == "a small black circle moves left over a sunset background"


def test_the_shipped_lora_is_small_and_for_pocket():
    assert shipped("silhouettes").stat().st_size < 1_000_000
    assert describe(shipped("silhouettes"))["for"] == "pocket"


@pytest.mark.parametrize("prompt", ["a green star bounces over a gray background"])
def test_the_shipped_lora_restyles(prompt):
    request = TextToVideo(prompt, seed=3, num_frames=9, num_inference_steps=8, guidance_scale=2.0)
    plain, styled = (
        likeness(Engine.load("pocket", plan=plan, device="cpu").run(request).frames)
        for plan in ([], ["lora:silhouettes"])
    )
    assert plain < 0.3
    assert styled > 0.8
