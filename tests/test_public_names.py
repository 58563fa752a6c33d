"""The names that other programs may use. A change here is a change for them: CHANGELOG.md says so too."""

import inspect

import pytest

import swiftwan
from swiftwan import errors

PUBLIC = (
    "Blend",
    "Engine",
    "Explanation",
    "ImageToImage",
    "ImageToVideo",
    "Request",
    "Result",
    "StepEvent",
    "TextToImage",
    "TextToVideo",
    "VideoToVideo",
    "errors",
    "explain",
)

ERRORS = {
    "SwiftwanError": 1,
    "RequestError": 2,
    "PlanError": 2,
    "UnavailableError": 2,
    "WeightsError": 2,
    "OutputError": 2,
    "MemoryLimitError": 1,
    "Cancelled": 130,
}


def test_the_public_names_are_these() -> None:
    assert sorted(swiftwan.__all__) == sorted(PUBLIC)
    assert dir(swiftwan) == sorted(swiftwan.__all__)


@pytest.mark.parametrize("name", PUBLIC)
def test_each_public_name_is_there_and_explained(name: str) -> None:
    assert inspect.getdoc(getattr(swiftwan, name))


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Enigne"):
        _ = swiftwan.Enigne


def test_each_error_has_its_exit_code() -> None:
    found = {
        name: kind.exit_code
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, errors.SwiftwanError)
    }
    assert found == ERRORS
