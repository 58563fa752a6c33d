import subprocess
import sys

import pytest
import torch

from swiftwan.device import pick_device
from swiftwan.errors import PlanError
from swiftwan.plan import make_plan
from swiftwan.techniques import graphs
from swiftwan.techniques.graphs import CudaGraphs, Replay, tensors


def test_a_cpu_is_refused():
    with pytest.raises(PlanError, match="'cuda-graphs' cannot run on .*: it needs an NVIDIA GPU"):
        make_plan(["cuda-graphs"], pick_device("cpu"))


def test_compile_and_graphs_go_together(gpu):
    plan = make_plan(["cuda-graphs", "compile"], gpu((9, 0)))
    assert plan.specs == ("compile", "cuda-graphs"), "blocks are compiled before the forward is recorded"


@pytest.fixture
def replay(monkeypatch):
    """A Replay whose recordings only remember what they were made for."""
    made = []

    class Recorded:
        def __init__(self, forward, pool, *arguments):
            made.append(arguments)

        def __call__(self, *arguments):
            return arguments

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(graphs, "Recording", Recorded)
    return Replay(lambda *arguments: None), made


def condition(parts, tokens):
    return parts.transformer.condition(torch.randn(1, tokens, 20), (1, 16, 2, 8, 8))


@torch.no_grad()
def test_a_recording_serves_every_condition_of_its_shape(parts, replay):
    replay, made = replay
    latents, timestep = torch.randn(1, 16, 2, 8, 8), torch.tensor([1.0])
    one, other, longer = condition(parts, 5), condition(parts, 5), condition(parts, 7)
    for given in (one, other, longer, one):
        assert replay(latents, timestep, given) == (latents, timestep, given)
    assert len(made) == 2
    for tokens in range(8, 8 + graphs.KEPT):
        replay(latents, timestep, condition(parts, tokens))
    assert len(replay.recordings) == graphs.KEPT
    replay(latents, timestep, one)
    assert len(made) == 2 + graphs.KEPT + 1, "the least used one was dropped"


@torch.no_grad()
def test_a_copy_of_a_condition_is_equal_and_its_own(parts):
    original = condition(parts, 5)
    copy = graphs._copied(original)
    pairs = list(zip(tensors(original), tensors(copy), strict=True))
    assert len(pairs) == 2 + 1 + 2 * len(parts.transformer.blocks)
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_replays_equal_runs(parts):
    model = parts.transformer.cuda()
    latents = [torch.randn(1, 16, 2, 8, 8, device="cuda") for _ in range(3)]
    conditions = [model.condition(torch.randn(1, n, 20, device="cuda"), latents[0].shape) for n in (5, 5, 7)]
    calls = [(x, torch.tensor([t], device="cuda"), c) for x in latents for t in (10.0, 900.0) for c in conditions]
    expected = [model(*call) for call in calls]
    CudaGraphs().install(parts)
    for call, flow in zip(calls, expected, strict=True):
        assert torch.allclose(model(*call), flow, rtol=1e-5, atol=1e-6)


# In a process of its own: a recording that fails leaves torch's CUDA random generator unusable (torch 2.11).
UNRECORDABLE = """
import torch
from swiftwan.errors import UnavailableError
from swiftwan.models.dit import Condition
from swiftwan.techniques.graphs import Replay
x = torch.ones(4, device="cuda")
try:
    Replay(lambda latents, *_: latents * latents.sum().item())(x, x, Condition((), None, (x, x)))
except UnavailableError as problem:
    assert "run without cuda-graphs" in str(problem)
else:
    raise AssertionError("recorded what reads a number back")
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_cannot_be_recorded_is_told():
    run = subprocess.run([sys.executable, "-c", UNRECORDABLE], capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
