"""``swiftwan verify``: whether a plan is right on these weights and this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from swiftwan.errors import Cancelled, RequestError

if TYPE_CHECKING:
    from swiftwan.bench.verify import Verdict


def verify(
    plan: Annotated[
        list[str], typer.Argument(help="Techniques, for example quantize:fp8; or a recipe's name.", show_default=False)
    ],
    model: Annotated[str, typer.Option(help="Name, hub id, folder or random:NAME.", metavar="M")] = "pocket",
    prompt: Annotated[str, typer.Option(help="What to show.")] = "a red circle moves left over a blue background",
    seed: Annotated[int, typer.Option(help="Of the noise.", metavar="N")] = 7,
    width: Annotated[int | None, typer.Option(help="Pixels. Unset: the model's.", metavar="N")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels. Unset: the model's.", metavar="N")] = None,
    frames: Annotated[int | None, typer.Option(help="4k + 1. Unset: the model's.", metavar="N")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. Unset: the model's.", metavar="N")] = None,
    runs: Annotated[int, typer.Option(help="How often the plan runs.", metavar="N")] = 10,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:N or cpu. Unset: the best here.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32. Unset: the device's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare a plan with the exact run step by step, run it ten times, and say whether it may be trusted."""
    if runs < 1:
        raise RequestError(f"--runs is {runs}; it must be 1 or more.")
    from swiftwan.bench import verify as verification
    from swiftwan.memory import refuse_what_cannot_fit
    from swiftwan.pipelines.request import TextToVideo
    from swiftwan.plan import explain
    from swiftwan.recipes import NAMES

    named = plan[0] if len(plan) == 1 and plan[0] in NAMES else plan
    asked: str | list[str] = [] if named == "none" else named
    request = TextToVideo(prompt, seed=seed, width=width, height=height, num_frames=frames, num_inference_steps=steps)
    for each in (asked, []):
        refuse_what_cannot_fit(explain(model, request, plan=each, device=device, dtype=dtype))
    try:
        verdict = verification.verify(
            asked,
            model,
            request,
            runs=runs,
            device=device,
            dtype=dtype,
            on_run=lambda line: typer.echo(line, err=True),
        )
    except KeyboardInterrupt:
        raise Cancelled("cancelled; nothing was written") from None
    typer.echo(json.dumps(verdict.to_json()) if as_json else "\n".join(_lines(verdict)))
    raise typer.Exit(0 if verdict.passed else 1)


def _lines(verdict: Verdict) -> list[str]:
    lines = [f"plan       {' '.join(verdict.plan) or 'no techniques'} ({verdict.rung})"]
    lines += [
        f"step       timestep {timestep:7.2f}: latent error {error:.2e}" for timestep, error in verdict.step_errors
    ]
    for name, score in verdict.quality.items():
        told = f"{score:.4f}" if isinstance(score, float) else f"not measured: {score.reason}"
        lines.append(f"quality    {name}: {told}")
    ratio = verdict.exact_seconds / verdict.plan_seconds
    lines.append(f"speed      {verdict.plan_seconds:.2f} s against {verdict.exact_seconds:.2f} s: {ratio:.2f}x")
    for check in verdict.checks:
        value = "" if isinstance(check.value, bool) else f" {check.value:.4g}"
        lines.append(f"{'ok' if check.passed else 'FAIL':<10} {check.name}:{value} ({check.limit})")
    return [*lines, f"verdict    {'passed' if verdict.passed else 'FAILED'}"]
