"""The pieces of the pocket recipe; the recipe itself needs a GPU (LOG.md tells how it went)."""

import random

import pytest
import torch

from swiftwan.pocket.world import (
    COLOURS,
    MOTIONS,
    SHAPES,
    Scene,
    Thing,
    held_out_combinations,
    parse_prompt,
    sample_scenes,
)
from swiftwan.train.pocket_dit import TEXT_TOKENS, Pocket, caption, flow_loss, tokenize, training_scenes
from swiftwan.train.pocket_tokenizer import build


def test_each_word_of_the_world_is_one_token():
    tokenizer = build()
    for word in {word for phrase in (*COLOURS, *SHAPES, *MOTIONS) for word in phrase.split()}:
        assert len(tokenizer.tokenize(word)) == 1, word


def test_any_text_tokenizes_and_ends():
    tokenizer = build()
    for text in ("", "Ein grüner Kreis 🙂", "a\tb"):
        ids = tokenizer(text).input_ids
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.unk_token_id not in ids


def test_the_longest_prompt_fits():
    thing = Thing("orange", "triangle", "stays still", "small")
    tokens = tokenize([Scene((thing, Thing("yellow", "square", "moves right", "large")), "sunset").prompt], build())
    assert tokens.shape == (1, TEXT_TOKENS)
    assert tokens[0, -1] == 0


def test_captions_are_prompts_or_their_beginnings():
    rng = random.Random(0)
    whole = 0
    for scene in sample_scenes(300, 1):
        text = caption(scene, rng)
        assert set(text.split()) <= {*scene.prompt.split(), "a", "an"}
        whole += parse_prompt(text) == scene
    assert 240 < whole < 300


def test_the_shares_of_what_is_hard_are_as_asked():
    scenes = training_scenes(400, 5, two_things=0.6, twins=0.3)
    two = sum(len(scene.things) == 2 for scene in scenes) / 400
    twins = sum(
        scene.background in ("blue", "green") and any(t.colour in ("blue", "green") for t in scene.things)
        for scene in scenes
    )
    assert 0.5 < two < 0.7
    assert 0.22 < twins / 400 < 0.38
    hidden = held_out_combinations()
    assert not any((t.colour, t.shape, t.motion) in hidden for scene in scenes for t in scene.things)
    assert scenes == training_scenes(400, 5, two_things=0.6, twins=0.3)


def test_a_perfect_model_has_no_loss_and_a_given_frame_does_not_count():
    latents, noise = torch.randn(2, 16, 3, 4, 4), torch.randn(2, 16, 3, 4, 4)
    level = torch.tensor([0.3, 0.8])

    def perfect(noisy, timestep, tokens):
        assert timestep.shape == (2, 2)
        assert torch.equal(noisy[:, :, 0], latents[:, :, 0])
        flow = noise - latents
        return torch.cat((torch.full_like(flow[:, :, :1], 9.0), flow[:, :, 1:]), dim=2)

    assert flow_loss(perfect, latents, torch.zeros(2, 4), level, noise, first_given=True) < 1e-10


def test_one_step_of_training_moves_text_encoder_and_transformer():
    model = Pocket(len(build()))
    tokens = tokenize(["a red circle moves left over a blue background", ""], build())
    latents = torch.randn(2, 16, 1, 4, 4)
    flow_loss(model, latents, tokens, torch.tensor([0.2, 0.9]), torch.randn_like(latents), first_given=False).backward()
    unmoved = [name for name, p in model.named_parameters() if p.grad is None]
    assert unmoved == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["pocket-dit", "--vae", "nowhere", "--out", "run", "--device", "cpu"],
        ["pocket-assemble", "--vae", "nowhere", "--dit", "nowhere", "--out", "model"],
    ],
    ids=" ".join,
)
def test_missing_parts_are_one_line_and_nothing_written(arguments, tmp_path, monkeypatch, capsys):
    from swiftwan.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
