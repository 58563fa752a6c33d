"""What a row must be told with to be believed: the device, the versions, the very code."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swiftwan.errors import RequestError

_PACKAGE = Path(__file__).parents[1]
_BESIDE_THE_POINT = ("bench", "cli", "serve", "train")
_TO_THE_POINT = ("bench/cell.py", "bench/peers.py")
"""Parts of the package that no measured number depends on, except these; a change there leaves finished rows valid."""


@dataclass(frozen=True)
class Machine:
    """Where and with what a row was measured. ``code`` stands for the package's source, also uncommitted."""

    device: str
    versions: dict[str, str]
    code: str
    commit: str | None

    @property
    def identity(self) -> dict[str, Any]:
        """What makes a row another row; a commit alone does not."""
        return {"device": self.device, "versions": self.versions, "code": self.code}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def this_machine(device: str | None) -> Machine:
    """Look at the device and the code; on a GPU this takes memory there, so call it in a process that ends."""
    from swiftwan.device import pick_device, versions

    where = pick_device(device)
    return Machine(where.name, versions(where), code_digest(_PACKAGE), _commit())


def code_digest(package: Path) -> str:
    """12 hexadecimal digits of the source that runs in a cell."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package).as_posix()
        if inside.split("/")[0] not in _BESIDE_THE_POINT or inside in _TO_THE_POINT:
            digest.update(inside.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _commit() -> str | None:
    """The source's commit, if it is a clone; ``-dirty`` if it was changed since."""
    command = ["git", "-C", str(_PACKAGE), "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.strip() or None


def main(device: str) -> None:
    """Tell this machine as one line of JSON on standard output, or what is wrong with the device asked for."""
    try:
        told = this_machine(device or None).to_json()
    except RequestError as problem:
        told = {"error": str(problem)}
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
