import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from swiftwan.errors import PlanError
from swiftwan.plan import make_plan, parse
from swiftwan.techniques.compile import Compile


def test_an_unknown_mode_is_told():
    with pytest.raises(PlanError, match="mode is 'fast'"):
        parse("compile:mode=fast")
    assert parse("compile:mode=max-autotune-no-cudagraphs").mode == "max-autotune-no-cudagraphs"


def test_fused_blocks_leave_nothing_to_compile(gpu, monkeypatch):
    monkeypatch.setattr("swiftwan.techniques.fused.find_spec", lambda name: object())
    with pytest.raises(PlanError, match="compile cannot run beside fused: .* drop one"):
        make_plan(["fused", "compile"], gpu((9, 0)))


@pytest.mark.slow
# torch's own, on first use of inductor (torch 2.13)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_the_flow_is_that_of_the_plain_model_and_the_cache_is_the_users(parts, forward, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as torch does when it is imported
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch._dynamo.reset()  # other tests compile, too, and the count below is the process's
    torch._dynamo.utils.counters.clear()
    parts.transformer_2 = None
    expected = forward(parts.transformer)
    Compile().install(parts)
    got = forward(parts.transformer)
    assert ((got - expected).norm() / expected.norm()).item() < 1e-5
    assert any((tmp_path / "swiftwan" / "inductor").iterdir())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "blocks are equal: one graph serves them"

    # As a second process: torch forgets what it holds, and finds on disk what it compiled.
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert torch.equal(forward(parts.transformer), got)
    found = torch._dynamo.utils.counters
    assert found["inductor"]["fxgraph_cache_hit"] + found["aot_autograd"]["autograd_cache_hit"] > 0
    assert found["inductor"]["fxgraph_cache_miss"] == 0
