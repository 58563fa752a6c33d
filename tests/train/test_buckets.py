from pathlib import Path

import pytest

from swiftwan.errors import RequestError
from swiftwan.models.config import KNOWN_MODELS
from swiftwan.train.buckets import Bucket, Shapes, batches, hold_out
from swiftwan.train.data import Clip

WAN = KNOWN_MODELS["wan2.1-t2v-1.3b"]
SHAPES = Shapes.of(WAN, 832, 480, 81)


def clip(width=832, height=480, frames=81, fps=16.0, name="a.mp4"):
    return Clip(Path(name), "words", width, height, frames, fps if frames > 1 else None, name)


def test_a_clip_in_the_model_s_own_shape():
    (item,) = SHAPES.items(clip())
    assert item.bucket == Bucket(832, 480, 81)
    assert SHAPES.tokens(item.bucket) == 32_760
    assert item.indices == tuple(range(81))


@pytest.mark.parametrize("width", [200, 480, 832, 1000, 1920])
@pytest.mark.parametrize("height", [160, 480, 1080])
def test_sizes_keep_the_aspect_within_the_area(width, height):
    w, h = SHAPES.size(clip(width, height))
    assert w % 16 == h % 16 == 0
    assert w * h <= 832 * 480
    assert w / h == pytest.approx(width / height, rel=0.12)


def test_motion_keeps_its_speed():
    first, second = Shapes.of(WAN, 832, 480, 41).items(clip(frames=75, fps=30.0))
    assert (first.bucket.frames, second.bucket.frames) == (29, 9)
    assert first.indices[:5] == (0, 2, 4, 6, 8)
    assert first.indices[-1] == round(28 * 30 / 16)


def test_long_clips_give_several_items_and_short_ones_a_shorter():
    items = SHAPES.items(clip(frames=150))
    assert [item.bucket.frames for item in items] == [81, 61]
    assert items[1].indices[0] == 81
    assert [item.bucket.frames for item in SHAPES.items(clip(frames=50))] == [41]
    with pytest.raises(RequestError, match="too short: 20 frames at 16 a second; the shortest item has 21"):
        SHAPES.items(clip(frames=20))


def test_an_image_is_one_frame():
    image = clip(frames=1, name="a.png")
    (item,) = SHAPES.items(image)
    assert item.bucket == Bucket(832, 480, 1)
    assert SHAPES.tokens(item.bucket) == 1560


def test_sizes_off_the_grid_are_refused():
    with pytest.raises(RequestError, match="frames is 80"):
        Shapes.of(WAN, 832, 480, 80)
    with pytest.raises(RequestError, match="width is 830"):
        Shapes.of(WAN, 830, 480, 81)


def test_an_epoch_has_each_item_once_in_batches_of_one_shape():
    items = [item for n in (30, 50, 81, 81, 150, 500) for item in SHAPES.items(clip(frames=n, name=f"{n}.mp4"))]
    budget = 70_000
    made = batches(items, SHAPES, budget, seed=1, epoch=0)
    assert sorted(number for batch in made for number in batch) == list(range(len(items)))
    for batch in made:
        (bucket,) = {items[number].bucket for number in batch}
        assert len(batch) == 1 or len(batch) * SHAPES.tokens(bucket) <= budget
    assert max(map(len, made)) > 1
    assert made == batches(items, SHAPES, budget, seed=1, epoch=0)
    other = batches(items, SHAPES, budget, seed=1, epoch=1)
    assert made != other
    assert len(made) == len(other)


def test_what_is_held_out_does_not_depend_on_order():
    items = [item for n in range(10) for item in SHAPES.items(clip(frames=170, name=f"{n}.mp4"))]
    train, aside = hold_out(items, 0.2)
    assert len({item.clip.path for item in aside}) == 2
    assert not {item.clip.path for item in aside} & {item.clip.path for item in train}
    assert len(train) + len(aside) == len(items)
    again = hold_out(items[::-1], 0.2)[1]
    assert {item.clip.path for item in again} == {item.clip.path for item in aside}
    assert hold_out(items, 0.0)[1] == []
    assert len({item.clip.path for item in hold_out(items, 0.01)[1]}) == 1
