from dataclasses import replace

import pytest
import torch

import swiftwan as sw
from swiftwan.device import pick_device
from swiftwan.errors import PlanError, UnavailableError
from swiftwan.ops import attention as kernels
from swiftwan.ops.fp8 import Fp8Linear, quantize_rows
from swiftwan.plan import describe, make_plan, parse
from swiftwan.techniques.attention import Attention


def test_the_kernel_is_set_in_every_block_of_both_experts(parts, forward, monkeypatch):
    calls = []

    def attend(q, k, v):
        calls.append(q.shape)
        return kernels.sdpa(q, k, v)

    expected = forward(parts.transformer)
    mine = kernels.Kernel("sdpa", "exact", lambda: attend)
    monkeypatch.setattr(kernels, "KERNELS", (mine,))
    Attention("sdpa").install(parts)
    assert torch.equal(forward(parts.transformer), expected)
    forward(parts.transformer_2)
    assert calls == [(1, 2 * 4 * 4, 2, 32)] * 4


def test_each_kernel_says_whether_it_is_exact():
    assert parse("attention:cudnn").kind == "exact"
    assert parse("attention:sage").kind == "near"
    assert Attention.kind == "exact"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("attention:flash5", "Did you mean 'flash"),
        ("attention", r"needs a value: attention:sdpa, cudnn.* for self-attention\.$"),
        ("attention:cudnn", "it needs an NVIDIA GPU of compute capability 8.0"),
        ("attention:flash4", "it needs an NVIDIA GPU of compute capability 9.0"),
    ],
)
def test_what_cannot_run_on_a_cpu_is_told(spec, words):
    with pytest.raises(PlanError, match=words):
        make_plan([spec], pick_device("cpu"))


def test_a_missing_package_is_told_with_the_way_to_it(gpu):
    with pytest.raises(PlanError, match="pip install 'sageattention'"):
        make_plan(["attention:sage"], gpu((8, 9)))


def test_half_precision_kernels_refuse_float32(gpu):
    with pytest.raises(PlanError, match="take dtype:bf16, or attention:sdpa"):
        make_plan(["attention:cudnn"], gpu((9, 0)), "fp32")
    assert make_plan(["attention:cudnn"], gpu((9, 0))).specs == ("attention:cudnn",)


def test_a_broken_installation_is_told(parts, monkeypatch):
    def broken():
        raise ImportError("libcute.so: no such file\nmore")

    monkeypatch.setattr(kernels, "KERNELS", (kernels.Kernel("flash4", "exact", broken),))
    with pytest.raises(UnavailableError, match="cannot be loaded: libcute.so: no such file; take"):
        Attention("flash4").install(parts)


def test_auto_takes_the_fastest_exact_kernel_that_is_here(gpu, monkeypatch):
    monkeypatch.setattr("swiftwan.techniques.fused.find_spec", lambda name: object())
    monkeypatch.setattr("swiftwan.techniques.vae.find_spec", lambda name: None)
    monkeypatch.setattr(kernels, "_installed", lambda package: True)
    assert make_plan("auto", gpu((9, 0))).specs == ("attention:flash4", "fused")
    assert make_plan("auto", gpu((9, 0)), "fp32").specs == ("fused",)
    assert make_plan("auto", gpu((8, 6))).specs == ("fused",)
    assert make_plan("auto", gpu((7, 5))).specs == ()
    monkeypatch.setattr(kernels, "_installed", lambda package: False)
    assert make_plan("auto", gpu((9, 0))).specs == ("attention:cudnn", "fused")
    monkeypatch.setattr("swiftwan.techniques.fused.find_spec", lambda name: None)
    assert make_plan("auto", gpu((9, 0))).specs == ("attention:cudnn",)
    assert make_plan("auto", pick_device("cpu")).specs == ()
    assert make_plan("none", gpu((9, 0))).specs == ()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("attention:fp8:keep-steps=-1", "keep-steps is -1; it is 0 or more"),
        ("attention:flash4:keep-layers=2", "is exact everywhere; keep-layers is for kernels in 8 bits"),
        ("attention:fp9", "Did you mean 'fp8'"),
        ("attention:fp8", "compute capability 9.0 or more"),
    ],
)
def test_bad_plans_say_what_and_how(spec, words):
    with pytest.raises(PlanError, match=words):
        make_plan([spec], pick_device("cpu"))


def test_the_8_bit_kernel_is_for_hopper_and_its_head_width(gpu, monkeypatch):
    monkeypatch.setattr(kernels, "_installed", lambda package: True)
    with pytest.raises(PlanError, match=r"tensor cores of GPUs before compute capability 10\.0"):
        make_plan(["attention:fp8"], gpu((10, 0)))
    with pytest.raises(PlanError, match="'fp8' takes heads of 128, those of 'pocket' are 64"):
        make_plan(["attention:fp8"], gpu((9, 0)), facts=describe("pocket"))
    plan = make_plan(["attention:fp8:keep-steps=2"], gpu((9, 0)), facts=describe("random:wan2.1-t2v-1.3b"))
    assert plan.specs == ("attention:fp8:keep-steps=2",)
    assert plan.techniques[0].kind == "near"


def test_widths_of_heads_are_told(gpu, monkeypatch):
    monkeypatch.setattr(kernels, "_installed", lambda package: True)
    pocket = describe("pocket").known
    narrow = replace(pocket, transformer=replace(pocket.transformer, num_attention_heads=14, attention_head_dim=32))
    with pytest.raises(PlanError, match="'sage' takes heads of 64 or 96 or 128, those of 'pocket' are 32"):
        Attention("sage").fit(narrow)
    assert Attention("sage").fit(pocket) == []
    wide = replace(pocket, transformer=replace(pocket.transformer, num_attention_heads=1, attention_head_dim=448))
    with pytest.raises(PlanError, match="'flash2' takes heads of 1 to 256, those of 'pocket' are 448"):
        Attention("flash2").fit(wide)
    with pytest.raises(PlanError, match="flash2' computes in bf16 or fp16 and this run is in fp32"):
        make_plan(["attention:flash2"], gpu((9, 0)), "fp32")


REQUEST = sw.TextToVideo("a red circle moves left over a blue background", seed=1, num_inference_steps=4, num_frames=5)


def latents(*plan):
    engine = sw.Engine.load("pocket", plan=["prompt-cache:off", *plan], device="cpu", dtype="fp32")
    request = sw.TextToVideo(
        "a red circle moves left over a blue background", seed=1, num_inference_steps=4, num_frames=5
    )
    return engine.run(request).latents


def test_the_ends_stay_exact():
    exact, near = latents(), latents("attention:fp8-plain")
    assert 1e-4 < ((near - exact).norm() / exact.norm()).item() < 0.3
    # The request has 4 steps, the model 7 blocks.
    assert torch.equal(latents("attention:fp8-plain:keep-steps=2"), exact)
    assert torch.equal(latents("attention:fp8-plain:keep-layers=4"), exact)
    for spec in ("keep-steps=1", "keep-layers=1"):
        some = latents(f"attention:fp8-plain:{spec}")
        assert not torch.equal(some, exact)
        assert not torch.equal(some, near)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("tokens", "width"), [(320, 64), (320, 128), (1565, 128)])
def test_sage_is_as_near_as_8_bits_and_its_padding_are(tokens, width):
    if told := kernels.kernel("sage").missing_on(torch.cuda.get_device_capability()):
        pytest.skip(told)
    q, k, v = (torch.randn(2, tokens, 3, width, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    k += 4  # what smoothing takes away
    before = k.clone()
    got = kernels.kernel("sage").load()(q, k, v).float()
    assert torch.equal(k, before)
    expected = kernels.sdpa(q.float(), k.float(), v.float())
    # Padded keys weigh as the mean score does: never more than the tokens do on average.
    padded = -tokens % 64 / tokens
    assert ((got - expected).norm() / expected.norm()).item() < 2e-2 + padded
    # SageAttention reads slices, as the merged projection of q, k and v makes them.
    sliced = torch.stack((q, k, v), dim=2).unbind(2)
    assert torch.equal(kernels.kernel("sage").load()(*sliced).float(), got)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [kernel.name for kernel in kernels.KERNELS])
def test_kernels_agree_with_the_reference(name):
    chosen = kernels.kernel(name)
    if told := chosen.missing_on(torch.cuda.get_device_capability()):
        pytest.skip(told)
    tokens = 320 if name == "sage" else 300  # 1.0.6 counts keys padded to a multiple of 64
    q, k, v = (torch.randn(2, tokens, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    got, expected = chosen.load()(q, k, v), kernels.sdpa(q.float(), k.float(), v.float())
    assert got.shape == q.shape
    assert ((got.float() - expected).norm() / expected.norm()).item() < (5e-2 if chosen.kind == "near" else 5e-3)


def test_a_kernel_hands_bytes_to_the_blocks_whose_next_layer_reads_them(parts, monkeypatch):
    def to_bytes(q, k, v):
        return quantize_rows(kernels.sdpa(q, k, v))

    mine = kernels.Kernel("sdpa", "near", lambda: kernels.sdpa, load_for_bytes=lambda: to_bytes)
    monkeypatch.setattr(kernels, "KERNELS", (mine,))
    first, second = parts.transformer.blocks
    first.attn1.to_out[0] = Fp8Linear.of(first.attn1.to_out[0])
    Attention("sdpa").install(parts)
    assert first.attn1.attend is to_bytes
    assert second.attn1.attend is kernels.sdpa


@pytest.mark.parametrize("value", ["fp8", "fp8-plain"])
def test_slices_of_queries_are_refused_beside_8_bits(gpu, monkeypatch, value):
    """The kernel would take keys and values for as many as the slice's queries."""
    monkeypatch.setattr(kernels, "_installed", lambda package: True)
    with pytest.raises(PlanError, match="written for as many keys as queries"):
        make_plan([f"attention:{value}", "attention-slicing"], gpu((9, 0)))
