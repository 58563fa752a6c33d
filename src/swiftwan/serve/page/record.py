"""The settings inside a file that someone brings, read in a process of its own.

What parses a container is native code, and the file may be anybody's: it runs with little memory and time, and not
in the process that holds the key.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from swiftwan.errors import OutputError, SwiftwanError

_SECONDS = 20
_BYTES = 2 * 2**30


def read_settings(path: Path) -> dict[str, Any]:
    """The record that swiftwan wrote into an .mp4 or .png.

    Raises:
        OutputError: it is neither of the two, or carries none.
    """
    command = [sys.executable, "-m", __name__, str(path)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=2 * _SECONDS, text=True, check=False)
    except subprocess.TimeoutExpired:
        raise OutputError("the file takes too long to read; only files that swiftwan wrote carry settings.") from None
    if done.returncode:
        raise OutputError("the file carries no swiftwan settings; only .mp4 and .png files that swiftwan wrote do.")
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def main(path: str) -> None:
    try:
        import resource
    except ModuleNotFoundError:  # Windows has no such limits
        pass
    else:
        resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    from swiftwan.media import read_record

    try:
        sys.stdout.write(json.dumps(read_record(Path(path))))
    except SwiftwanError:
        raise SystemExit(1) from None


if __name__ == "__main__":
    main(sys.argv[1])
