import multiprocessing
import os

import pytest
import torch

import swiftwan as sw
from swiftwan.errors import PlanError
from swiftwan.models.text import TextEncoder
from swiftwan.prompt_cache import PromptCache, digest
from swiftwan.weights import build

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


def embedding(seed=0, tokens=7):
    return torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(seed)).bfloat16()


def key(seed):
    return digest({"text": str(seed)})


def test_an_entry_comes_back_bit_equal_in_another_process(tmp_path):
    PromptCache(tmp_path).put(key(1), embedding(1))
    found = PromptCache(tmp_path).get(key(1), CPU)
    assert found is not None
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, embedding(1))
    assert PromptCache(tmp_path).get(key(2), CPU) is None


def test_all_that_decides_the_bits_is_in_the_key():
    parts = {"text": "a", "encoder": "b", "dtype": "c", "device": "d", "torch": "e", "length": 512}
    keys = {digest(parts)} | {digest(parts | {name: "other"}) for name in parts}
    assert len(keys) == 1 + len(parts)


def test_the_folder_stays_within_its_limit_and_the_last_used_stay(tmp_path):
    size = len(save_size(tmp_path / "probe"))
    cache = PromptCache(tmp_path / "cache", disk_bytes=3 * size)
    for seed in range(3):
        cache.put(key(seed), embedding(seed))
        os.utime(cache._path(key(seed)), ns=(seed, seed))
    assert PromptCache(tmp_path / "cache").get(key(0), CPU) is not None  # now the last used
    cache.put(key(3), embedding(3))
    left = {path.stem for path in (tmp_path / "cache").iterdir()}
    assert left == {key(0), key(2), key(3)}


def save_size(folder):
    cache = PromptCache(folder)
    cache.put(key(0), embedding(0))
    return cache._path(key(0)).read_bytes()


def test_a_damaged_entry_counts_as_absent_and_is_replaced(tmp_path):
    cache = PromptCache(tmp_path)
    cache.put(key(1), embedding(1))
    path = cache._path(key(1))
    path.write_bytes(path.read_bytes()[:-3])
    assert PromptCache(tmp_path).get(key(1), CPU) is None
    cache.put(key(1), embedding(1))
    assert PromptCache(tmp_path).get(key(1), CPU) is not None


def test_a_folder_that_cannot_be_written_is_told_once_and_done_without(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = PromptCache(tmp_path / "file")
    cache.put(key(1), embedding(1))
    cache.put(key(2), embedding(2))
    assert [r.message for r in caplog.records if "not kept" in r.message] == [caplog.records[0].message]
    assert torch.equal(cache.get(key(2), CPU), embedding(2))


def _write_and_read(folder):
    cache = PromptCache(folder, disk_bytes=3000)
    for seed in range(60):
        cache.put(key(seed % 5), embedding(seed % 5))
        found = PromptCache(folder, disk_bytes=3000).get(key((seed + 1) % 5), CPU)
        assert found is None or torch.equal(found, embedding((seed + 1) % 5))


def test_two_writers_of_one_folder_never_see_a_half_entry(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write_and_read, args=(tmp_path,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_known_prompt_needs_no_text_encoder(monkeypatch):
    request = sw.TextToVideo("a red circle moves left", seed=3, num_frames=1, num_inference_steps=1)
    first = sw.Engine.load("pocket", device="cpu")
    expected = first.run(request).latents
    assert first.parts.text.is_loaded

    second = sw.Engine.load("pocket", device="cpu")
    monkeypatch.setattr(TextEncoder, "_encode", lambda *_: pytest.fail("the text was encoded again"))
    assert torch.equal(second.run(request).latents, expected)
    assert not second.parts.text.is_loaded


@pytest.mark.parametrize("place", ["memory", "off"])
def test_nothing_reaches_the_disk_unless_asked(place, tmp_path):
    engine = sw.Engine.load("pocket", plan=[f"prompt-cache:{place}"], device="cpu")
    engine.parts.text.encode("a blue star")
    assert not (tmp_path / "user" / "swiftwan" / "prompts").exists()
    assert (engine.parts.text.cache is None) == (place == "off")


def test_an_unknown_place_is_told():
    with pytest.raises(PlanError, match="prompt-cache is 'dsik'. Did you mean 'disk'"):
        sw.Engine.load("pocket", plan=["prompt-cache:dsik"], device="cpu")


def test_an_encoder_told_to_unload_leaves_after_the_prompts():
    request = sw.TextToVideo("a green star stays still", seed=3, num_frames=1, num_inference_steps=1)
    plain = sw.Engine.load("pocket", plan=["prompt-cache:off"], device="cpu")
    engine = sw.Engine.load("pocket", plan=["prompt-cache:off", "text-encoder:unload"], device="cpu")
    assert torch.equal(engine.run(request).latents, plain.run(request).latents)
    assert not engine.parts.text.is_loaded
    assert torch.equal(engine.run(request).latents, plain.run(request).latents)
    assert plain.parts.text.is_loaded


def test_an_unknown_home_is_told():
    with pytest.raises(PlanError, match="text-encoder is 'cpuu'. Did you mean 'cpu'"):
        sw.Engine.load("pocket", plan=["text-encoder:cpuu"], device="cpu")


def test_the_encoder_of_a_new_prompt_is_under_way_when_the_engine_is_there():
    request = sw.TextToVideo("a white triangle grows", seed=3, num_frames=1, num_inference_steps=1)
    plain = sw.Engine.load("pocket", device="cpu")
    told = sw.Engine.load("pocket", device="cpu", request=request)
    assert plain.parts.text._loading is None
    assert told.parts.text._loading is not None
    assert torch.equal(told.run(request).latents, plain.run(request).latents)
    assert told.parts.text._loading is None
    again = sw.Engine.load("pocket", device="cpu", request=request)
    assert again.parts.text._loading is None  # both prompts are in the cache now


def test_the_encoder_begins_to_load_before_all_else(monkeypatch):
    told = []
    expect, load_weights = TextEncoder.expect, build.load_weights
    monkeypatch.setattr(TextEncoder, "expect", lambda self, words: told.append("expected") or expect(self, words))
    monkeypatch.setattr(
        build,
        "load_weights",
        lambda *args, component, **more: told.append(component) or load_weights(*args, component=component, **more),
    )
    request = sw.TextToVideo("a white triangle shrinks", seed=3, num_frames=1, num_inference_steps=1)
    sw.Engine.load("pocket", device="cpu", request=request).parts.text.encode("a white triangle shrinks")
    assert [what for what in told if what != "text_encoder"] == ["expected", "vae", "transformer"]
    assert told.count("text_encoder") == 1


def test_what_fails_while_the_encoder_loads_is_raised_when_it_is_needed(monkeypatch):
    engine = sw.Engine.load("pocket", plan=["prompt-cache:off"], device="cpu")
    engine.parts.text._load = lambda *_: (_ for _ in ()).throw(MemoryError("full"))
    engine.parts.text.expect(["a blue star"])
    with pytest.raises(MemoryError, match="full"):
        engine.parts.text.encode("a blue star")
