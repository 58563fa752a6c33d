"""A verb's options as one frozen object: Typer reads them off the fields of a dataclass."""

from collections.abc import Callable
from inspect import signature
from typing import TypeVar

Options = TypeVar("Options")


def takes(options: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Give a verb that takes ``options`` its fields as options of the command line."""

    def decorate(verb: Callable[[Options], None]) -> Callable[..., None]:
        def command(**values: object) -> None:
            verb(options(**values))

        fields = signature(options)
        command.__name__, command.__doc__ = verb.__name__, verb.__doc__
        command.__signature__ = fields  # type: ignore[attr-defined]
        command.__annotations__ = {name: field.annotation for name, field in fields.parameters.items()}
        return command

    return decorate
