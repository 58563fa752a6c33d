import pytest
import torch

import swiftwan as sw
from swiftwan.device import pick_device
from swiftwan.errors import PlanError
from swiftwan.ops import attention as kernels
from swiftwan.ops.sparse import sparse_reference, tile_order
from swiftwan.plan import describe, make_plan
from swiftwan.techniques import sparse
from swiftwan.techniques.sparse import best_kernel

REQUEST = sw.TextToVideo("a red circle moves left over a blue background", seed=1, num_inference_steps=3, num_frames=17)


def run(*plan):
    return sw.Engine.load("pocket", plan=list(plan), device="cpu", dtype="fp32").run(REQUEST).latents


@pytest.fixture(scope="module")
def plain():
    return run()


def distance(one, other):
    return ((one - other).norm() / other.norm()).item()


def test_everything_kept_is_the_plain_run_in_another_order(plain):
    assert distance(run("sparse-attention:keep=1,block=16"), plain) < 1e-4


def test_fewer_blocks_are_further_and_still_near(plain):
    half, tenth = (distance(run(f"sparse-attention:keep={keep},block=16"), plain) for keep in (0.5, 0.1))
    assert 1e-3 < half < tenth


def test_dense_steps_and_layers_see_everything(plain):
    assert distance(run("sparse-attention:keep=0.1,block=16,dense-steps=3"), plain) < 1e-4
    assert distance(run("sparse-attention:keep=0.1,block=16,dense-layers=7"), plain) < 1e-4
    one = distance(run("sparse-attention:keep=0.1,block=16,dense-steps=1"), plain)
    assert 1e-3 < one < distance(run("sparse-attention:keep=0.1,block=16"), plain)


def test_each_run_begins_with_its_dense_steps(plain):
    engine = sw.Engine.load("pocket", plan=["sparse-attention:keep=0.1,block=16,dense-steps=1"], device="cpu")
    assert torch.equal(engine.run(REQUEST).latents, engine.run(REQUEST).latents)


def test_an_order_alone_changes_nothing():
    engine = sw.Engine.load("pocket", plan=[], device="cpu", dtype="fp32")
    transformer = engine.parts.transformer
    latents, text = torch.randn(1, 16, 3, 10, 16), torch.randn(1, 9, 192)
    timestep = torch.tensor([[0.0, 700.0]])
    expected = transformer(latents, timestep, transformer.condition(text, latents.shape))
    transformer.token_order = tile_order
    ours = transformer(latents, timestep, transformer.condition(text, latents.shape))
    assert distance(ours, expected) < 1e-5


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("sparse-attention:keep=0", "keep is 0.0; it is a share"),
        ("sparse-attention:keep=1.5", "keep is 1.5"),
        ("sparse-attention:keep=some", "keep is 'some'; it must be a number"),
        ("sparse-attention:dense-steps=-1", "dense-steps is -1"),
        ("sparse-attention:dense-step=1", "Did you mean 'dense-steps'"),
        ("sparse-attention:bits=4", "bits is 4; it is 16 or 8"),
        ("sparse-attention:bits=8,block=16", "block is 16; with bits=8 it is 128"),
        ("sparse-attention:bits=8", "needs an NVIDIA GPU of compute capability 9.0"),
    ],
)
def test_bad_options_say_what_and_how(spec, words):
    with pytest.raises(PlanError, match=words):
        make_plan([spec], pick_device("cpu"))


def test_eight_bits_take_one_head_width(gpu, monkeypatch):
    monkeypatch.setattr(kernels, "_installed", lambda package: True)
    with pytest.raises(PlanError, match="bits=8 takes heads of 128, those of 'pocket' are 64"):
        make_plan(["sparse-attention:bits=8"], gpu((9, 0)), facts=describe("pocket"))
    plan = make_plan(["sparse-attention:bits=8"], gpu((9, 0)), facts=describe("random:wan2.1-t2v-1.3b"))
    assert plan.specs == ("sparse-attention:bits=8",)


def test_the_choice_and_the_kernel_are_one_operator_to_the_compiler():
    q, k, v = (torch.randn(1, 70, 2, 8) for _ in range(3))
    operator = sparse._operator()
    compiled = torch.compile(lambda q, k, v: operator(q, k, v, 0.5, 16) + 1, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), sparse.attend_to_best(q, k, v, 0.5, 16) + 1)
    assert not torch.equal(operator(q, k, v, 0.5, 16), operator(q, k, v, 1.0, 16))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sparse_attention_compiles_on_a_gpu():
    dense, compiled = (
        sw.Engine.load("pocket", plan=plan, device="cuda").run(REQUEST).latents
        for plan in ([], ["sparse-attention:keep=1", "compile"])
    )
    assert distance(compiled, dense) < 0.1  # all blocks are kept, so it is bf16's rounding: 0.03 in 4 steps


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_blocks_of_another_size_take_the_reference(device):
    assert best_kernel(torch.device(device), 16) is sparse_reference


def test_a_recording_takes_sparse_steps_that_are_all_alike(gpu):
    assert make_plan(["sparse-attention:keep=0.25", "cuda-graphs"], gpu((9, 0))).specs[-1] == "cuda-graphs"
    with pytest.raises(PlanError, match="a recording does the same at each step"):
        make_plan(["sparse-attention:keep=0.25,dense-steps=2", "cuda-graphs"], gpu((9, 0)))
