"""The ladder: from exact to few-step, each rung's time, ratio, memory and error, as one page made from rows.

    python benchmarks/ladder.py [benchmarks/*.jsonl] [--out docs/ladder.md]

A row counts if it has a case of true size, a rung and a device with a GPU, or is the embedded model's on a CPU. Of the
same plan and case the last one stands, so a file of rows only grows; of a case and rung the fastest plan is shown
first, and all others below it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

Row = dict[str, Any]
HERE = Path(__file__).parent
RUNGS = ("bound", "exact", "near", "sparse50", "sparse25", "sparse12", "approximate", "few-step")
"""From the strictest on; others that rows name come behind. ``bound`` is work that no exact run is spared."""
KINDS = ("forward-", "image-", "video-", "vae", "cold-", "train-", "growth-", "pocket-cpu")
"""How the cases of the page begin, in its order; rows of others stand on pages of their own."""
AIMS = {
    "forward-1.3b-832x480x81": 0.410,
    "forward-1.3b-1280x720x97": 2.5,
    "forward-ti2v-5b-1280x704x121": 0.760,
    "forward-14b-1280x720x81": 10.1,
    "image-1.3b-832x480x1": 0.015,
    "video-1.3b-832x480x81": 42.0,
    "cold-1.3b": 10.0,
    "vae-832x480x81": 0.7,
    "vae-1280x720x81": 0.7 * 639.2 / 275.4,  # in proportion to the TFLOP
    "vae22-1280x704x121": 0.7 * 2011.1 / 275.4,
    "train-1.3b-832x480x81": 1.6,
}
"""Seconds that the exact rung was to reach."""
RUNG_AIMS = {
    "forward-1.3b-832x480x81": {"near": 0.300, "sparse25": 0.160, "sparse12": 0.120},
    "image-1.3b-832x480x1": {"near": 0.011},
    "video-1.3b-832x480x81": {"approximate": 7.0, "few-step": 1.4},
    "train-1.3b-832x480x81": {"exact-24gb": 1.75, "near": 1.45},
}
"""Seconds that rungs below exact were to reach."""
RATIO_AIMS = {
    "video-seed-001-1280x720x97": {"exact": 15, "near": 18, "approximate": 100},
    "pocket-cpu": {"exact": 1.5},
}
"""How many times faster than the peer rungs were to be."""
FORWARDS_OF = {
    "video-1.3b-832x480x81": (50, "forward-1.3b-832x480x81"),
    "video-seed-001-1280x720x97": (65, "forward-1.3b-1280x720x97"),
}
"""Of how many guided steps, and of what forwards, a whole video is made."""
INTRO = """# The ladder

Made from the rows in `benchmarks/` by `python benchmarks/ladder.py`; do not edit. One H200, random weights of the true
architectures, ours and the peer by turns in one process; `pocket-cpu` is the embedded model on two CPU cores, from the
start of a process to its mp4. *Ratio* is the peer's time over ours, in brackets that of others in the same run; of
forwards the median over the turns, which differs a little from the quotient of the times shown. *Of ceiling* is the
time that the plain run's matrix products, convolutions and attention would take at the highest rates measured on the
chip in the row's number format, over ours; it passes 100 % where work is left out or done with fewer multiplications.
*Error* is the relative distance to the run that the row names.
*Bound* is the matrix products and self-attention of a forward alone, back to back on inputs that stand ready.
*Sustained* is a run repeated for seconds without a pause: at the chip's limit of 700 W clocks fall from 1980 MHz until
the power fits, so that time follows energy. *Peak* is not shown for diffusers' whole videos: both stand in one process
there, and until commit 64c422e the peer's prompt was encoded with gradients, which kept 10 GB that are none of its own;
[plans.md](plans.md) has its memory alone.
"""

GROWTH = """Wan2.1-T2V-1.3B on one H200: the exact plan, diffusers eager, and the FLOP line, the same products and
self-attention at the highest rates measured (`benchmarks/h200_growth.jsonl`). Small work waits for the CPU that
launches its kernels: one picture is 0.2 of the line, 9 frames or four pictures 0.7, 81 frames 0.87."""


def read(paths: Iterable[Path]) -> list[Row]:
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines() if line.strip()]
    rows = [row for row in rows if row.get("case") and row.get("rung") and on_page(row)]
    rows = [row for row in rows if row["case"].startswith(KINDS) and " check " not in row["case"]]
    return sorted(rows, key=lambda row: [row["case"].startswith(kind) for kind in KINDS].index(True))


def on_page(row: Row) -> bool:
    """A GPU's; of a CPU's the embedded model's case alone."""
    return row["case"] == "pocket-cpu" or "CPU" not in str(row.get("device"))


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of rows that measure the same thing the last one, with those of its commit beside other peers; one without a
    peer replaces none that has one."""
    rows = list(rows)
    last = {measured(row): row.get("commit") for row in rows}
    compared = {measured(row): row.get("commit") for row in rows if row.get("peer")}
    found = {
        (measured(row), row.get("peer")): row
        for row in rows
        if row.get("commit") == (compared if row.get("peer") else last)[measured(row)]
    }
    return list(found.values())


def measured(row: Row) -> str:
    """What a row tells of: its case and plan, and the settings that a plan does not name."""
    return json.dumps([row.get(key) for key in ("case", "rung", "plan", "runner", "variant", "steps", "dtype")])


def page(rows: Sequence[Row], figures: Sequence[str] = ()) -> str:
    """The page; ``figures`` are files beside it, of time against frames, resolution, batch and steps."""
    rows = [row for row in latest(rows) if not str(row["case"]).startswith("growth-")]
    bounds = {row["case"]: row for row in rows if row["rung"] == "bound" and row.get("variant", "exact") == "exact"}
    order = {case: place for place, case in enumerate(dict.fromkeys(row["case"] for row in rows))}
    parts = [INTRO]
    for case, of_case in groupby(sorted(rows, key=lambda row: order[row["case"]]), key=lambda row: row["case"]):
        found = list(of_case)
        done = [row for row in found if row.get("status", "ok") == "ok" and row.get("seconds")]
        failed = [row for row in found if row.get("status", "ok") != "ok"]
        if not done and not failed:
            continue
        parts.append(f"## {case}" + (f"\n\n{against_aim(case, done, bounds)}" if case in AIMS else ""))
        parts += [against_rung_aim(rung, aim, done) for rung, aim in RUNG_AIMS.get(case, {}).items()]
        parts += [against_ratio(case, rung, aim, done, bounds) for rung, aim in RATIO_AIMS.get(case, {}).items()]
        if done:
            parts.append(table(sorted(done, key=place)))
        if failed:
            parts.append("\n".join(f"- {name(row)}: {row['status']}: {row.get('reason', '')}" for row in failed))
    parts.append("## As the work grows")
    if figures:
        parts.append(GROWTH)
    parts += [f"![{figure.removesuffix('.svg').replace('-', ': ', 1)}]({figure})" for figure in figures] or [
        "Not measured yet: `benchmarks/h200_growth.py` makes rows and figures of time against frames, resolution, "
        "batch and steps, with the FLOP line in them."
    ]
    return "\n\n".join(parts) + "\n"


def against_aim(case: str, rows: Sequence[Row], bounds: Mapping[str, Row]) -> str:
    """Whether the fastest exact run reached its aim; if not, what its matrix products and attention alone take."""
    aim = AIMS[case]
    told = f"Aim of the exact rung: {seconds(aim)}"
    exact = [row for row in rows if row["rung"] == "exact" and not is_peer(row)]
    if not exact:
        return f"{told}; not measured."
    if min(row["seconds"] for row in exact) <= aim:
        return f"{told}; reached."
    count, forward = forwards_of(case, bounds)
    if forward not in bounds:
        return f"{told}; not reached."
    if "steady" not in bounds[forward]:
        return f"{told}; not reached. {seconds(bounds[forward]['seconds'])} are {bounds[forward]['runner']}."
    steady = bounds[forward]["steady"]
    alone, of_forwards = count * steady["seconds"], f" of {count:.1f} forwards" if count > 1 else ""
    told += (
        f"; not reached. The matrix products and self-attention alone{of_forwards}, "
        f"with nothing between them, sustained: {seconds(alone)}, {joules(count * steady['joules_a_run'])}, "
        f"{steady['power_mean_watts']:.0f} W"
    )
    if alone > aim:
        return f"{told}. With these kernels the chip's power does not allow the aim."
    rest = min(row.get("steady", row)["seconds"] for row in exact) - alone
    return f"{told}. The aim leaves {seconds(aim - alone)} for all else, which takes {seconds(rest)}."


def against_rung_aim(rung: str, aim: float, rows: Sequence[Row]) -> str:
    """How far the fastest run of a rung is from its aim; ``few-step, near`` is a few-step too."""
    taken = [row["seconds"] for row in rows if row["rung"].partition(",")[0] == rung and not is_peer(row)]
    told = f"Aim of {rung}: {seconds(aim)}; "
    if not taken:
        return told + "not measured."
    best = min(taken)
    if best <= aim:
        return told + f"reached, {seconds(best)}."
    percent = 100 * (best / aim - 1)
    told += f"not reached, by {percent:.1f} %." if percent < 1 else f"not reached, by {percent:.0f} %."
    bounds = [row for row in rows if row["rung"] == "bound" and row.get("variant") == rung]
    sustained = [row["steady"]["seconds"] for row in rows if row["rung"] == rung and row.get("steady")]
    if not bounds or not sustained:
        return told
    steady, card = bounds[-1]["steady"], f", {bounds[-1]['card']}" if bounds[-1].get("card") else ""
    alone = steady["seconds"]
    return (
        f"{told} Its matrix products and self-attention alone, with nothing between them, sustained{card}: "
        f"{seconds(alone)}, {joules(steady['joules_a_run'])}, {steady['power_mean_watts']:.0f} W. The aim leaves "
        f"{seconds(aim - alone)} for all else; the whole takes {seconds(min(sustained))}, sustained."
    )


def against_ratio(case: str, rung: str, aim: float, rows: Sequence[Row], bounds: Mapping[str, Row]) -> str:
    """Whether a rung is so many times faster than its peer; of an exact one that is not, what it could be at most."""
    found = [row for row in rows if row["rung"] == rung and not is_peer(row) and row.get("ratio")]
    told = f"Aim of {rung}: {aim:g}x; "
    if not found:
        return told + "not measured."
    best = max(found, key=lambda row: float(row["ratio"]))
    if best["ratio"] >= aim:
        return told + f"reached, {best['ratio']:.1f}x."
    told += f"not reached: {best['ratio']:.1f}x."
    count, forward = forwards_of(case, bounds)
    if rung != "exact" or forward not in bounds:
        return told
    alone = count * bounds[forward]["steady"]["seconds"]
    return (
        f"{told} The matrix products and self-attention of {count:.1f} forwards alone, with nothing between them, "
        f"sustained: {seconds(alone)}, {best['peer_seconds'] / alone:.1f}x."
    )


def forwards_of(case: str, bounds: Mapping[str, Row]) -> tuple[float, str]:
    """How many forwards a case takes, and of which: of a guided step two, less the first block's self-attention, which
    the second prediction is spared; with its products, at the ceilings, 0.8 to 0.9 of one block of 1.3B's thirty."""
    if case not in FORWARDS_OF:
        return 1, case
    steps, forward = FORWARDS_OF[case]
    if forward not in bounds:
        return 2 * steps, forward
    tokens, dim, ffn_dim, layers = bounds[forward]["tokens"], 1536, 8960, 30
    attention, projections = 4 * tokens**2 * dim / 708, 8 * tokens * dim**2 / 782  # operations over TFLOP/s
    block = attention + (12 * tokens * dim**2 + 4 * tokens * dim * ffn_dim) / 782
    return steps * (2 - (attention + projections) / block / layers), forward


def place(row: Row) -> tuple[int, float]:
    rung = -1 if is_peer(row) else RUNGS.index(row["rung"]) if row["rung"] in RUNGS else len(RUNGS)
    return rung, row["seconds"]


def is_peer(row: Row) -> bool:
    return str(row.get("runner", "")).startswith("diffusers")


def name(row: Row) -> str:
    said = (
        row.get("runner")
        if is_peer(row)
        else "`" + (" ".join(row.get("plan") or ()) or row.get("runner", "plain")) + "`"
    )
    return str(said) + (f", {row['variant']}" if isinstance(row.get("variant"), str) else "")


def table(rows: Sequence[Row]) -> str:
    head = ("rung", "plan", "time", "spread, repeats", "peer", "ratio", "of ceiling", "peak", "error", "sustained")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = (
            "peer" if is_peer(row) else row["rung"],
            name(row),
            seconds(row["seconds"]),
            ", ".join(filter(None, (spread(row.get("spread")), str(row.get("repeats", ""))))),
            "" if is_peer(row) or not row.get("peer_seconds") else f"{row['peer']}: {seconds(row['peer_seconds'])}",
            "" if is_peer(row) else ratios(row),
            f"{100 * row['ceiling_fraction']:.0f} %" if row.get("ceiling_fraction") else "",
            "" if is_peer(row) and row["case"].startswith("video-") else peak(row.get("peak_bytes")),
            f"{row['error']:.2g}" if isinstance(row.get("error"), float) else "",
            sustained(row.get("steady") or {}),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratios(row: Row) -> str:
    """To the peer that the row names, and to the others that took turns with it."""
    if not row.get("ratio"):
        return ""
    kinds = ("compiled-fp8", "compiled", "eager")
    to = {kind: row.get(f"ratio_to_{kind}", row["ratio"]) for kind in kinds}
    others = [f"{kind} {ratio:.2f}x" for kind, ratio in to.items() if ratio != row["ratio"]]
    return f"{row['ratio']:.2f}x" + (f" ({', '.join(others)})" if others else "")


def spread(found: Any) -> str:
    """Fastest and slowest, or what lies between them."""
    if isinstance(found, list) and found:
        return f"{seconds(found[0])} to {seconds(found[1])}"
    return f"{seconds(found)} wide" if isinstance(found, float) else ""


def sustained(steady: Row) -> str:
    """What a run without a pause took of time, power and clock."""
    if not steady.get("power_mean_watts"):
        return ""
    watts, clock = steady["power_mean_watts"], steady["sm_clock_mean_mhz"]
    return f"{seconds(steady['seconds'])}, {watts:.0f} W, {clock:.0f} MHz, {joules(steady['joules_a_run'])}"


def peak(count: int | None) -> str:
    return f"{count / 1e9:.1f} GB" if count else ""


def joules(value: float) -> str:
    return f"{value / 1000:.3g} kJ" if value >= 1000 else f"{value:.3g} J"


def seconds(value: float) -> str:
    return f"{1000 * value:.1f} ms" if value < 0.1 else f"{1000 * value:.0f} ms" if value < 1 else f"{value:.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", type=Path, default=sorted(HERE.glob("*.jsonl")))
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "ladder.md")
    arguments = parser.parse_args()
    figures = sorted(path.name for path in arguments.out.parent.glob("growth-*.svg"))
    arguments.out.write_text(page(read(arguments.rows), figures))


if __name__ == "__main__":
    main()
