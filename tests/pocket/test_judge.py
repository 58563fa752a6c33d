from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import conv2d, pad

from swiftwan.engine import Engine
from swiftwan.errors import RequestError
from swiftwan.pocket.judge import Observation, SeenThing, compare, judge, read_clip
from swiftwan.pocket.scenes import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    RADII,
    SHAPES,
    Scene,
    Thing,
    parse_prompt,
    sample_scenes,
)
from swiftwan.pocket.world import draw

WORDS = {"colour": COLOURS, "shape": SHAPES, "motion": MOTIONS, "size": RADII}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Many small operations: on two busy cores a second thread made this file six times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def to_bytes(clips):
    return ((clips + 1) * 127.5).round().clamp(0, 255).byte().movedim(1, -1).contiguous()


def blur(clips, sigma):
    reach = int(4 * sigma)
    weights = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    weights = weights / weights.sum()
    images = pad(clips.transpose(1, 2).flatten(0, 1), (reach,) * 4, mode="replicate").flatten(0, 1)[:, None]
    images = conv2d(conv2d(images, weights[None, None, None]), weights[None, None, :, None])
    return images.view(clips.transpose(1, 2).shape).transpose(1, 2)


def wrong_share(clips, scenes):
    """The share of wrong answers to each question, and what was seen where any was wrong."""
    wrong, asked, seen = Counter(), Counter(), []
    for frames, scene in zip(clips, scenes, strict=True):
        verdict = judge(frames, scene)
        for what in ("background", "colours_present"):
            wrong[what] += not getattr(verdict, what)
            asked[what] += 1
        for thing in verdict.things:
            for what in ("found", *WORDS):
                wrong[what] += not getattr(thing, what)
                asked[what] += 1
        if not verdict.right:
            seen.append(f"{scene.prompt} | {verdict.seen}")
    return {what: wrong[what] / asked[what] for what in asked}, seen


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_true_clips_are_right(split):
    scenes = sample_scenes(48, 21, split)
    wrong, seen = wrong_share(to_bytes(draw(scenes, 100)), scenes)
    assert max(wrong.values()) <= 0.01, seen


def test_blurred_noisy_paled_clips_are_right():
    scenes = sample_scenes(32, 22, "all")
    clips = blur(draw(scenes, 200), sigma=1.0) * 0.95 + 0.02
    noise = torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    wrong, seen = wrong_share(to_bytes(clips + 0.04 * noise), scenes)
    assert max(wrong.values()) <= 0.03, seen


@pytest.fixture(scope="module")
def vae():
    return Engine.load("pocket", plan=[], device="cpu", dtype="fp32").parts.vae


@pytest.mark.parametrize("shape", SHAPES)
def test_small_things_through_the_vae_keep_their_shape(vae, shape):
    """The corners come back round: a small star is a pentagon, which the sharp shapes alone call a circle."""
    things = (Thing("purple", shape, "stays still", "small"), Thing("orange", shape, "spins"))
    scene = Scene(things, "green")
    clip = draw([scene], 16, num_frames=17)
    seen = read_clip(to_bytes(vae.decode(vae.encode(clip)))[0])
    assert [thing.shape for thing in compare(seen, scene).things] == [True, True], str(seen)
    for other in set(SHAPES) - {shape}:
        lie = replace(scene, things=tuple(replace(thing, shape=other) for thing in things))
        assert not any(thing.shape for thing in compare(seen, lie).things)


def test_a_few_frames_with_specks_elsewhere_do_not_hide_a_shape():
    scene = parse_prompt("a small orange triangle stays still over a night background")
    frames = to_bytes(draw([scene], 8))[0]
    left = not read_clip(frames[:1, :, :64]).things
    frames[18:20, 60:70, slice(2, 6) if left else slice(122, 126)] = torch.tensor(COLOURS["orange"], dtype=torch.uint8)
    assert read_clip(frames).things[0].shape == "triangle"


def test_any_wrong_word_is_told():
    scenes = sample_scenes(32, 23, "all")
    told, asked = Counter(), Counter()
    for number, (frames, scene) in enumerate(zip(to_bytes(draw(scenes, 300)), scenes, strict=True)):
        seen = read_clip(frames)
        others = [word for word in BACKGROUNDS if word != scene.background]
        lie = replace(scene, background=others[number % len(others)])
        told["background"] += not compare(seen, lie).background
        asked["background"] += 1
        for what, words in WORDS.items():
            others = [word for word in words if word not in {getattr(thing, what) for thing in scene.things}]
            slot = number % len(scene.things)
            things = list(scene.things)
            things[slot] = replace(things[slot], **{what: others[number % len(others)]})
            verdict = compare(seen, replace(scene, things=tuple(things)))
            told[what] += getattr(verdict.things[slot], what) is False and not verdict.right
            asked[what] += 1
    assert all(told[what] >= 0.99 * asked[what] for what in asked), (told, asked)


def test_a_still_is_judged_without_its_motion():
    scenes = sample_scenes(32, 24, "all")
    for frames, scene in zip(to_bytes(draw(scenes, 400, num_frames=1)), scenes, strict=True):
        verdict = judge(frames, scene)
        assert verdict.right, f"{scene.prompt} | {verdict.seen}"
        assert all(thing.motion is None for thing in verdict.things)


@pytest.mark.parametrize(("num_frames", "height", "width"), [(9, 96, 160), (33, 192, 144), (17, 64, 64)])
def test_other_sizes_and_lengths(num_frames, height, width):
    scenes = sample_scenes(12, 25, "all")
    wrong, seen = wrong_share(to_bytes(draw(scenes, 500, num_frames, height, width)), scenes)
    assert max(wrong.values()) == 0, seen


def test_nothing_of_the_world_is_seen_as_nothing():
    noise = torch.randint(0, 256, (5, 128, 128, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    seen = read_clip(noise)
    assert str(seen) == "nothing over no known background"
    verdict = compare(seen, sample_scenes(1, 0)[0])
    assert not verdict.right
    assert not verdict.things[0].found


def test_a_thing_too_many_or_too_few_is_told():
    pair = parse_prompt("a red circle spins and a blue star grows over a gray background")
    alone = replace(pair, things=pair.things[:1])
    missing = judge(to_bytes(draw([alone], 1))[0], pair)
    assert [thing.found for thing in missing.things] == [True, False]
    assert not missing.colours_present
    extra = judge(to_bytes(draw([pair], 1))[0], alone)
    assert extra.things[0].colour
    assert extra.things[0].motion
    assert not extra.colours_present
    assert not extra.right


def test_a_clip_says_in_words_what_it_shows():
    prompt = "a large red square moves left over a pink background"
    seen = read_clip(to_bytes(draw([parse_prompt(prompt)], 6))[0])
    assert str(seen) == "large red square moves left over pink"


def test_things_are_paired_by_what_fits_best():
    seen = Observation(
        "gray",
        (SeenThing("blue", "star", "grows", "medium"), SeenThing("red", "circle", "grows", "medium")),
        num_frames=33,
    )
    scene = Scene((Thing("red", "circle", "spins"), Thing("blue", "star", "grows")), "gray")
    first, second = compare(seen, scene).things
    assert second.right
    assert (first.colour, first.shape, first.motion, first.size) == (True, True, False, True)


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(5, 64, 64, 3),
        torch.zeros(5, 3, 64, 64, dtype=torch.uint8),
        torch.zeros(64, 64, 3, dtype=torch.uint8),
        torch.zeros(0, 64, 64, 3, dtype=torch.uint8),
    ],
)
def test_other_tensors_are_refused(frames):
    with pytest.raises(RequestError, match=r"the judge reads torch.uint8 \(F, H, W, 3\)"):
        read_clip(frames)


@pytest.mark.parametrize("seed", [3, 4, 10, 13, 15, 16])
def test_blotches_that_are_no_thing_are_read_all_the_same(seed):
    """A colour here and there, never of eight pixels in one frame: a student's first clips look so."""
    size = (2, 3, 4, 6, 8, 12)[seed % 6]
    blotches = torch.rand(1, 3, 3, size, size, generator=torch.Generator().manual_seed(seed))
    video = torch.nn.functional.interpolate(blotches, size=(9, 128, 128), mode="trilinear" if seed % 2 else "nearest")
    seen = read_clip((video[0].permute(1, 2, 3, 0) * 255).round().to(torch.uint8))
    colours = [thing.colour for thing in seen.things]
    assert len(set(colours)) == len(colours)
    assert set(colours) <= set(COLOURS)
