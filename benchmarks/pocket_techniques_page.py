"""Write the tables of docs/techniques.md from benchmarks/pocket_techniques.jsonl: of each plan the last good row
of the H200, of most prompts, of most steps.

    python benchmarks/pocket_techniques_page.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "benchmarks" / "pocket_techniques.jsonl"
PAGE = ROOT / "docs" / "techniques.md"

HEAD = """\
| plan | judge, points beside the plain run | clips worse / better of | PSNR in dB, mean (least) | SSIM |
|---|---|---|---|---|
"""


def tables(lines: Iterable[str]) -> dict[str, str]:
    """A table for each rung, the best for the judge first."""
    last: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in lines:
        row = json.loads(line)
        if row["status"] != "ok" or "superseded" in row:  # by a technique that does something else since
            continue
        key = tuple(row["plan"])
        if _trust(row) >= _trust(last.get(key, row)):
            last[key] = row
    found: dict[str, str] = {}
    for rung in dict.fromkeys(row["rung"] for row in last.values()):
        rows = sorted((row for row in last.values() if row["rung"] == rung), key=_order)
        found[rung] = HEAD + "".join(map(_line, rows))
    return found


def _trust(row: dict[str, Any]) -> tuple[bool, int, int]:
    return row["device"] == "NVIDIA H200", row["prompts"], row["steps"]


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["device"] != "NVIDIA H200", row["plain_judge_percent"] - row["judge_percent"], -row["psnr_db"]


def _line(row: dict[str, Any]) -> str:
    change = row["judge_percent"] - row["plain_judge_percent"]
    points = f"{change:+.1f}" if round(change, 1) else "0"
    where = "" if row["device"] == "NVIDIA H200" else f" (CPU, {row['dtype']}, {row['steps']} steps)"
    if not where and row["steps"] != 50:
        where = f" ({row['steps']} steps)"
    counts = f"{row['clips_worse']} / {row['clips_better']} of {row['prompts']}"
    return (
        f"| `{' '.join(row['plan'])}`{where} | {points} | {counts} "
        f"| {row['psnr_db']:.1f} ({row['psnr_db_smallest']:.1f}) | {row['ssim']:.3f} |\n"
    )


def page(text: str, lines: Iterable[str]) -> str:
    """The page with its tables made anew, each between its two comments."""
    for rung, table in tables(lines).items():
        between = re.compile(rf"(<!-- {rung}: [^>]* -->\n).*?(<!-- end -->)", re.DOTALL)
        text = between.sub(lambda found, table=table: found[1] + table + found[2], text)
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), ROWS.read_text().splitlines()), encoding="utf-8")
