"""Regression: what got worse between two files of rows, beyond their noise.

A time is worse when every new run is slower than every old one and the medians differ by more than 3 %. Memory
by 2 %. Quality does not vary on one machine, so small limits hold there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from swiftwan.bench.rows import Row
from swiftwan.bench.summary import number
from swiftwan.errors import RequestError

TIME_FLOOR = 0.03
MEMORY_FLOOR = 0.02
LIMITS = {
    "psnr_db": -0.5,
    "ssim": -0.005,
    "clip_score": -0.005,
    "lpips": 0.005,
    "judge_percent": -0.1,
    "pocket_clip_score": -0.01,
    "pocket_perceptual": 0.005,
}
"""The least change that counts, signed in the direction of worse."""

_NEEDED = ("model", "request_name", "plan_name", "device", "status")


@dataclass(frozen=True)
class Change:
    """One value of one cell, then and now."""

    cell: str
    what: str
    old: float | str
    new: float | str

    def __str__(self) -> str:
        if isinstance(self.old, str) or isinstance(self.new, str):
            return f"{self.cell}: {self.what} was {self.old}, is {self.new}"
        return f"{self.cell}: {self.what} was {self.old:.4g}, is {self.new:.4g}"


def worse(old: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    """What is worse in ``new``; cells that only one of them has are no change, except finished ones that are gone.

    Raises:
        RequestError: the files cannot be compared; see :func:`check_comparable`.
    """
    after = {_cell(row): row for row in new}
    check_comparable(old, after, {row["device"] for row in new})
    before = {_cell(row): row for row in old}
    changes = []
    for name, row in before.items():
        if name in after:
            changes += _changes(name, row, after[name])
        elif row["status"] == "ok":
            changes.append(Change(name, "status", "ok", "not there"))
    return changes


def check_comparable(old: Sequence[Row], cells: Collection[str], devices: set[str]) -> None:
    """Refuse rows that a run of these cells on these devices cannot be compared with, before it takes its hours.

    Raises:
        RequestError: they are no rows of ``swiftwan bench``, of other devices, or of other cells alone.
    """
    for name in _NEEDED:
        if not all(name in row for row in old):
            raise RequestError(
                f"a row to compare with has no '{name}'; give the rows.jsonl of another 'swiftwan bench'."
            )
    theirs = {row["device"] for row in old}
    if theirs != devices:
        told = " and ".join(", ".join(sorted(names)) or "nothing" for names in (theirs, devices))
        raise RequestError(f"the rows are of other devices: {told}; only one machine's times can be compared.")
    if not {_cell(row) for row in old} & set(cells):
        raise RequestError("the two files have no cell in common; compare runs of the same matrix.")


def _changes(name: str, old: Row, new: Row) -> list[Change]:
    if old["status"] != "ok":
        return []
    if new["status"] != "ok":
        return [Change(name, "status", "ok", f"{new['status']} ({new['reason']})")]
    changes = []
    if new["spread"][0] > old["spread"][1] and new["seconds"] > old["seconds"] * (1 + TIME_FLOOR):
        changes.append(Change(name, "seconds", old["seconds"], new["seconds"]))
    if new["peak_bytes"] > old["peak_bytes"] * (1 + MEMORY_FLOOR):
        changes.append(Change(name, "peak_bytes", old["peak_bytes"], new["peak_bytes"]))
    for what, limit in LIMITS.items():
        then, now = number(old, what), number(new, what)
        if then is not None and now is not None and (now - then) / limit >= 1:
            changes.append(Change(name, what, then, now))
    return changes


def _cell(row: Row) -> str:
    return f"{row['model']} / {row['request_name']} / {row['plan_name']}"
