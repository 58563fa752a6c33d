"""Scorers' weights on the hub: from its cache, else downloaded, else a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from swiftwan.errors import reason
from swiftwan.measure.missing import Missing

T = TypeVar("T")


def read_from_hub(name: str, read: Callable[[bool], T]) -> T | Missing:
    """What ``read(local_files_only)`` makes of a hub id or a folder: from what is here first, then from the hub.

    A hub that cannot be reached is Missing at once; its own clients would try for a minute, in every cell.
    """
    from huggingface_hub import HfApi, errors

    try:
        try:
            return read(True)
        except (OSError, ValueError):
            if Path(name).exists():
                raise
            HfApi().model_info(name, timeout=10)
            return read(False)
    except (OSError, ValueError, errors.HTTPError, errors.HfHubHTTPError) as problem:
        return Missing(f"'{name}' is neither here nor to be had: {' '.join(reason(problem).split())[:200]}")
