import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import save_file
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from swiftwan.errors import Cancelled, OutputError, WeightsError
from swiftwan.weights.find import read_layout
from swiftwan.weights.layout import Folder
from swiftwan.weights.load import load_weights, randomize, save_weights

CPU = {"device": "cpu", "dtype": torch.float32}


class Net(nn.Module):
    """Every kind of tensor a checkpoint holds, and a buffer that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv3d(2, 3, 3)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, 400))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("positions", torch.arange(4.0), persistent=False)

    def reset_buffers(self, device: torch.device) -> None:
        self.positions = torch.arange(4.0, device=device)


def on_meta(build=Net) -> nn.Module:
    with torch.device("meta"):
        return build()


def refused(call, kind=WeightsError) -> str:
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Net, list[Path]]:
    net = Net()
    save_weights(net, tmp_path / "net", {"_class_name": "Net"}, max_shard_bytes=3000)
    return net, sorted((tmp_path / "net").glob("*.safetensors"))


def test_round_trip(saved: tuple[Net, list[Path]]) -> None:
    net, files = saved
    assert len(files) > 1
    copy = on_meta()
    report = load_weights(copy, files, component="net", **CPU)
    for name, tensor in net.state_dict().items():
        assert torch.equal(copy.state_dict()[name], tensor), name
    assert copy.positions.tolist() == [0, 1, 2, 3]
    assert report.tensors == len(net.state_dict())
    assert report.bytes == sum(t.nbytes for t in net.state_dict().values())


def test_what_is_not_wanted_any_more_is_read_no_further(saved: tuple[Net, list[Path]]) -> None:
    answers = iter((True, True, False))
    copy = on_meta()
    with pytest.raises(Cancelled, match="net is not wanted any more"):
        load_weights(copy, saved[1], component="net", is_wanted=lambda: next(answers), **CPU)
    assert sum(not tensor.is_meta for tensor in copy.state_dict().values()) == 2


def test_dtypes(saved: tuple[Net, list[Path]]) -> None:
    net, files = saved
    copy = on_meta()
    load_weights(copy, files, device="cpu", dtype=torch.bfloat16, keep_fp32=("norm.*", "scale_shift*"), component="n")
    assert {n for n, t in copy.state_dict().items() if t.dtype == torch.float32} == {
        "norm.weight",
        "norm.bias",
        "scale_shift_table",
    }
    assert copy.count.dtype == torch.int64
    assert torch.equal(copy.conv.weight, net.conv.weight.bfloat16())


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float16, torch.float64])
def test_other_stored_dtypes(tmp_path: Path, stored: torch.dtype) -> None:
    weight = torch.randn(4, 6).to(stored)
    save_file({"weight": weight}, tmp_path / "w.safetensors")
    module = on_meta(lambda: nn.Linear(6, 4, bias=False))
    load_weights(module, [tmp_path / "w.safetensors"], device="cpu", dtype=torch.float16, component="w")
    assert torch.equal(module.weight, weight.to(torch.float16))


def test_parameters_do_not_keep_the_file(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(4, 6)}, tmp_path / "w.safetensors")
    module = on_meta(lambda: nn.Linear(6, 4, bias=False))
    load_weights(module, [tmp_path / "w.safetensors"], component="w", **CPU)
    assert "w.safetensors" not in Path("/proc/self/maps").read_text()
    (tmp_path / "w.safetensors").write_bytes(b"")
    assert module.weight.sum() == 24


def test_all_that_does_not_fit_is_told(tmp_path: Path) -> None:
    tensors = Net().state_dict() | {"linear.weight": torch.zeros(4, 7), "__class__": torch.zeros(1)}
    del tensors["conv.bias"]
    save_file(tensors, tmp_path / "w.safetensors")
    text = refused(lambda: load_weights(on_meta(), [tmp_path / "w.safetensors"], component="vae", **CPU))
    assert "1 missing (conv.bias); 1 unexpected (__class__)" in text
    assert "(linear.weight 4x7 instead of 4x6)" in text


def test_names_in_a_file_are_never_attributes(tmp_path: Path) -> None:
    net = on_meta()
    evil = {"linear.__class__": torch.zeros(1), "forward": torch.zeros(1), "norm.training": torch.zeros(1)}
    save_file(Net().state_dict() | evil, tmp_path / "w.safetensors")
    load_weights(net, [tmp_path / "w.safetensors"], component="n", ignore=tuple(evil), **CPU)
    assert type(net.linear) is nn.Linear
    assert callable(net.forward)
    assert net.norm.training is True


def test_one_name_in_two_shards(saved: tuple[Net, list[Path]], tmp_path: Path) -> None:
    save_file({"linear.weight": torch.zeros(4, 6)}, tmp_path / "again.safetensors")
    text = refused(lambda: load_weights(on_meta(), [*saved[1], tmp_path / "again.safetensors"], component="n", **CPU))
    assert "one of them is stale" in text


def test_forgotten_buffer_is_our_mistake(saved: tuple[Net, list[Path]], monkeypatch) -> None:
    monkeypatch.delattr(Net, "reset_buffers")
    with pytest.raises(AssertionError, match="still on meta: positions"):
        load_weights(on_meta(), saved[1], component="n", **CPU)


# --- against diffusers and transformers


def test_reads_what_diffusers_wrote(tiny: Path) -> None:
    layout = read_layout(Folder(tiny, "tiny"))
    for component, cls in (("transformer", WanTransformer3DModel), ("vae", AutoencoderKLWan)):
        theirs = cls.from_pretrained(tiny / component)
        ours = on_meta(lambda cls=cls, config=theirs.config: cls.from_config(config))
        ours.reset_buffers = lambda device, theirs=theirs, ours=ours: copy_buffers(theirs, ours)
        load_weights(ours, layout.files[component], component=component, **CPU)
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], tensor), name


def copy_buffers(theirs: nn.Module, ours: nn.Module) -> None:
    for name, buffer in theirs.named_buffers():
        owner, _, leaf = name.rpartition(".")
        ours.get_submodule(owner)._buffers[leaf] = buffer.clone()


def test_tied_embedding_of_the_text_encoder(tiny: Path) -> None:
    theirs = UMT5EncoderModel.from_pretrained(tiny / "text_encoder")
    config = UMT5Config.from_pretrained(tiny / "text_encoder")
    ours = on_meta(lambda: UMT5EncoderModel(config))
    load_weights(ours, [tiny / "text_encoder" / "model.safetensors"], component="text_encoder", **CPU)
    assert ours.shared.weight is ours.encoder.embed_tokens.weight
    ids = torch.randint(0, 64, (2, 7))
    torch.testing.assert_close(ours.eval()(ids).last_hidden_state, theirs(ids).last_hidden_state)


def test_weights_of_another_model(tiny: Path) -> None:
    layout = read_layout(Folder(tiny, "tiny"))
    config = WanTransformer3DModel.load_config(tiny / "transformer")
    i2v = config | {"in_channels": 36, "image_dim": 8, "added_kv_proj_dim": 24}
    module = on_meta(lambda: WanTransformer3DModel.from_config(i2v))
    text = refused(lambda: load_weights(module, layout.files["transformer"], component="transformer", **CPU))
    assert "missing (condition_embedder.image_embedder" in text
    assert "patch_embedding.weight 24x16x1x2x2 instead of 24x36x1x2x2" in text


def test_diffusers_reads_what_we_wrote(tmp_path: Path) -> None:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "text_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
    }
    module = WanTransformer3DModel(**config)
    folder = tmp_path / "transformer"
    save_weights(module, folder, config | {"_class_name": "WanTransformer3DModel"}, max_shard_bytes=30_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    theirs = WanTransformer3DModel.from_pretrained(folder)
    for name, tensor in module.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor), name


def test_random_weights_are_the_same_in_every_dtype() -> None:
    wide, narrow = on_meta(), on_meta()
    randomize(wide, device="cpu", dtype=torch.float32)
    randomize(narrow, device="cpu", dtype=torch.bfloat16)
    assert torch.equal(narrow.linear.weight, wide.linear.weight.bfloat16())
    assert wide.linear.weight.std() > 0


# --- save


def test_saving_again_replaces_all(tmp_path: Path) -> None:
    save_weights(Net(), tmp_path / "n", {"v": 1}, max_shard_bytes=2000)
    net = Net()
    save_weights(net, tmp_path / "n", {"v": (2, 3)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["n"]
    assert sorted(p.name for p in (tmp_path / "n").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert json.loads((tmp_path / "n" / "config.json").read_text()) == {"v": [2, 3]}
    copy = on_meta()
    load_weights(copy, [tmp_path / "n" / "diffusion_pytorch_model.safetensors"], component="n", **CPU)
    assert torch.equal(copy.linear.weight, net.linear.weight)


def test_foreign_files_are_safe(tmp_path: Path) -> None:
    (tmp_path / "holiday.mp4").touch()
    assert "'holiday.mp4', which would be lost" in refused(lambda: save_weights(Net(), tmp_path, {}), OutputError)
    assert "is a file" in refused(lambda: save_weights(Net(), tmp_path / "holiday.mp4", {}), OutputError)


def test_failed_save_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_weights(Net(), tmp_path / "n", {"v": 1})

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("swiftwan.weights.write._write_shard", full)
    assert "No space left on device" in refused(lambda: save_weights(Net(), tmp_path / "n", {"v": 2}), OutputError)
    assert [p.name for p in tmp_path.iterdir()] == ["n"]
    assert json.loads((tmp_path / "n" / "config.json").read_text()) == {"v": 1}


def test_disk_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swiftwan.weights.write.shutil.disk_usage", lambda _: SimpleNamespace(free=1))
    assert "its disk has 0.000 GB free" in refused(lambda: save_weights(Net(), tmp_path / "n", {}), OutputError)
    assert list(tmp_path.iterdir()) == []


def test_tied_and_sliced_tensors_are_saved(tmp_path: Path) -> None:
    table = torch.randn(6, 4)
    save_weights({"a": table, "b": table, "c": table[:2], "d": table.T}, tmp_path / "n", {})
    from safetensors.torch import load_file

    loaded = load_file(tmp_path / "n" / "diffusion_pytorch_model.safetensors")
    assert loaded.keys() == {"a", "c", "d"}
    assert torch.equal(loaded["c"], table[:2])
    assert torch.equal(loaded["d"], table.T)


# --- random


def test_randomize() -> None:
    net, again, other = on_meta(), on_meta(), on_meta()
    for module, seed in ((net, 1), (again, 1), (other, 2)):
        randomize(module, device="cpu", dtype=torch.bfloat16, keep_fp32=("scale_shift_table",), seed=seed)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    assert not torch.equal(net.linear.weight, other.linear.weight)
    assert net.norm.weight.tolist() == [1] * 4
    assert net.linear.bias.abs().sum() == 0
    assert net.linear.weight.dtype == torch.bfloat16
    assert net.scale_shift_table.dtype == torch.float32
    assert net.scale_shift_table.std().item() == pytest.approx(1 / 20, rel=0.1)
    big = on_meta(lambda: nn.Conv3d(64, 64, 3))
    randomize(big, device="cpu", dtype=torch.float32)
    assert big.weight.std().item() == pytest.approx((64 * 27) ** -0.5, rel=0.02)


def test_random_transformer_keeps_activations_in_range() -> None:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "text_dim": 16,
        "ffn_dim": 32,
        "num_layers": 3,
    }
    module = on_meta(lambda: WanTransformer3DModel(**config))
    template = WanTransformer3DModel(**config)
    module.reset_buffers = lambda device: copy_buffers(template, module)
    randomize(module, device="cpu", dtype=torch.float32)
    sample, text = torch.randn(1, 16, 2, 8, 8), torch.randn(1, 9, 16)
    out = module(sample, torch.tensor([500]), text).sample
    assert 0.05 < out.std() < 20


# --- devices and memory


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_to_the_gpu(saved: tuple[Net, list[Path]]) -> None:
    net, files = saved
    copy = on_meta()
    load_weights(copy, files, device="cuda", dtype=torch.bfloat16, component="n")
    for name, tensor in net.to(torch.bfloat16).state_dict().items():
        found = copy.state_dict()[name]
        assert found.is_cuda, name
        assert torch.equal(found.cpu(), tensor), name
    randomize(copy, device="cuda", dtype=torch.bfloat16)
    assert copy.linear.weight.is_cuda


_MEASURE = """
import resource, sys, torch
from pathlib import Path
from torch import nn
from swiftwan.weights.load import load_weights

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024

files = sorted(Path(sys.argv[1]).glob("*.safetensors"))
with torch.device("meta"):
    module = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(64)))
before = peak()
report = load_weights(module, files, device="cpu", dtype=torch.bfloat16, component="net")
print(peak() - before, report.bytes)
"""


def test_host_memory_is_the_model_and_one_shard(tmp_path: Path) -> None:
    shard = 8 * 4 * 2**20
    weights = {f"{i}.weight": torch.zeros(1024, 1024) for i in range(64)}  # 256 MB in eight shards
    save_weights(weights, tmp_path / "net", {}, max_shard_bytes=shard)
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path / "net")], capture_output=True, text=True, check=True
    )
    grown, model = map(int, run.stdout.split())
    assert model == 128 * 2**20
    assert grown < model + shard + 16 * 2**20  # measured: the model, one shard and 3 MiB, for shards of 8 to 256 MiB
