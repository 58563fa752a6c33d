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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_what_cannot_be_recorded_is_told(parts):
    from swiftwan.errors import UnavailableError

    model = parts.transformer.cuda()
    latents = torch.randn(1, 16, 2, 8, 8, device="cuda")
    given = model.condition(torch.randn(1, 5, 20, device="cuda"), latents.shape)
    with pytest.raises(UnavailableError, match="run without cuda-graphs"):
        Replay(lambda x, t, c: x * x.sum().item())(latents, torch.tensor([1.0], device="cuda"), given)
