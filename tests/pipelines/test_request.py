import dataclasses

import pytest

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
        ({"width": "abc"}, "width is 'abc'; it must be int"),
        ({"seed": True}, "seed is True"),
        ({"prompt": 3}, "prompt is 3; it must be str"),
    ],
    ids=str,
)
def test_foreign_json_is_refused(change, words):
    with pytest.raises(RequestError, match=words):
        request_from_json(checked().to_json() | change)
