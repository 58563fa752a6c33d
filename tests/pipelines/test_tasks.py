"""Each task on the embedded model: what it shows, and what must be exact."""

import pytest
import torch
from PIL import Image

import swiftwan as sw
from swiftwan.pocket.judge import judge, read_clip
from swiftwan.pocket.scenes import parse_prompt
from swiftwan.pocket.world import draw

MOVES = "a red circle moves left over a blue background"
CIRCLE = "a red circle stays still over a gray background"
SQUARE = "a yellow square stays still over a gray background"
STAR = "a blue star stays still over a gray background"
BOTH = "a red circle stays still and a yellow square stays still over a gray background"


@pytest.fixture(scope="module")
def engine():
    return sw.Engine.load("pocket", plan=[], device="cpu", dtype="fp32")


def frames_of(prompt, seed, num_frames=33):
    clip = draw([parse_prompt(prompt)], seed, num_frames=num_frames)[0]
    return ((clip.permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def images_of(frames):
    return [Image.fromarray(frame.numpy()) for frame in frames]


def psnr(a, b):
    return (10 * torch.log10(255**2 / (a.float() - b.float()).square().mean())).item()


@pytest.fixture(scope="module")
def circle():
    return frames_of(CIRCLE, 3, num_frames=1)


def test_image_to_video_begins_with_its_image_and_follows_its_prompt(engine):
    first = frames_of(MOVES, 3)[:1]
    (image,) = images_of(first)
    result = engine.run(sw.ImageToVideo(MOVES, image=image, seed=1, num_inference_steps=8))
    assert psnr(result.frames[:1], first) > 28
    verdict = judge(result.frames, parse_prompt(MOVES))
    assert verdict.right, verdict.seen
    assert list(result.seconds)[:2] == ["image", "text"]


def test_creativity_goes_from_the_image_to_the_text(engine, circle):
    (image,) = images_of(circle)
    likeness = []
    for creativity in (0, 0.3, 0.6, 1):
        asked = sw.ImageToImage(
            STAR, image=image, creativity=creativity, seed=1, num_inference_steps=10, guidance_scale=4.0
        )
        result = engine.run(asked)
        assert len(result.step_seconds) == 10 * creativity
        likeness.append(psnr(result.frames, circle))
    assert likeness[0] > 30
    assert likeness[:3] == sorted(likeness[:3], reverse=True)
    assert likeness[3] < likeness[1]
    assert judge(result.frames, parse_prompt(STAR)).right


def test_at_its_ends_creativity_is_exact(engine, circle):
    (image,) = images_of(circle)
    through = engine.run(sw.ImageToImage(STAR, image=image, creativity=0, seed=1))
    pixels = circle.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    assert torch.equal(through.latents, engine.parts.vae.encode(pixels))
    free = engine.run(sw.ImageToImage(STAR, image=image, creativity=1, seed=1, num_inference_steps=2))
    words = engine.run(sw.TextToImage(STAR, seed=1, num_inference_steps=2))
    assert torch.equal(free.latents, words.latents)
    assert torch.equal(free.frames, words.frames)


def test_a_blend_shows_both_images(engine, circle):
    images = images_of(circle) + images_of(frames_of(SQUARE, 9, num_frames=1))
    result = engine.run(sw.Blend(BOTH, images=images, creativity=0.5, seed=1, num_inference_steps=10))
    seen = read_clip(result.frames)
    assert {thing.colour for thing in seen.things} == {"red", "yellow"}, seen
    assert seen.background == "gray"


def test_a_blend_is_the_weighted_mean_of_latents(engine, circle):
    images = images_of(circle) + images_of(frames_of(SQUARE, 9, num_frames=1))

    def latents(weights, images=images):
        return engine.run(sw.Blend(BOTH, images=images, weights=weights, creativity=0, seed=1)).latents

    one, other = latents((1, 0)), latents((0, 3))
    assert torch.allclose(latents((1, 3)), 0.25 * one + 0.75 * other, atol=1e-5)
    assert torch.allclose(latents(None), 0.5 * (one + other), atol=1e-5)


def test_video_to_video_keeps_the_motion_and_takes_the_words(engine):
    clip = images_of(frames_of(MOVES, 3))
    asked = MOVES.replace("red", "yellow")
    result = engine.run(sw.VideoToVideo(asked, video=clip, creativity=0.75, seed=1, num_inference_steps=12))
    assert result.frames.shape == (33, 128, 128, 3)
    verdict = judge(result.frames, parse_prompt(asked))
    assert verdict.things[0].colour, verdict.seen
    assert verdict.things[0].motion, verdict.seen


@pytest.mark.parametrize("scheduler", ["unipc", "euler", "heun", "dpm++", "lcm"])
def test_every_solver_starts_in_the_middle(engine, circle, scheduler):
    """From the image's own latents, noised a little, any solver of the flow comes back near the image."""
    (image,) = images_of(circle)
    asked = sw.ImageToImage(
        CIRCLE, image=image, creativity=0.2, seed=1, num_inference_steps=20, scheduler=scheduler, guidance_scale=1
    )
    result = engine.run(asked)
    assert len(result.step_seconds) == (7 if scheduler == "heun" else 4)
    assert psnr(result.frames, circle) > 24
    assert judge(result.frames, parse_prompt(CIRCLE)).things[0].colour
