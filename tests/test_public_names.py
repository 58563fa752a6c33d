"""The names that other programs may use. A change here is a change for them: CHANGELOG.md says so too."""

import inspect

import pytest

import swiftwan
from swiftwan import errors

PUBLIC = ("Engine", "TextToVideo", "ImageToVideo", "TextToImage", "ImageToImage", "Blend", "Result")

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


has_names = pytest.mark.skipif(
    not hasattr(swiftwan, "__all__"), reason="swiftwan/__init__.py is not there yet"
)


@has_names
def test_the_public_names_are_there_and_listed() -> None:
    assert set(PUBLIC) <= set(swiftwan.__all__)
    assert all(getattr(swiftwan, name) is not None for name in swiftwan.__all__)
    assert set(swiftwan.__all__) <= set(dir(swiftwan))


@has_names
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
