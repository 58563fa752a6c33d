from dataclasses import replace
from types import SimpleNamespace

import pytest

from swiftwan.device import pick_device
from swiftwan.errors import PlanError
from swiftwan.models.config import POCKET
from swiftwan.models.vae import WanVAE
from swiftwan.models.vae_fast import FastDecoder
from swiftwan.plan import make_plan, parse

CPU = pick_device("cpu")
GPU = replace(CPU, name="a GPU", capability=(9, 0))


def test_fast_is_exact_and_needs_a_gpu(monkeypatch):
    fast = parse("vae:fast")
    assert (fast.spec, fast.kind) == ("vae:fast", "exact")
    assert parse("vae:tiling").kind == "approximate"
    with pytest.raises(PlanError, match="'vae' cannot run on .*its kernels need an NVIDIA GPU"):
        make_plan(["vae:fast"], CPU)
    monkeypatch.setattr("swiftwan.techniques.vae.find_spec", lambda name: None)
    with pytest.raises(PlanError, match="pip install triton"):
        make_plan(["vae:fast"], GPU)


def test_fast_and_tiling_run_at_once(monkeypatch):
    monkeypatch.setattr("swiftwan.techniques.vae.find_spec", lambda name: name)
    assert make_plan(["vae:tiling", "vae:fast"], GPU).specs == ("vae:fast", "vae:tiling")
    with pytest.raises(PlanError, match="both decide blocks of vae.layers"):
        make_plan(["vae:fast", "vae:fast"], GPU)


@pytest.mark.parametrize(
    ("spec", "words"),
    [("vae:quick", "vae:quick is not known; there are vae:fast"), ("vae:fast:sample=3", "has no option 'sample'")],
)
def test_bad_specs(spec, words):
    with pytest.raises(PlanError, match=words):
        parse(spec)


def test_fast_changes_the_vae():
    parts = SimpleNamespace(vae=WanVAE(POCKET.vae))
    parse("vae:fast").install(parts)
    assert isinstance(parts.vae.make_decoder(parts.vae.decoder), FastDecoder)
