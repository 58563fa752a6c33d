import json
import shutil
from importlib.resources import files

import pytest
import torch
from torch import nn

import swiftwan as sw
from swiftwan.device import pick_device
from swiftwan.errors import PlanError
from swiftwan.models.parking import Parked
from swiftwan.models.streaming import StreamedBlock
from swiftwan.plan import describe, make_plan, parse
from swiftwan.weights.build import build
from swiftwan.weights.find import locate
from swiftwan.weights.load import randomize

REQUEST = sw.TextToVideo("a red circle moves left over a blue background", seed=1, num_inference_steps=2, num_frames=5)


def run(*plan, device="cpu", dtype="fp32"):
    engine = sw.Engine.load("pocket", plan=list(plan), device=device, dtype=dtype)
    return engine, engine.run(REQUEST).latents


@pytest.mark.parametrize("more", [(), ("batched-cfg",), ("quantize:int8",), ("quantize:int4",)])
@pytest.mark.parametrize("resident", [0, 3, 9])
def test_streamed_blocks_give_the_same_bits(resident, more):
    _, expected = run(*more)
    engine, latents = run(f"offload:blocks:resident={resident}", *more)
    assert torch.equal(latents, expected)
    kinds = [isinstance(block, StreamedBlock) for block in engine.parts.transformer.blocks]
    assert kinds == [i >= resident for i in range(7)]


@pytest.mark.parametrize(("spec", "takes"), [("blocks:resident=9", True), ("blocks", False), ("model", False)])
def test_where_weights_move_no_opening_takes_their_room(spec, takes):
    engine = sw.Engine.load("pocket", plan=[f"offload:{spec}"], device="cpu", dtype="fp32")
    assert engine.parts.transformer.takes_opening is takes
    engine.switch([f"offload:{spec}", "cfg-skip"])
    assert engine.parts.transformer.takes_opening is takes


def test_slots_take_memory_for_a_transformers_turn_alone():
    engine, latents = run("offload:blocks", "prompt-cache:off")
    slots = engine.parts.transformer.blocks[0].slots
    assert [memory.untyped_storage().size() for memory in slots.memory] == [0, 0]
    seen = []
    again = engine.run(
        REQUEST, on_step=lambda event: seen.append((event.phase, slots.memory[0].untyped_storage().size()))
    )
    assert dict(seen) == {"text": 0, "denoise": slots.size, "decode": 0}
    assert torch.equal(again.latents, latents)


def test_streamed_blocks_share_two_slots():
    engine, _ = run("offload:blocks")
    engine.parts.enter("transformer")
    homes = {
        parameter.untyped_storage().data_ptr()
        for block in engine.parts.transformer.blocks
        for parameter in block.parameters()
    }
    assert len(homes) == 2


@pytest.mark.parametrize("more", [(), ("quantize:int8",), ("quantize:int4",)])
def test_a_model_that_leaves_between_its_turns_gives_the_same_bits(more):
    more = ("prompt-cache:off", *more)
    _, expected = run(*more)
    engine, latents = run("offload:model", *more)
    assert torch.equal(latents, expected)
    assert not engine.parts.text.is_loaded
    assert not engine.parts.enter.parked["transformer"].here
    assert torch.equal(engine.run(REQUEST).latents, expected)


@pytest.fixture
def two_experts(tmp_path):
    """The pocket model twice, as two experts."""
    folder = tmp_path / "two"
    shutil.copytree(str(files("swiftwan.pocket") / "model"), folder)
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    (folder / "swiftwan.sha256.json").unlink()
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"transformer_2": index["transformer"], "boundary_ratio": 0.9}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_the_expert_that_waits_is_not_on_the_device(two_experts):
    plain = sw.Engine.load(str(two_experts), plan=[], device="cpu", dtype="fp32")
    request = sw.TextToVideo("a", seed=1, num_inference_steps=4, num_frames=5, width=64, height=64)
    engine = sw.Engine.load(str(two_experts), plan=["offload:experts"], device="cpu", dtype="fp32")
    turns = []
    enter = engine.parts.enter

    def watch(component):
        enter(component)
        turns.append((component, [name for name, parked in enter.parked.items() if parked.here]))

    engine.parts.enter = watch
    assert torch.equal(engine.run(request).latents, plain.run(request).latents)
    of_experts = [turn for turn in turns if turn[0].startswith("transformer")]
    assert of_experts == [("transformer", ["transformer"]), ("transformer_2", ["transformer_2"])]


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        (["offload:blocs"], "offload is 'blocs'. Did you mean 'blocks'"),
        (["offload:blocks:resident=-2"], "resident is -2"),
        (["offload:model:resident=2"], "offload:model has no resident blocks"),
        (["offload:auto:budget=inf"], "offload:auto has a budget of inf GB"),
        (["offload:blocks", "quantize:nf4:keep=1"], "offload cannot run beside quantize: bitsandbytes"),
    ],
)
def test_bad_plans_say_what_and_how(specs, words):
    with pytest.raises(PlanError, match=words):
        make_plan(specs, pick_device("cpu"))


def test_that_nothing_streams_is_told():
    (told,) = sw.explain("pocket", REQUEST, plan=["offload:blocks:resident=7"], device="cpu").plan.techniques
    assert told.fit(describe("pocket").known) == ["'pocket' has 7 blocks: all stay on the device, none streams"]
    assert parse("offload:blocks:resident=6").fit(describe("pocket").known) == []


@pytest.mark.parametrize(
    ("spec", "here"),
    [
        ("offload:blocks:resident=3", {"blocks.0.attn1.to_q", "blocks.2.ffn.net.2.weight", "proj_out"}),
        ("offload:blocks", {"proj_out"}),
        ("offload:auto:budget=1", {"blocks.0.attn1.to_q", "blocks.2.ffn.net.2.weight", "blocks.6.norm2", "proj_out"}),
        ("offload:auto:budget=0.001", {"proj_out"}),
        ("offload:model", set()),
    ],
)
def test_what_stays_on_the_device_loads_straight_to_it(monkeypatch, spec, here):
    places = {}
    monkeypatch.setattr(
        "swiftwan.weights.build.load_weights",
        lambda module, files, *, component, rest_on=None, **more: places.update({component: rest_on}),
    )
    settings = make_plan([spec], pick_device("cpu")).settings
    build(
        locate("pocket"),
        device=torch.device("meta"),
        dtype=torch.float32,
        transformers_on_host=settings.transformers_on_host,
        resident_blocks=settings.resident_blocks,
    )
    assert places["vae"] is None
    paths = ["blocks.0.attn1.to_q", "blocks.2.ffn.net.2.weight", "blocks.6.norm2", "proj_out"]
    assert {path for path in paths if places["transformer"](path).type == "meta"} == here
    assert all(places["transformer"](path).type in ("meta", "cpu") for path in paths)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_random_weights_rest_where_a_gpu_reads_them_and_are_the_same():
    with torch.device("meta"):
        resting, plain = (nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 32, bias=False)) for _ in range(2))
    randomize(resting, device="cuda", dtype=torch.bfloat16, rest_on=lambda path: torch.device("cpu"))
    randomize(plain, device="cuda", dtype=torch.bfloat16)
    homes = [parameter.data_ptr() for parameter in resting.parameters()]
    assert all(parameter.is_pinned() for parameter in resting.parameters())
    for one, other in zip(resting.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other.cpu())
    parked = Parked(resting, torch.device("cuda"))
    assert [parameter.data_ptr() for parameter in resting.parameters()] == homes
    parked.come()
    for one, other in zip(resting.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("more", [(), ("quantize:int8",), ("quantize:int4",)])
@pytest.mark.parametrize("resident", [0, 2, 3])
def test_streamed_blocks_give_the_same_bits_on_a_gpu(resident, more):
    if "quantize:int8" in more:
        pytest.importorskip("torchao", reason="quantize:int8 needs swiftwan[quantize]")
    for _ in range(3):
        _, expected = run(*more, device="cuda", dtype="bf16")
        _, latents = run(f"offload:blocks:resident={resident}", *more, device="cuda", dtype="bf16")
        assert torch.equal(latents, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_text_encoder_that_works_block_by_block_gives_the_same_bits_on_a_gpu():
    _, expected = run("prompt-cache:off", device="cuda", dtype="bf16")
    engine, latents = run("prompt-cache:off", "text-encoder:blocks", device="cuda", dtype="bf16")
    assert torch.equal(latents, expected)
    assert {parameter.device.type for parameter in engine.parts.text.encoder.encoder.block.parameters()} == {"cpu"}
