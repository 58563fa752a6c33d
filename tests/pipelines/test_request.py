import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

import swiftwan as sw
from swiftwan.errors import RequestError
from swiftwan.models.config import KNOWN_MODELS
from swiftwan.pipelines.request import Grid, request_from_json

GRID = Grid(spatial=16, temporal=4)
DEFAULTS = KNOWN_MODELS["wan2.1-t2v-1.3b"].defaults


def checked(prompt="a cat", experts=1, **fields):
    request = sw.TextToVideo(prompt, **fields).completed(DEFAULTS)
    request.check(GRID, experts=experts)
    return request


def test_defaults_are_the_models_own():
    request = checked()
    assert (request.width, request.height, request.num_frames, request.fps) == (832, 480, 81, 16)
    assert (request.num_inference_steps, request.guidance_scale, request.flow_shift) == (50, 6.0, 5.0)
    assert request.negative_prompt == DEFAULTS.negative_prompt
    assert request.seed is not None


def test_what_is_given_stays():
    request = checked(width=320, guidance_scale=0, negative_prompt="", seed=0)
    assert (request.width, request.guidance_scale, request.negative_prompt, request.seed) == (320, 0, "", 0)


def test_a_request_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        sw.TextToVideo("a cat").seed = 3


def test_an_image_has_one_frame():
    assert sw.TextToImage("a cat").completed(DEFAULTS).num_frames == 1
    with pytest.raises(TypeError, match="positional"):
        sw.TextToImage("a cat", 1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_frames": 80}, "num_frames is 80; Wan needs 4k + 1. Nearest: 77 or 81"),
        ({"num_frames": 0}, "Nearest: 1 or 5"),
        ({"num_frames": -3}, "Nearest: 1 or 5"),
        ({"width": 830}, "width is 830; this model needs a multiple of 16. Nearest: 816 or 832"),
        ({"height": 7}, "Nearest: 16 or 32"),
        ({"height": -16}, "height is -16"),
        ({"prompt": "  \n"}, "prompt is empty"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; allowed: 1 to 1000"),
        ({"seed": -1}, "seed is -1; allowed: 0 to 9223372036854775807."),
        ({"flow_shift": 0}, "flow_shift is 0; allowed: 0.01 to 100."),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"flow_shift": -1.0}, "flow_shift is -1.0"),
        ({"fps": 0}, "fps is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"guidance_scale_2": 3.0}, "has one transformer"),
    ],
    ids=str,
)
def test_bad_values_name_the_limit_and_the_way_out(fields, words):
    with pytest.raises(RequestError, match=words.replace("(", r"\(").replace("+", r"\+")):
        checked(**fields)


def test_json_goes_there_and_back():
    request = checked(seed=5)
    assert request_from_json(request.to_json()) == request


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": "TextToVidio"}, "Did you mean 'TextToVideo'"),
        ({"widht": 320}, "has no field 'widht'. Did you mean 'width'"),
        ({"width": "abc"}, "width is 'abc'; it must be a whole number"),
        ({"seed": True}, "seed is True"),
        ({"prompt": 3}, "prompt is 3; it must be text"),
    ],
    ids=str,
)
def test_foreign_json_is_refused(change, words):
    with pytest.raises(RequestError, match=words):
        request_from_json(checked().to_json() | change)


# Tasks that bring images


def complete(request):
    request = request.completed(DEFAULTS)
    request.check(GRID, experts=1)
    return request


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (sw.ImageToImage("x", image="a.png", creativity=1.1), "creativity is 1.1; allowed: 0 to 1"),
        (sw.ImageToImage("x", image="a.png", creativity=-0.1), "creativity is -0.1"),
        (sw.VideoToVideo("x", video="a.mp4", creativity=float("nan")), "creativity is nan"),
        (sw.Blend("x", images=["a.png"]), "a blend of 1 image; it takes two or more"),
        (sw.Blend("x", images=["a", "b"], weights=[1]), "1 weights for 2 images"),
        (sw.Blend("x", images=["a", "b"], weights=[0, 0]), "sum to zero"),
        (sw.Blend("x", images=["a", "b"], weights=[1, -1]), "a weight is -1; allowed: 0 to 1000000"),
        (sw.Blend("x", images=["a", "b"], weights=[1, float("nan")]), "a weight is nan"),
        (sw.ImageToVideo("x", image="a", num_frames=1), "num_frames is 1, and ImageToVideo's first frame is its image"),
    ],
    ids=str,
)
def test_bad_tasks_say_the_limit(request_, words):
    with pytest.raises(RequestError, match=words):
        complete(request_)


IMAGE = sw.ImageToVideo("x", image="a.png")
ENDS = sw.ImageToVideo("x", image="a.png", last_image="b.png")


@pytest.mark.parametrize(
    ("model", "request_", "words"),
    [
        ("wan2.1-t2v-14b", IMAGE, "'wan2.1-t2v-14b' cannot begin a video with an image; take one that can"),
        ("wan2.2-t2v-a14b", IMAGE, "cannot begin a video with an image"),
        ("wan2.1-i2v-14b-480p", sw.TextToVideo("x"), "makes videos from an image, and this is TextToVideo"),
        ("wan2.2-i2v-a14b", sw.ImageToImage("x", image="a"), "makes videos from an image"),
        ("wan2.1-i2v-14b-720p", ENDS, "knows no last image"),
        ("wan2.2-ti2v-5b", ENDS, "knows no last image"),
        ("wan2.1-flf2v-14b", IMAGE, "give last_image"),
    ],
    ids=str,
)
def test_a_model_that_cannot_do_a_task_names_one_that_can(model, request_, words):
    with pytest.raises(RequestError, match=words):
        request_.check_model(KNOWN_MODELS[model])


@pytest.mark.parametrize(
    ("model", "request_"),
    [
        ("wan2.1-i2v-14b-480p", IMAGE),
        ("wan2.1-flf2v-14b", ENDS),
        ("wan2.2-i2v-a14b", IMAGE),
        ("wan2.2-i2v-a14b", ENDS),
        ("wan2.2-ti2v-5b", IMAGE),
        ("wan2.2-ti2v-5b", sw.TextToImage("x")),
        ("wan2.1-t2v-1.3b", sw.VideoToVideo("x", video="a")),
        ("wan2.2-t2v-a14b", sw.Blend("x", images=["a", "b"])),
    ],
    ids=str,
)
def test_models_do_their_tasks(model, request_):
    request_.check_model(KNOWN_MODELS[model])


@pytest.mark.parametrize(
    ("creativity", "steps", "runs"),
    [(0, 20, 0), (0.01, 20, 1), (0.29, 100, 29), (0.6, 20, 12), (0.99, 20, 19), (1, 20, 20)],
)
def test_creativity_is_a_share_of_the_steps(creativity, steps, runs):
    assert sw.ImageToImage("x", image="a", creativity=creativity, num_inference_steps=steps).steps_to_run == runs


@pytest.mark.parametrize(
    "request_",
    [
        ENDS,
        sw.ImageToImage("x", image="a.png", creativity=0),
        sw.Blend("x", images=["a", "b"], weights=[1, 2.5]),
        sw.VideoToVideo("x", video="a.mp4", seed=3),
    ],
    ids=lambda request: type(request).__name__,
)
def test_tasks_go_through_json_and_back(request_):
    told = json.loads(json.dumps(request_.to_json()))
    assert request_from_json(told) == request_


def test_paths_and_images_in_memory_in_json():
    assert sw.ImageToVideo("x", image=Path("a/b.png")).to_json()["image"] == str(Path("a/b.png"))
    told = sw.ImageToVideo("x", image=Image.new("RGB", (2, 2))).to_json()
    assert told["image"].startswith("memory:")
    with pytest.raises(RequestError, match="image was given in memory .* so no file holds it"):
        request_from_json(told)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"task": "ImageToVideo", "prompt": "x"}, "ImageToVideo needs image; give it"),
        ({"task": "Blend"}, "Blend needs prompt and images; give them"),
        ({"task": "Blend", "prompt": "x", "images": "a.png"}, "images is 'a.png'; it must be a list"),
        ({"task": "Blend", "prompt": "x", "images": ["a", 3]}, "image is 3; it must be text"),
        ({"task": "Blend", "prompt": "x", "images": ["a", "b"], "weights": ["1", 2]}, "weight is '1'"),
        ({"task": "ImageToImage", "prompt": "x", "image": "a", "creativity": True}, "creativity is True"),
        ({"task": "ImageToImage", "prompt": "x", "image": "a", "creativty": 1}, "Did you mean 'creativity'"),
    ],
    ids=str,
)
def test_foreign_tasks_are_refused(values, words):
    with pytest.raises(RequestError, match=words):
        request_from_json(values)
