"""The pieces of the pocket recipe; the recipe itself needs a GPU (LOG.md tells how it went)."""

import random
from pathlib import Path

import pytest
import torch

import swiftwan.pocket
from swiftwan.pocket.scenes import (
    COLOURS,
    MOTIONS,
    SHAPES,
    Scene,
    Thing,
    held_out_combinations,
    parse_prompt,
    sample_scenes,
)
from swiftwan.train.pocket_dit import (
    KINDS,
    TEXT_TOKENS,
    Latents,
    Pocket,
    caption,
    draw_batch,
    flow_loss,
    tokenize,
    training_scenes,
)
from swiftwan.train.pocket_text import binding, labels
from swiftwan.train.pocket_text import train as train_text
from swiftwan.train.pocket_tokenizer import build
from swiftwan.train.recorded import Recorded, plain


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
    level, given = torch.tensor([0.3, 0.8]), torch.tensor([True, False])

    def perfect(noisy, timestep, tokens):
        assert torch.equal(timestep, torch.tensor([[0.0, 300.0], [800.0, 800.0]]))
        assert torch.equal(noisy[0, :, 0], latents[0, :, 0])
        flow = noise - latents
        flow[0, :, 0] = 9.0
        return flow

    assert flow_loss(perfect, latents, torch.zeros(2, 4), level, noise, given) < 1e-10


def test_with_no_frame_given_both_forms_of_the_loss_agree():
    latents, noise, level = torch.randn(2, 16, 3, 4, 4), torch.randn(2, 16, 3, 4, 4), torch.tensor([0.3, 0.8])

    def model(noisy, timestep, tokens):
        return noisy * timestep.reshape(2, -1)[:, -1].view(-1, 1, 1, 1, 1)

    one = flow_loss(model, latents, torch.zeros(2, 4), level, noise)
    two = flow_loss(model, latents, torch.zeros(2, 4), level, noise, torch.tensor([False, False]))
    torch.testing.assert_close(one, two)


def test_one_step_of_training_moves_text_encoder_and_transformer():
    model = Pocket(len(build()))
    tokens = tokenize(["a red circle moves left over a blue background", ""], build())
    latents = torch.randn(2, 16, 1, 4, 4)
    flow_loss(model, latents, tokens, torch.tensor([0.2, 0.9]), torch.randn_like(latents)).backward()
    unmoved = [name for name, p in model.named_parameters() if p.grad is None]
    assert unmoved == []


def test_a_batch_follows_from_its_seed():
    scenes = sample_scenes(4, 1)
    data = Latents(torch.randn(4, 16, 9, 4, 4).half(), tokenize([scene.prompt for scene in scenes], build()))
    clips, still = KINDS
    first, again, other = (draw_batch(data, clips, 64, seed=seed, shift=3.0) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert 0 < first[4].sum() < 24
    assert len(draw_batch(data, still, 2, seed=1, shift=3.0)) == 4


def test_each_word_is_labelled_with_its_own_thing():
    scenes = [scene for scene in sample_scenes(40, 3) if len(scene.things) == 2]
    tokenizer = build()
    for scene in scenes:
        rows = labels(scene)
        assert len(rows) == len(tokenizer(scene.prompt).input_ids)
        for thing in scene.things:
            place = tokenizer.tokenize(scene.prompt).index(tokenizer.tokenize(thing.colour)[0])
            assert rows[place][1:4] == [
                list(words).index(word)
                for words, word in zip(
                    (COLOURS, SHAPES, MOTIONS), (thing.colour, thing.shape, thing.motion), strict=True
                )
            ]


def test_a_new_text_encoder_is_a_bag_of_words_and_the_shipped_one_is_not():
    model = Pocket(len(build()))
    assert binding(model, count=8) < 0.1
    model.read_text(Path(swiftwan.pocket.__file__).parent / "model" / "text_encoder")
    assert binding(model, count=8) > 0.1  # 0.0004 before it had learnt which words belong together


def test_training_the_text_encoder_lowers_its_loss(monkeypatch):
    monkeypatch.setattr("swiftwan.train.pocket_text.EXAMPLES", 64)
    monkeypatch.setattr("swiftwan.train.pocket_text.LOG_EVERY", 1)
    log = train_text(Pocket(len(build())), steps=8, batch=16, seed=1, learning_rate=3e-3, device=torch.device("cpu"))
    assert log[-1]["loss"] < log[0]["loss"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_recorded_step_has_the_plain_step_s_gradients():
    model = Pocket(len(build())).cuda()
    parameters = list(model.parameters())
    step = plain(lambda *inputs: flow_loss(model, *inputs), parameters)
    recorded = Recorded(step)
    tokens = tokenize(["a red circle moves left over a blue background", ""], build()).cuda()
    for seed in (1, 2):
        torch.manual_seed(seed)
        latents, noise = torch.randn(2, 2, 16, 3, 4, 4, device="cuda")
        inputs = (latents, tokens, torch.rand(2, device="cuda"), noise, torch.tensor([True, False], device="cuda"))
        loss, gradients = step(*inputs)
        again, same = recorded(*inputs)
        torch.testing.assert_close(again, loss)
        for name, a, b in zip(dict(model.named_parameters()), same, gradients, strict=True):
            torch.testing.assert_close(a, b, msg=name)


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
