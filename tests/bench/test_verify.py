import pytest
import torch

from swiftwan.bench import verify as verification
from swiftwan.bench.verify import verify
from swiftwan.engine import Engine
from swiftwan.errors import PlanError
from swiftwan.pipelines.request import TextToVideo

REQUEST = TextToVideo(
    "a red circle moves left over a blue background", seed=7, width=32, height=32, num_frames=5, num_inference_steps=3
)


def test_an_exact_plan_passes_with_rounding_at_every_step() -> None:
    told = []

    verdict = verify(["batched-cfg"], "pocket", REQUEST, runs=3, device="cpu", dtype="fp32", on_run=told.append)

    assert verdict.passed
    assert verdict.rung == "exact"
    assert len(verdict.step_errors) == 3
    timesteps = [timestep for timestep, _ in verdict.step_errors]
    assert timesteps == sorted(timesteps, reverse=True)
    assert timesteps[-1] == 0
    assert max(error for _, error in verdict.step_errors) < 1e-3
    assert len(verdict.memory_bytes) == 3
    assert len(told) == 3
    assert verdict.to_json()["passed"] is True


def test_a_plan_that_breaks_the_video_fails_and_says_where(monkeypatch) -> None:
    whole = Engine.load

    def load(model, *, plan, **options):
        engine = whole(model, plan=plan, **options)
        if plan:
            with torch.no_grad():
                engine.parts.transformer.proj_out.weight.mul_(1.5)
        return engine

    monkeypatch.setattr(verification.Engine, "load", load)

    verdict = verify(["batched-cfg"], "pocket", REQUEST, runs=2, device="cpu", dtype="fp32")

    assert not verdict.passed
    failed = {check.name for check in verdict.checks if not check.passed}
    assert "latent error at the end" in failed
    assert "memory growth in MiB" not in failed


def test_runs_that_differ_or_grow_fail(monkeypatch) -> None:
    growing = iter([0, 10, 10**9])
    monkeypatch.setattr(verification, "_memory", lambda engine: next(growing))
    runs = iter([0.0, 0.0, 0.0, 0.5, 0.0])
    whole = Engine.run

    def run(engine, request, on_step=None):
        result = whole(engine, request, on_step=on_step)
        result.latents.mul_(1 + next(runs))
        return result

    monkeypatch.setattr(verification.Engine, "run", run)

    verdict = verify(["batched-cfg"], "pocket", REQUEST, runs=3, device="cpu", dtype="fp32")

    failed = {check.name for check in verdict.checks if not check.passed}
    assert failed == {"largest distance between runs", "memory growth in MiB"}


def test_a_wrong_plan_is_told_before_anything_is_measured() -> None:
    with pytest.raises(PlanError, match="Did you mean 'batched-cfg'"):
        verify(["batched-cgf"], "pocket", REQUEST, runs=1, device="cpu")
