"""The checklist of techniques: what can be ticked, and why some of it cannot be ticked beside what is."""

from __future__ import annotations

import json
from itertools import groupby

from swiftwan.errors import SwiftwanError
from swiftwan.plan import make_plan, parse
from swiftwan.serve.jobs.admission import Admission

OFFERED = (
    "fused",
    "attention:cudnn",
    "attention:flash4",
    "attention:fp8",
    "attention-slicing:size=1024",
    "batched-cfg",
    "compile",
    "cuda-graphs",
    "offload:model",
    "offload:blocks:resident=0",
    "text-encoder:cpu",
    "quantize:fp8",
    "quantize:int8",
    "quantize:int4",
    "tf32",
    "vae:fast",
    "channels-last",
    "vae:tiling",
    "step-cache:threshold=0.1",
    "deepcache:interval=2",
    "progressive-resolution:scale=0.5",
    "sparse-attention:keep=0.5",
    "cfg-interval:from=0.1,to=0.9",
    "cfg-skip:every=2,first=4",
    "few-step",
)
"""Specs with the options worth changing; the line below the checklist takes any other spec too."""

_KINDS = ("exact", "near", "approximate", "retrained")

_IN_STEP = """
const head = spec => spec.split(":").filter(part => !part.includes("=")).join(":");
const words = line => line.split(/\\s+/).filter(Boolean);
const lineOf = (line, ...groups) => {
  const ticked = groups.filter(Array.isArray).flat();
  const kept = words(line).filter(spec => ticked.includes(head(spec)) || !(head(spec) in specs));
  const there = kept.map(head);
  return [[...kept, ...ticked.filter(name => !there.includes(name)).map(name => specs[name])].join(" ")];
};
const ticksOf = line => {
  const heads = words(line).map(head);
  return groups.map(names => names.filter(name => heads.includes(name)));
};
"""


def by_kind() -> list[tuple[str, list[str]]]:
    """The offered heads, the most exact kind first."""
    kinds = [(_KINDS.index(parse(spec).kind), head(spec)) for spec in OFFERED]
    return [(_KINDS[kind], [name for _, name in group]) for kind, group in groupby(sorted(kinds), lambda one: one[0])]


def head(spec: str) -> str:
    """A spec without its options: ``quantize:fp8:scale=row`` is ``quantize:fp8``."""
    return ":".join(part for part in spec.split(":") if "=" not in part)


def script(function: str) -> str:
    """JavaScript of one of the two that keep the checklist and its line in step, for an event of the page.

    They run in the browser: the answer of a server would come when the next box is ticked already, and untick it.
    ``lineOf`` gives the line after the checklist changed (what was typed stays, as far as it is still ticked),
    ``ticksOf`` what is ticked in each group of :func:`by_kind` for a line.
    """
    specs = json.dumps({head(spec): spec for spec in OFFERED})
    groups = json.dumps([names for _, names in by_kind()])
    return f"(...given) => {{ const specs = {specs}, groups = {groups};\n{_IN_STEP}\nreturn {function}(...given); }}"


def refused_beside(line: str, admission: Admission) -> dict[str, str]:
    """Which of the others cannot be added to a line that is fine by itself, each with the reason."""
    chosen = line.split()
    taken = {head(spec) for spec in chosen}
    reasons = {}
    for spec in OFFERED:
        if head(spec) in taken:
            continue
        try:
            make_plan([*chosen, spec], admission.device, admission.dtype, admission.facts)
        except SwiftwanError as problem:
            reasons[head(spec)] = str(problem)
    return reasons


def reasons() -> dict[str, str]:
    """What each offered technique does, in its own words."""
    return {head(spec): parse(spec).reason for spec in OFFERED}
