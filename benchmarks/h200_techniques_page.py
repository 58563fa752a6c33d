"""Write the tables of docs/plans.md from benchmarks/h200_techniques.jsonl: of each case the last row that is good.

python benchmarks/h200_techniques_page.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from h200_techniques import RECIPE_PEERS, recipe_peer
from pocket_pairs import PAGE, between

from swiftwan.recipes import RECIPES

ROWS = Path(__file__).parent / "h200_techniques.jsonl"
Row = dict[str, Any]

MODELS = {
    "wan2.1-t2v-1.3b": "Wan2.1 1.3B",
    "wan2.1-t2v-14b": "Wan2.1 14B",
    "wan2.2-ti2v-5b": "Wan2.2 TI2V-5B",
    "wan2.2-t2v-a14b": "Wan2.2 A14B",
}
SAME = {
    "plain": "plain",
    "alone attention:cudnn": "set_attention_backend _native_cudnn",
    "alone attention:flash2": "set_attention_backend _native_flash",
    "alone attention:flash4": "set_attention_backend flash_4_hub",
    "alone attention:sage": "set_attention_backend sage",
    "alone channels-last": "vae channels_last_3d",
    "alone compile": "compile_repeated_blocks",
    "alone dtype:fp16": "float16",
    "alone dtype:fp32": "float32",
    "alone lora": "load_lora_weights",
    "alone offload:blocks": "enable_group_offload, blocks, stream",
    "alone offload:model": "enable_model_cpu_offload",
    "alone quantize:fp8": "TorchAoConfig Float8DynamicActivationFloat8Weight",
    "alone quantize:fp8:activations=none": "enable_layerwise_casting float8_e4m3fn",
    "alone quantize:int4": "TorchAoConfig Int4WeightOnly",
    "alone quantize:int8": "TorchAoConfig Int8WeightOnly",
    "alone quantize:int8:activations=dynamic": "TorchAoConfig Int8DynamicActivationInt8Weight",
    "alone quantize:nf4:keep=1": "BitsAndBytesConfig nf4",
    "alone step-cache": "FirstBlockCache 0.1",
    "alone tf32": "float32, allow_tf32",
    "alone vae:fp32": "vae in float32",
    "alone vae:tiling": "vae.enable_tiling",
}
"""Our case, and what diffusers has of the same."""

PLAIN = "is what `plain` does"
NO_ROW = {
    "attention:sdpa": PLAIN,
    "attention:flash3": "its wheel is on PyTorch's index alone, which that machine does not reach",
    "attention:fp8-plain": "a check of `attention:fp8`'s roundings, which forms the matrix of all tokens by all tokens",
    "dtype:bf16": PLAIN,
    "few-step": "a model of its own, timed in [few-step.md](few-step.md)",
    "prompt-cache:disk": PLAIN,
    "prompt-cache:memory": "as `prompt-cache:off` for a new prompt, as `plain` for a known one",
    "text-encoder:cpu": "ran with `offload:model` under 8 GB, in the table above",
    "text-encoder:gpu": PLAIN,
    "vae:fp16": "as `vae:bf16`, the same size of number",
}
"""What has no row of its own, and why."""


def last_good(lines: Iterable[str]) -> dict[str, Row]:
    """By case; a row that did not run stands only where none did."""
    found: dict[str, Row] = {}
    for line in lines:
        row = json.loads(line)
        if row["status"] == "ok" or row["case"] not in found:
            found[row["case"]] = row
    return found


def told_phases(guess: Row) -> dict[str, int]:
    """Bytes by phase; the first rows have them summed up."""
    if "phases" not in guess:
        return guess["phase_peak_bytes"]
    return {phase["name"]: phase["weight_bytes"] + phase["activation_bytes"] for phase in guess["phases"]}


def step(row: Row) -> float:
    return statistics.median(row["step_seconds"])


def decode(row: Row) -> float:
    seconds: float = row["stages"]["decode"]
    return seconds


def measured(rows: dict[str, Row]) -> str:
    """Each plan's phases and step, and in brackets what ``explain`` told before it ran."""
    lines = ["| model | plan | peak GB | text | denoise | decode | s a step |", "|--|--|--|--|--|--|--|"]
    for row in rows.values():
        if row["status"] != "ok" or row.get("runner") == "diffusers" or "not_alone" in row:
            continue
        guess = row["estimate"]
        phases = told_phases(guess)
        cells = [f"{row['phase_peak_bytes'][name] / 1e9:.2f} ({size / 1e9:.2f})" for name, size in phases.items()]
        plan = f"`{' '.join(row['plan'])}`" if row["plan"] else "none"
        cap = f", under a cap of {row['cap_gb']:g} GB" if row["cap_gb"] else ""
        seconds = f"{step(row):.3f} ({guess['step_seconds']:.3f})"
        peak = f"{row['peak_bytes'] / 1e9:.2f} ({guess['peak_bytes'] / 1e9:.2f})"
        size = "x".join(map(str, row["size"]))
        model = f"{MODELS[row['model'].removeprefix('random:')]}, {size}"
        lines.append(f"| {model} | {plan}{cap} | {peak} | {' | '.join(cells)} | {seconds} |")
    return "\n".join(lines)


def recipes(rows: dict[str, Row]) -> str:
    """Each recipe, and how its run under a cap went."""
    lines = [
        "| plan | for | techniques beside the kernels | peak GB, capped (told) | host GB, told | s a step (told) |",
        "|--|--|--|--|--|--|",
    ]
    for name, recipe in RECIPES.items():
        row = rows.get(f"recipe {name}", {"status": "not run", "reason": ""})
        specs = f"`{' '.join(recipe.specs)}`" if recipe.specs else "none: everything is resident"
        size = f"{MODELS[recipe.model]}, {recipe.width}x{recipe.height}x{recipe.num_frames}"
        if row["status"] == "ok":
            guess = row["estimate"]
            peak = f"{row['peak_bytes'] / 1e9:.1f} ({guess['peak_bytes'] / 1e9:.1f})"
            cells = [peak, f"{guess['host_bytes'] / 1e9:.0f}", f"{step(row):.2f} ({guess['step_seconds']:.2f})"]
        else:
            why = row["reason"].partition(":")[2].partition(",")[0].strip()
            cells = [f"{row['status']}: {why}" if why else row["status"], "", ""]
        lines.append(f"| `{name}` | {size} | {specs} | {' | '.join(cells)} |")
    return "\n".join(lines)


def alone(rows: dict[str, Row]) -> str:
    """Each technique alone, on the same weights as what diffusers has of the same; then those without a row."""
    lines = [
        "| ours | s a step | decode s | peak GB | diffusers | s a step | decode s | peak GB |",
        "|--|--|--|--|--|--|--|--|",
    ]
    for ours in ["plain", "auto", *sorted(case for case in rows if case.startswith("alone "))]:
        model = rows[ours]["model"].removeprefix("random:")
        of = "" if model == "wan2.1-t2v-1.3b" else f", of {MODELS[model]}"
        cells = [f"`{ours.removeprefix('alone ')}`{of}", *_numbers(rows[ours])]
        theirs = SAME.get(ours)
        cells += [theirs, *_numbers(rows.get(f"diffusers {theirs}"))] if theirs else ["none", "", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    without: dict[str, list[str]] = {}
    for spec, why in NO_ROW.items():
        without.setdefault(why, []).append(f"`{spec}`")
    return "\n".join(
        [*lines, "", "No row of its own:", "", *(f"- {', '.join(them)}: {why}" for why, them in without.items())]
    )


def recipe_peers(rows: dict[str, Row]) -> str:
    """Each recipe, and diffusers with what it has of its techniques."""
    lines = [
        "| plan | s a step | decode s | peak GB | diffusers | s a step | decode s | peak GB |",
        "|--|--|--|--|--|--|--|--|",
    ]
    for name, theirs in RECIPE_PEERS.items():
        peer = rows.get(recipe_peer(name))
        cells = [f"`{name}`", *_one_run(rows.get(f"recipe {name}")), theirs, *_one_run(peer)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _one_run(row: Row | None) -> list[str]:
    """As :func:`_numbers`, the decode in brackets where no second run showed it without what the first one compiles."""
    seconds, decoded, peak = _numbers(row)
    alone = row is not None and row.get("first_stages", row.get("stages")) == row.get("stages")
    return [seconds, f"({decoded})" if alone and decoded else decoded, peak]


def _numbers(row: Row | None) -> list[str]:
    if row is None:
        return ["not run", "", ""]
    if row["status"] != "ok":
        return [f"{row['status']}: {row['reason'][:80]}", "", ""]
    found = "" if row.get("finite", True) else ", no numbers"
    return [f"{step(row):.3f}{found}", f"{decode(row):.2f}", f"{row['peak_bytes'] / 1e9:.2f}"]


def page_of(text: str, lines: Iterable[str]) -> str:
    """The page with its tables made anew."""
    rows = last_good(lines)
    for mark, table in (("recipes", recipes), ("measured", measured), ("alone", alone), ("recipe peers", recipe_peers)):
        text = between(text, mark, table(rows))
    return text


if __name__ == "__main__":
    PAGE.write_text(page_of(PAGE.read_text(), ROWS.read_text().splitlines()))
