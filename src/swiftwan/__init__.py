"""swiftwan: run, measure and fine-tune Alibaba's Wan video models, fast."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from swiftwan.collector import uncollected

if TYPE_CHECKING:
    from swiftwan.engine import Engine
    from swiftwan.pipelines.request import (
        Blend,
        ImageToImage,
        ImageToVideo,
        Request,
        TextToImage,
        TextToVideo,
        VideoToVideo,
    )
    from swiftwan.pipelines.result import Result, StepEvent
    from swiftwan.plan import Explanation, explain

_HOME = {
    "Blend": "swiftwan.pipelines.request",
    "Engine": "swiftwan.engine",
    "Explanation": "swiftwan.plan",
    "ImageToImage": "swiftwan.pipelines.request",
    "ImageToVideo": "swiftwan.pipelines.request",
    "Request": "swiftwan.pipelines.request",
    "Result": "swiftwan.pipelines.result",
    "StepEvent": "swiftwan.pipelines.result",
    "TextToImage": "swiftwan.pipelines.request",
    "TextToVideo": "swiftwan.pipelines.request",
    "VideoToVideo": "swiftwan.pipelines.request",
    "explain": "swiftwan.plan",
}

__all__ = [
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
]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: torch takes two seconds that `swiftwan --help` need not spend.
    if name == "errors":
        return import_module("swiftwan.errors")
    if name not in _HOME:
        raise AttributeError(f"module 'swiftwan' has no attribute '{name}'")
    with uncollected():
        home = import_module(_HOME[name])
    return getattr(home, name)


def __dir__() -> list[str]:
    return __all__
