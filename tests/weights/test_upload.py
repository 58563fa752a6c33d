"""Files to a GPU: the bytes that a mapped file has."""

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from swiftwan.errors import WeightsError
from swiftwan.weights import upload
from swiftwan.weights.sources import Shards
from swiftwan.weights.upload import Upload, _fill


def test_a_stretch_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(100)))
    buffer = torch.zeros(7, dtype=torch.uint8)
    _fill(buffer, tmp_path / "a", 20)
    assert buffer.tolist() == list(range(20, 27))


def test_a_file_that_ends_early_or_is_gone(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(10))
    with pytest.raises(WeightsError, match="a ends before its last tensor; download it again"):
        _fill(torch.zeros(7, dtype=torch.uint8), tmp_path / "a", 4)
    with pytest.raises(WeightsError, match="b cannot be read: No such file"):
        _fill(torch.zeros(7, dtype=torch.uint8), tmp_path / "b", 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_type_and_size_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "PIECE", 1000)  # so that tensors are of several pieces
    tensors = {
        "bf16": torch.randn(700, 33).to(torch.bfloat16),
        "f32": torch.randn(5, 7, 11),
        "f8": torch.randn(40, 64).to(torch.float8_e4m3fn),
        "ints": torch.randint(-9, 9, (3001,)),
        "flags": torch.rand(10) > 0.5,
        "nothing": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
    }
    save_file(tensors, tmp_path / "w.safetensors")
    source = Shards((tmp_path / "w.safetensors",))
    for _ in range(2):
        for name, expected in tensors.items():
            found = source.read(name, "cuda")
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert torch.equal(found.cpu().flatten().view(torch.uint8), expected.flatten().view(torch.uint8))
        source.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_that_is_used_again_at_once_is_not_written_too_soon(tmp_path: Path) -> None:
    big = torch.randint(0, 255, (2**24 + 5,), dtype=torch.uint8)
    (tmp_path / "a").write_bytes(big.numpy().tobytes())
    reader, before = Upload(torch.device("cuda")), threading.active_count()
    for _ in range(5):
        busy = torch.ones(2**24 + 5, dtype=torch.uint8, device="cuda")
        for _ in range(50):
            busy = busy + 1
        total = busy.sum(dtype=torch.int64)  # still in the queue when its memory is taken for the next read
        del busy
        found = reader.read(tmp_path / "a", 0, len(big))
        assert torch.equal(found.cpu(), big)
        assert total.item() == 51 * len(big)
    assert threading.active_count() <= before + upload.THREADS
    reader.close()
    assert threading.active_count() == before
    (tmp_path / "a").write_bytes(b"short")
    again = Upload(torch.device("cuda"))
    with pytest.raises(WeightsError, match="ends before"):
        again.read(tmp_path / "a", 0, len(big))
    again.close()
