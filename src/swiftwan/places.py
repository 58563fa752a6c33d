"""Where swiftwan keeps what it may make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """swiftwan's folder in the user's cache (``$XDG_CACHE_HOME`` or ``~/.cache``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swiftwan"
