"""Every pair of techniques on the embedded model: which combine, and what the others say; the table of the docs.

    python benchmarks/pocket_pairs.py [--device cuda] [--out benchmarks/pocket_pairs.jsonl]
    python benchmarks/pocket_pairs.py --write        # the tables into docs/plans.md, from the rows

A pair whose plan is refused is a row with the reason. One that is accepted runs, and its row says how far the latents
are from the plain run's: nothing may fail that was accepted. A pair that the file has a row of, from this device, is
left out unless it failed, so a second call goes on where the first ended.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import subprocess
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import swiftwan as sw
from swiftwan.device import Device, pick_device, versions
from swiftwan.errors import PlanError
from swiftwan.plan import describe, make_plan, parse
from swiftwan.techniques import TECHNIQUES
from swiftwan.techniques.base import RELOAD

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "pocket_pairs.jsonl", HERE.parent / "docs" / "plans.md"
REQUEST = sw.TextToVideo("a red circle moves left over a blue background", seed=1, num_inference_steps=4, num_frames=9)
PROOF = (
    "attention:cudnn", "attention:flash4", "attention:sdpa", "batched-cfg", "cfg-interval", "cfg-skip:first=1",
    "compile", "cuda-graphs", "deepcache:block-num=3", "dtype:bf16", "few-step", "fused", "offload:auto:budget=0.02",
    "offload:blocks", "offload:model", "prompt-cache:off", "quantize:fp8", "quantize:int4", "quantize:int8",
    "quantize:nf4:keep=1", "quantize:int4:on=text", "sparse-attention:keep=0.5", "step-cache:first=1,last=1",
    "text-encoder:blocks", "text-encoder:cpu", "text-encoder:unload", "tf32", "vae:bf16", "vae:fast",
    "vae:tiling:sample=64,stride=48",
)  # fmt: skip
"""One spec of each technique, and more where its values are different things."""

NEEDS_A_FILE = {"lora"}


def specs() -> list[str]:
    """Those of techniques that there are; one that this list forgets takes part by its name."""
    named = [spec for spec in PROOF if spec.partition(":")[0] in TECHNIQUES]
    forgotten = TECHNIQUES.keys() - {spec.partition(":")[0] for spec in PROOF} - NEEDS_A_FILE
    return sorted([*named, *forgotten])


def refusal(pair: Sequence[str], device: Device) -> str:
    """Why the plan is refused on this device, in the words of the error; empty if it is not."""
    try:
        make_plan(list(dict.fromkeys(pair)), device, None, describe("pocket"))
    except PlanError as problem:
        return str(problem)
    return ""


class Loaded:
    """One engine at a time, switched to the next plan where that does, else loaded anew."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.engines: dict[tuple[str, ...], sw.Engine] = {}

    def has(self, model: str, plan: Sequence[str]) -> bool:
        """Whether a switch does."""
        return self._key(model, plan) in self.engines

    def engine(self, model: str, plan: Sequence[str]) -> sw.Engine:
        if not self.has(model, plan):
            self.engines.clear()
            key = self._key(model, plan)
            self.engines[key] = sw.Engine.load(model, plan=key[1:], device=self.device.torch_device)
        (engine,) = self.engines.values()
        engine.switch(plan)
        return engine

    def _key(self, model: str, plan: Sequence[str]) -> tuple[str, ...]:
        return (model, *(spec for spec in plan if parse(spec).switch == RELOAD))


def rows(
    device: Device, of: Sequence[str] = (), without: Sequence[str] = (), done: Collection[frozenset[str]] = ()
) -> Iterator[dict[str, Any]]:
    loaded = Loaded(device)
    plain = loaded.engine("pocket", []).run(REQUEST).latents
    single = {spec: refusal([spec], device) for spec in specs()}
    pairs = list(itertools.combinations_with_replacement(specs(), 2))
    if of:
        pairs = [pair for pair in pairs if set(pair) & set(of)]
    pairs = [pair for pair in pairs if not set(pair) & set(without) and frozenset(pair) not in done]
    # Pairs that load alike stand together, and those that compile for seconds come last.
    pairs.sort(key=lambda pair: ("compile" in pair, [spec for spec in pair if parse(spec).switch == RELOAD]))
    for one, other in pairs:
        row: dict[str, Any] = {
            "case": f"{one} + {other}",
            "plan": [one, other],
            "kinds": [parse(s).kind for s in (one, other)],
        }
        if missing := single[one] or single[other]:
            yield row | {"status": "missing", "reason": missing}
        elif reason := refusal((one, other), device):
            yield row | {"status": "refused", "reason": reason}
        else:
            try:
                latents = loaded.engine("pocket", list(dict.fromkeys((one, other)))).run(REQUEST).latents
            except Exception as problem:
                yield row | {"status": "failed", "reason": f"{type(problem).__name__}: {problem}".partition("\n")[0]}
                continue
            error = ((latents - plain).norm() / plain.norm()).item()
            yield row | {"status": "ok" if latents.isfinite().all() else "failed", "error": error}


def measure(arguments: argparse.Namespace) -> None:
    device = pick_device(arguments.device)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = {
        "steps": REQUEST.num_inference_steps,
        "device": device.name,
        "versions": versions(device),
        "commit": arguments.commit or commit,
        "date": datetime.date.today().isoformat(),
    }
    known = map(json.loads, arguments.out.read_text().splitlines()) if arguments.out.exists() else ()
    done = {frozenset(row["plan"]) for row in known if row["device"] == device.name and row["status"] != "failed"}
    with arguments.out.open("a") as out:
        for row in rows(device, arguments.of, arguments.without, done):
            out.write(json.dumps(row | about) + "\n")
            out.flush()
            if row["status"] == "failed":
                print(row["case"], row["reason"], flush=True)


# The page


def best_rows(path: Path) -> dict[frozenset[str], dict[str, Any]]:
    """One row a pair: what ran somewhere stands before what was missing there."""
    found: dict[frozenset[str], dict[str, Any]] = {}
    order = ("ok", "failed", "refused", "missing")
    for line in path.read_text().splitlines():
        row = json.loads(line)
        pair = frozenset(row["plan"])
        if not pair <= set(specs()):
            continue
        if pair not in found or order.index(row["status"]) <= order.index(found[pair]["status"]):
            found[pair] = row
    return found


def table(found: dict[frozenset[str], dict[str, Any]]) -> str:
    """A square of marks and the reasons under it; refusals are the plan's own, of today."""
    names = specs()
    reasons: dict[str, str] = {}
    lines = ["| | technique | kind | " + " | ".join(str(n) for n in range(1, len(names) + 1)) + " |"]
    lines.append("|--|--|--|" + "--|" * len(names))
    for number, one in enumerate(names, 1):
        cells = [_mark(one, other, found.get(frozenset((one, other))), reasons) for other in names[:number]]
        cells += [""] * (len(names) - number)
        lines.append(f"| {number} | `{one}` | {parse(one).kind} | " + " | ".join(cells) + " |")
    lines += ["", "`+` ran together, `?` is accepted and has not run; a letter is a refusal:", ""]
    lines += [f"- `{letter}`: {reason}" for reason, letter in reasons.items()]
    return "\n".join(lines)


def _mark(one: str, other: str, row: dict[str, Any] | None, reasons: dict[str, str]) -> str:
    if one != other and (reason := parse(one).conflict(parse(other))):
        return reasons.setdefault(reason, _letter(len(reasons)))
    return {"ok": "+", "failed": "failed"}.get(row["status"] if row else "", "?")


def _letter(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else _letter(number // 26 - 1) + _letter(number % 26)


def switches() -> str:
    """What a switch of each technique costs."""
    costs: dict[str, list[str]] = {}
    for spec in specs():
        technique = parse(spec)
        value = getattr(technique, "value", "")
        names = costs.setdefault(technique.switch, [])
        if (name := f"`{technique.name}:{value}`" if value else f"`{technique.name}`") not in names:
            names.append(name)
    return "\n".join(f"- {cost}: {', '.join(names)}" for cost, names in sorted(costs.items()))


def between(text: str, mark: str, new: str) -> str:
    """The page with ``new`` between ``<!-- mark -->`` and ``<!-- /mark -->``."""
    before, start, rest = text.partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition(f"<!-- /{mark} -->")
    assert start, f"the page has no place for {mark}"
    assert end, f"the page has no end for {mark}"
    return f"{before}{start}\n{new}\n\n{end}{after}"


def page_of(text: str, path: Path) -> str:
    """The page with its generated parts made anew."""
    return between(between(text, "switches", switches()), "pairs", table(best_rows(path)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, default=ROWS)
    parser.add_argument("--of", nargs="*", default=(), help="only pairs with one of these specs")
    parser.add_argument("--without", nargs="*", default=(), help="no pairs with one of these specs")
    parser.add_argument("--commit")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.write:
        PAGE.write_text(page_of(PAGE.read_text(), arguments.out))
    else:
        torch.manual_seed(0)
        measure(arguments)


if __name__ == "__main__":
    main()
