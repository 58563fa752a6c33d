"""Models that begin with an image, and models of two experts: tiny ones in the pocket model's clothes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from swiftwan.errors import RequestError
from swiftwan.inputs import Given
from swiftwan.models.config import KNOWN_MODELS, POCKET
from swiftwan.models.dit import WanTransformer
from swiftwan.pipelines.request import ImageToVideo
from swiftwan.pipelines.start import Material, beside_channels
from swiftwan.train import flow
from swiftwan.train.cache import pixels
from swiftwan.train.lora import check, prepare, train
from swiftwan.train.processes import Processes
from swiftwan.train.run import Run
from swiftwan.train.settings import Settings
from swiftwan.weights.lora import LoraFile

SMALL = Settings(steps=8, rank=2, frames=9, learning_rate=1e-3, warmup=1, validate_every=8, checkpoint_every=8)


def random_transformer(**changes):
    torch.manual_seed(1)
    config = replace(POCKET.transformer, num_layers=1, **changes)
    return WanTransformer(config).eval().requires_grad_(False)


@pytest.fixture
def two(engine):
    """A model of two experts."""
    known = replace(POCKET, transformer=replace(POCKET.transformer, num_layers=1), boundary_ratio=0.875)
    engine.facts = replace(engine.facts, known=known)
    engine.parts.transformer, engine.parts.transformer_2 = random_transformer(), random_transformer()
    engine.parts.boundary_ratio = 0.875
    return engine


@pytest.fixture
def begins_with_image(engine):
    """A model that takes a first frame as channels, as Wan2.1-I2V does."""
    transformer = random_transformer(in_channels=36)
    engine.facts = replace(engine.facts, known=replace(POCKET, transformer=transformer.config, expand_timesteps=False))
    engine.parts.transformer = transformer
    return engine


def test_both_experts_learn_each_at_its_own_levels(clips, tmp_path, two, monkeypatch):
    seen = {}
    real = flow.loss

    def watched(transformer, batch, level, *rest):
        seen.setdefault(transformer is two.parts.transformer, []).append(level)
        return real(transformer, batch, level, *rest)

    monkeypatch.setattr(flow, "loss", watched)
    (file,) = train(two, str(clips), tmp_path, replace(SMALL, held_out=0.0, shift=5.0))
    high, low = torch.cat(seen[True]), torch.cat(seen[False])
    assert high.min() >= 0.875 > low.max()
    found = load_file(file)
    names = {name.removeprefix("transformer_2.") for name in found if name.startswith("transformer_2.")}
    assert names == {name.removeprefix("transformer.") for name in found if name.startswith("transformer.")}
    assert LoraFile.open(file).experts == {"high", "low"}
    assert any(not torch.equal(found[f"transformer.{n}"], found[f"transformer_2.{n}"]) for n in names)


def test_one_adapter_for_both(clips, tmp_path, two):
    (file,) = train(two, str(clips), tmp_path, replace(SMALL, experts="shared", shift=5.0))
    found = load_file(file)
    high = {name: tensor for name, tensor in found.items() if name.startswith("transformer.")}
    for name, tensor in high.items():
        assert torch.equal(tensor, found[name.replace("transformer.", "transformer_2.", 1)])
    assert any(tensor.any() for name, tensor in high.items() if "lora_B" in name)


@pytest.mark.parametrize("expert", ["high", "low"])
def test_one_expert_alone_is_said_in_the_file_s_name(clips, tmp_path, two, expert):
    before = {n: p.clone() for n, p in two.parts.transformer.named_parameters()}
    (file,) = train(two, str(clips), tmp_path, replace(SMALL, steps=1, experts=expert))
    assert file.name == f"lora-{expert}_noise.safetensors"
    assert all(torch.equal(p, before[n]) for n, p in two.parts.transformer.named_parameters() if n in before)


def test_a_first_frame_goes_beside_the_noise_as_in_sampling(clips, tmp_path, begins_with_image):
    engine = begins_with_image
    checked = check(engine, str(clips), SMALL, tmp_path)
    data = prepare(engine, checked, SMALL, tmp_path / "cache", lambda *step: None)
    run = Run(engine, SMALL, data, tmp_path, Processes(engine.torch_device))
    item = data.train[0]
    batch = run.batch([item], flow.generator(0, 0, engine.torch_device))
    frames = pixels(item)
    request = ImageToVideo("x", image="unread", num_frames=9, width=64, height=64)
    given = Given(frames[None, :1], ())
    scheduler = SimpleNamespace(timesteps=torch.tensor([1.0]))
    material = Material(engine.parts, request, given, torch.zeros_like(batch.latents), scheduler, None)
    expected = beside_channels(material).given.mask_and_image
    assert batch.channels.shape == (1, 20, 3, 8, 8)
    torch.testing.assert_close(batch.channels, expected, atol=5e-3, rtol=1e-3)  # kept in float16


def test_a_model_that_begins_with_an_image_trains_and_samples(clips, tmp_path, begins_with_image):
    begins_with_image.facts = replace(
        begins_with_image.facts,
        known=replace(
            begins_with_image.facts.known, defaults=replace(POCKET.defaults, num_inference_steps=1, guidance_scale=1.0)
        ),
    )
    train(begins_with_image, str(clips), tmp_path, replace(SMALL, steps=2, sample_every=2))
    assert (tmp_path / "samples" / "step-000002-0.mp4").is_file()


def test_a_model_from_first_to_last_frame_is_refused(clips, tmp_path, engine):
    engine.facts = replace(engine.facts, known=KNOWN_MODELS["wan2.1-flf2v-14b"])
    with pytest.raises(RequestError, match="goes from a first frame to a last one"):
        train(engine, str(clips), tmp_path, SMALL)
