"""A value that could not be measured, and why: it stands where the number would, and the run goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Missing:
    """Why there is no value; in JSON ``{"missing": reason}``."""

    reason: str

    def to_json(self) -> dict[str, str]:
        return {"missing": self.reason}


def to_json(value: Any) -> Any:
    """A measurement as JSON takes it."""
    return value.to_json() if isinstance(value, Missing) else value
