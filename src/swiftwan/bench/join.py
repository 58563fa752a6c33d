"""Join parts of one matrix that ran apart, on machines of one kind, into one folder and one report.

Each part ran its own baseline beside its plans (``bench MATRIX --only PLAN``). Joined, the baseline's runs of all parts
count, so that its spread also tells how alike the machines were.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from swiftwan.bench.machine import Machine
from swiftwan.bench.rows import Journal, Row
from swiftwan.errors import OutputError, RequestError


def join(out: Path, parts: Sequence[Path]) -> Machine:
    """Copy the parts' lines and videos to ``out``, which may have been joined before; return their common machine.

    Raises:
        RequestError: a folder holds no rows, or the rows are of other devices, versions or code.
        OutputError: ``out`` cannot be written.
    """
    journals = {part: Journal(part / "journal.jsonl").read() for part in parts}
    for part, lines in journals.items():
        if not lines:
            raise RequestError(f"'{part}' holds no rows; give the --out of another part of this matrix.")
    machine = _common_machine(journals)
    try:
        (out / "videos").mkdir(parents=True, exist_ok=True)
        for part in parts:
            for video in sorted((part / "videos").glob("*")):
                shutil.copy2(video, out / "videos" / video.name)
    except OSError as error:
        raise OutputError(f"'{out}' cannot be written: {error.strerror}; give another --out.") from None
    journal = Journal(out / "journal.jsonl")
    have = journal.read()
    for line in (line for lines in journals.values() for line in lines):
        if line not in have:
            journal.append(line)
    return machine


def _common_machine(journals: dict[Path, list[Row]]) -> Machine:
    found: dict[str, tuple[Path, Machine]] = {}
    for part, lines in journals.items():
        for line in lines:
            versions = dict(line["versions"])
            machine = Machine(line["device"], versions, versions.pop("code"), line["commit"])
            found.setdefault(str(machine.identity), (part, machine))
    if len(found) > 1:
        (a, one), (b, other) = list(found.values())[:2]
        what = next(name for name in one.identity if one.identity[name] != other.identity[name])
        told = f"'{a}' has {what} {one.identity[what]}, '{b}' {other.identity[what]}"
        raise RequestError(f"these parts do not belong together: {told}; run them anew with the same.")
    return next(iter(found.values()))[1]
