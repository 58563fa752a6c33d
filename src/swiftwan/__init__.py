"""swiftwan: run, measure and fine-tune Alibaba's Wan video models, fast."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swiftwan.engine import Engine
    from swiftwan.pipelines.request import Request, Result, StepEvent, TextToImage, TextToVideo
    from swiftwan.plan import Explanation, explain

_HOME = {
    "Engine": "swiftwan.engine",
    "Explanation": "swiftwan.plan",
    "Request": "swiftwan.pipelines.request",
    "Result": "swiftwan.pipelines.request",
    "StepEvent": "swiftwan.pipelines.request",
    "TextToImage": "swiftwan.pipelines.request",
    "TextToVideo": "swiftwan.pipelines.request",
    "explain": "swiftwan.plan",
}

__all__ = [
    "Engine",
    "Explanation",
    "Request",
    "Result",
    "StepEvent",
    "TextToImage",
    "TextToVideo",
    "errors",
    "explain",
]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: torch takes two seconds that `swiftwan --help` need not spend.
    if name == "errors":
        return import_module("swiftwan.errors")
    if name not in _HOME:
        raise AttributeError(f"module 'swiftwan' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
