from itertools import product

import pytest
import torch

from swiftwan.errors import RequestError
from swiftwan.pocket.scenes import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    RADII,
    SHAPES,
    Scene,
    Thing,
    held_out_combinations,
    parse_prompt,
    sample_scenes,
)
from swiftwan.pocket.world import draw, gradient

EVERYTHING = list(product(COLOURS, SHAPES, MOTIONS))


# --- prompts ---


def test_prompts_read_as_english():
    red = Thing("red", "circle", "moves left")
    assert Scene((red,), "pink").prompt == "a red circle moves left over a pink background"
    pair = Scene((Thing("orange", "star", "spins"), Thing("blue", "square", "grows", "large")), "night")
    assert pair.prompt == "an orange star spins and a large blue square grows over a night background"


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_every_combination_survives_its_prompt(background):
    for combination, size in product(EVERYTHING, RADII):
        scene = Scene((Thing(*combination, size=size),), background)
        assert parse_prompt(scene.prompt) == scene


def test_sampled_scenes_survive_their_prompt():
    for scene in sample_scenes(2000, 8, "all"):
        assert parse_prompt(scene.prompt) == scene


def test_parsing_forgives_spelling():
    scene = Scene((Thing("orange", "star", "stays still"),), "gray")
    assert parse_prompt("  A  ORANGE star\nstays  still over an Grey background. ") == scene


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat over a blue background",
        "a red circle over a blue background",
        "a red circle moves left",
        "a pink circle moves left over a blue background",
        "a huge red circle moves left over a blue background",
        "a red circle spins and a red star spins and a red square spins over a blue background",
    ],
)
def test_other_text_is_not_a_scene(text):
    assert parse_prompt(text) is None


# --- splits ---


def test_held_out_combinations_leave_every_pair_of_words_in_training():
    held_out = held_out_combinations()
    assert len(held_out) == 29
    for one, other in product(held_out, held_out):
        assert one == other or sum(a == b for a, b in zip(one, other, strict=True)) < 2


def test_training_never_shows_a_held_out_combination():
    shown = [(t.colour, t.shape, t.motion) for scene in sample_scenes(4000, 3, "train") for t in scene.things]
    assert not held_out_combinations().intersection(shown)
    for words, place in ((COLOURS, 0), (SHAPES, 1), (MOTIONS, 2)):
        for word in words:
            share = sum(combination[place] == word for combination in shown) / len(shown)
            assert share > 0.8 / len(words), word


def test_each_held_out_scene_has_a_held_out_combination():
    for scene in sample_scenes(500, 3, "held-out"):
        assert held_out_combinations().intersection((t.colour, t.shape, t.motion) for t in scene.things)


@pytest.mark.parametrize("split", ["train", "held-out", "all"])
def test_samples_repeat_and_a_third_are_pairs(split):
    scenes = sample_scenes(2000, 11, split)
    assert scenes[:50] == sample_scenes(50, 11, split)
    assert scenes[:50] != sample_scenes(50, 12, split)
    pairs = [scene.things for scene in scenes if len(scene.things) == 2]
    assert 0.31 < len(pairs) / len(scenes) < 0.39
    assert all(first.colour != second.colour for first, second in pairs)


# --- colours ---


def test_colours_are_far_from_each_other_and_from_every_background():
    colours = torch.tensor(list(COLOURS.values())).float()
    apart = torch.cdist(colours, colours) + 999 * torch.eye(len(COLOURS))
    assert apart.min() > 100
    for background in BACKGROUNDS:
        # A still of one small thing, whose pixels are left out; many seeds for the tones and stars.
        scenes = [Scene((Thing("red", "circle", "stays still", "small"),), background)] * 60
        pixels = (draw(scenes, 1, num_frames=1) + 1).mul(127.5).movedim(1, -1)[:, :, ::2, ::2].reshape(-1, 3)
        red, row = colours[0], gradient(background, 128) * 255
        on_the_edge = (red - row.mean(0)) / (red - row.mean(0)).norm()
        pixels = pixels[(pixels - row.mean(0)) @ on_the_edge < 60]
        others = torch.cdist(pixels, colours)[:, 1:].min()
        assert others > 85, f"{background}: {others:.0f}"
        assert torch.cdist(row, colours).min() > 88, background


# --- clips ---


def test_a_clip_depends_only_on_its_scene_and_seed():
    scenes = sample_scenes(9, 2, "all")
    clips = draw(scenes, 40, num_frames=5, height=64, width=64)
    torch.testing.assert_close(clips, draw(scenes, 40, num_frames=5, height=64, width=64), rtol=0, atol=0)
    for i in (0, 4, 8):
        alone = draw([scenes[i]], 40 + i, num_frames=5, height=64, width=64)[0]
        torch.testing.assert_close(alone, clips[i], rtol=0, atol=1e-5)
    assert (draw(scenes, 41, num_frames=5, height=64, width=64) - clips).abs().amax(dim=(1, 2, 3, 4)).min() > 0.1


def test_other_sizes_and_lengths():
    clips = draw(sample_scenes(6, 2, "all"), 0, num_frames=9, height=96, width=160)
    assert clips.shape == (6, 3, 9, 96, 160)
    assert clips.dtype == torch.float32
    assert clips.isfinite().all()
    assert clips.abs().max() <= 1


def test_a_larger_picture_shows_the_same_scene():
    scenes = [scene for scene in sample_scenes(12, 5, "all") if scene.background != "night"]
    small = draw(scenes, 7, num_frames=3)
    large = draw(scenes, 7, num_frames=3, height=256, width=256)
    shrunk = torch.nn.functional.avg_pool3d(large, (1, 2, 2))
    assert (shrunk - small).abs().mean() < 0.005


def test_things_stay_inside_and_the_picture_changes_only_when_it_should():
    scenes = [Scene((Thing("red", "star", motion, "large"),), "green") for motion in MOTIONS] * 2
    clips = draw(scenes, 9)
    border = torch.cat([clips[..., 0, :], clips[..., -1, :], clips[..., :, 0], clips[..., :, -1]], dim=-1)
    assert (border[:, 0] < border[:, 1]).all(), "something red at the border"
    change = clips.diff(dim=2).abs().amax(dim=(1, 3, 4))
    still = torch.tensor([scene.things[0].motion == "stays still" for scene in scenes])
    assert change[still].max() == 0
    assert change[~still].amin() > 0.02


def test_the_middle_frame_is_the_still():
    scene = Scene((Thing("red", "circle", "spins"),), "gray")
    red = draw([scene] * 8, 3, num_frames=1)[:, 0, 0] - draw([scene] * 8, 3, num_frames=1)[:, 1, 0]
    seen = red > 0.6
    assert (seen.any(1).sum(1) - seen.any(2).sum(1)).abs().max() <= 2, "a coin in a still faces the viewer"


# --- wrong requests ---


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw([], 0), "no scenes"),
        (lambda: draw(sample_scenes(1, 0), 0, num_frames=0), "0 frames"),
        (lambda: draw(sample_scenes(1, 0), 0, height=31), "128x31 pixels.*32x32 or more"),
        (lambda: sample_scenes(1, 0, "heldout"), "Did you mean 'held-out'"),
        (lambda: sample_scenes(-1, 0), "-1 scenes"),
        (lambda: Thing("rde", "circle", "spins"), "Did you mean 'red'"),
        (lambda: Thing("red", "circle", "jumps"), "Known: bounces"),
        (lambda: Scene((), "pink"), "0 things"),
        (lambda: Scene((Thing("red", "circle", "spins"),), "grey"), "Did you mean 'gray'"),
    ],
)
def test_wrong_requests_say_the_way_out(call, message):
    with pytest.raises(RequestError, match=message):
        call()
