from dataclasses import replace

import pytest
import torch
from PIL import Image

import swiftwan as sw
from swiftwan import plan as swiftwan_plan
from swiftwan.device import Device, pick_device
from swiftwan.errors import PlanError, RequestError, UnavailableError, WeightsError
from swiftwan.guidance import BatchedGuidance, SequentialGuidance
from swiftwan.models.config import KNOWN_MODELS
from swiftwan.models.dit import WanTransformer
from swiftwan.plan import Explanation, Load, complete, describe, estimate, make_plan, parse
from swiftwan.weights.build import parameter_count

CPU = pick_device("cpu")


@pytest.mark.parametrize("spec", ["dtype:bf16", "batched-cfg", "vae:tiling", "vae:tiling:sample=128,stride=96", "tf32"])
def test_a_spec_is_read_and_written_alike(spec):
    assert parse(spec).spec == spec


def test_listing_order_does_not_matter():
    specs = ["batched-cfg", "dtype:bf16", "vae:tiling"]
    one, other = make_plan(specs, CPU), make_plan(specs[::-1], CPU)
    assert one == other
    assert one.specs == ("dtype:bf16", "vae:tiling", "batched-cfg")
    assert one.guide.kind is BatchedGuidance
    assert one.settings.dtype is torch.bfloat16


def test_an_explicit_dtype_stands_above_the_plan():
    plan = make_plan(["dtype:fp16"], CPU, "fp32")
    assert plan.specs == ()
    assert plan.settings.dtype is torch.float32
    assert make_plan(["dtype:fp32"], CPU, "fp32").specs == ("dtype:fp32",)


def test_an_empty_plan_is_the_plain_run():
    plan = make_plan([], CPU)
    assert plan.techniques == ()
    assert plan.guide.kind is SequentialGuidance


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        (["batch-cfg"], "unknown technique 'batch-cfg'. Did you mean 'batched-cfg'"),
        (["vae:tiling:smaple=3"], "has no option 'smaple'. Did you mean 'sample'"),
        (["vae:tiling:sample=x"], "sample is 'x'; it must be a whole number"),
        (["vae:tiling:sample=64,stride=96"], "the stride must be 1 to sample"),
        (["vae"], "needs a value"),
        (["quantize"], "needs a value"),
        (["batched-cfg:3"], "takes no value '3'"),
        (["dtype:int7"], "dtype is 'int7'"),
        (["dtype:bf16", "dtype:fp16"], "both decide weights of"),
        (["tf32"], "cannot run on"),
        ("fastest", "unknown plan 'fastest'"),
        ("auto:fine", "unknown quality 'fine'"),
        ("step-cache:threshold=0.1", "'step-cache:threshold=0.1' is a technique, not a plan's name; give it in a list"),
        (["16gb", "step-cache"], "'16gb' is a plan's name, which stands alone"),
        (["auto"], "'auto' is a plan's name, which stands alone"),
    ],
    ids=str,
)
def test_bad_plans_say_what_and_how(specs, words):
    with pytest.raises(PlanError, match=words.replace("(", r"\(")):
        make_plan(specs, CPU)


def test_all_problems_are_told_at_once():
    with pytest.raises(PlanError) as problem:
        make_plan(["nonsense", "tf32", "batched-cfg", "batched-cfg"], CPU)
    message = str(problem.value)
    assert "nonsense" in message
    assert "tf32" in message
    assert "both decide guidance" in message
    assert "\n" not in message


def test_work_of_known_models_matches_the_published_counts():
    # inference.md 5.1 and 5.4: parameters, and TFLOP a forward at the official size (cross-attention's
    # keys and values, which we compute once a prompt, are 0.2 % of theirs).
    for name, parameters, tflop in (("wan2.1-t2v-1.3b", 1.419e9, 283.0), ("wan2.2-ti2v-5b", 5.0e9, 516.9)):
        explanation = sw.explain(f"random:{name}", sw.TextToVideo("a cat"), plan=[], device="cpu")
        assert parameter_count(KNOWN_MODELS[name].transformer) == pytest.approx(parameters, rel=2e-3)
        assert explanation.load.tflop_per_forward == pytest.approx(tflop, rel=1e-2)


def test_pocket_is_described_as_it_is_shipped():
    explanation = sw.explain("pocket", sw.TextToVideo("a red circle"), plan=[], device="cpu", dtype="fp32")
    engine = sw.Engine.load("pocket", device="cpu", dtype="fp32")
    modules = (engine.parts.transformer, engine.parts.vae, engine.parts.text.encoder)
    loaded = sum(parameter.nbytes for module in modules for parameter in module.parameters())
    assert explanation.load.weight_bytes == loaded


def test_explain_needs_no_weights(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("explain loaded weights")

    monkeypatch.setattr("swiftwan.weights.load.load_weights", refuse)
    lines = sw.explain("wan2.2-t2v-a14b", sw.TextToVideo("a cat"), device="cpu").lines()
    assert any("guidance 4 then 3" in line for line in lines)
    assert any("80 forwards of 75600 tokens" in line for line in lines)


@pytest.mark.parametrize(
    ("model", "request_", "kind", "words"),
    [
        ("pockit", {}, WeightsError, "Did you mean 'pocket'"),
        ("/no/such/folder", {}, WeightsError, "/no/such/folder"),
        ("random:wan3", {}, WeightsError, "wan2"),
        ("pocket", {"scheduler": "unicp"}, RequestError, "Did you mean 'unipc'"),
        ("pocket", {"scheduler": "ddim"}, RequestError, "cannot run Wan: the model predicts flow"),
        ("pocket", {"scheduler": "LMSDiscreteScheduler"}, RequestError, "extrapolates noise"),
        ("pocket", {"scheduler": "euler_ancestral"}, RequestError, "variance-exploding"),
        ("pocket", {"num_frames": 32}, RequestError, "29 or 33"),
        ("wan2.2-i2v-a14b", {}, RequestError, "from an image"),
    ],
    ids=str,
)
def test_what_cannot_run_is_told_before_loading(model, request_, kind, words):
    with pytest.raises(kind, match=words):
        sw.explain(model, sw.TextToVideo("a cat", **request_), device="cpu")


IMAGE = Image.new("RGB", (832, 480))


def test_image_to_video_is_explained_without_weights():
    explanation = sw.explain("random:wan2.1-i2v-14b-480p", sw.ImageToVideo("a cat", image=IMAGE), plan=[], device="cpu")
    told = "\n".join(explanation.lines())
    assert "task       ImageToVideo" in told
    assert "memory: used as it is" in told
    assert "size       832x480, 81 frames at 16 fps" in told
    # 16.395 B of transformer, 632 M of CLIP less its last layer, UMT5-XXL and the VAE.
    text = sw.explain("random:wan2.1-t2v-14b", sw.TextToVideo("a cat"), plan=[], device="cpu", dtype="fp32")
    difference = (explanation.load.weight_bytes - text.load.weight_bytes) / 4
    assert difference == pytest.approx(16.395e9 - 14.288e9 + 0.611e9, rel=5e-3)
    assert explanation.to_json()["inputs"][0]["fitted"] == ""


@pytest.mark.parametrize(
    ("creativity", "scheduler", "forwards"), [(0, "unipc", 0), (0.5, "unipc", 20), (0.5, "heun", 38)]
)
def test_creativity_counts_the_steps_that_run(creativity, scheduler, forwards):
    request = sw.ImageToImage("a cat", image=IMAGE, creativity=creativity, scheduler=scheduler, num_inference_steps=20)
    assert sw.explain("pocket", request, device="cpu").load.forwards == forwards


def test_cuda_without_cuda():
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(UnavailableError, match="cuda"):
        sw.explain("pocket", sw.TextToVideo("a cat"), device="cuda")


def test_two_experts_count_twice():
    request = sw.TextToVideo("a cat")
    one = sw.explain("random:wan2.1-t2v-14b", request, device="cpu")
    two = sw.explain("random:wan2.2-t2v-a14b", request, device="cpu")
    expert = parameter_count(one.facts.known.transformer) * 4
    assert two.load.weight_bytes - one.load.weight_bytes == expert


@pytest.mark.parametrize(("free", "words"), [(59 * 10**9, "does not fit"), (60 * 10**9, "fits")])
def test_host_memory_beside_a_gpu_is_told_by_phase(monkeypatch, free, words):
    monkeypatch.setattr("swiftwan.plan.host_memory", lambda: (64 * 10**9, free))
    gpu = Device("cuda:0", "NVIDIA H200", 141 * 10**9, 140 * 10**9, (9, 0), 132, torch.bfloat16, "for the test")
    facts = describe("random:wan2.2-t2v-a14b")
    request = complete(sw.TextToVideo("a cat"), facts)
    plan = make_plan(["offload:model"], gpu, None, facts)
    told = Explanation(facts, request, plan, gpu, estimate(request, facts, plan, gpu.total_bytes))
    lines = told.lines()
    phases = [line for line in lines if line.startswith("  ")]
    assert [line.rpartition("; ")[2] for line in phases[:2]] == ["59.27 GB of host memory"] * 2
    assert f"host       peak 59.72 GB; {free / 1e9:.2f} GB free: {words}" in lines
    on_cpu = replace(told, device=pick_device("cpu")).lines()
    assert not [line for line in on_cpu if "of host memory" in line or line.startswith("host")]


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0.01234, "0.0123 s"),
        (599.0, "599 s"),
        (600.0, "10 minutes"),
        (35_999.0, "600 minutes"),
        (357_000.0, "99.2 hours"),
        (1.79e7, "207 days"),
        (1e9, "11,574 days"),
    ],
)
def test_a_time_is_told_in_a_unit_that_one_can_imagine(seconds, told):
    load = Load(1, 1, 1.0, (), step_seconds=seconds, denoise_seconds=seconds, decode_seconds=0.0)
    assert swiftwan_plan._times(load) == [
        f"time       about {told} a step, {told} of denoising and 0 s of decoding: {told}"
    ]


def test_the_transformer_is_counted_exactly():
    config = KNOWN_MODELS["wan2.1-t2v-1.3b"].transformer
    with torch.device("meta"):
        assert parameter_count(config) == sum(p.numel() for p in WanTransformer(config).parameters())
