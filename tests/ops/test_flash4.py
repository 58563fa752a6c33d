import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from swiftwan.ops import flash4
from swiftwan.ops.attention import kernel, sdpa

posix = pytest.mark.skipif(os.name != "posix", reason="owners and modes of files are POSIX's")
needs_compiler = pytest.mark.skipif(not shutil.which("gcc"), reason="links with gcc")
gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


# Without the package: what stands in for it compiles to a true object file, which is truly linked


def stand_in(q, k, v):
    """In attention's place: the same bits however its inputs lie in memory, which sums do not have."""
    return q + 2 * k[:, :1] - v[:, :1]


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """A Hopper GPU, FlashAttention-4 and tvm_ffi of the same names, and an empty cache; counts what is compiled."""
    seen = SimpleNamespace(compiled=0, loaded=0, imported=0, called=[], answer=stand_in)
    source = tmp_path / "attend.c"
    source.write_text("int attend(void) { return 7; }")

    def export_to_c(object_file_path, function_name):
        assert function_name == "attend"
        subprocess.run(["gcc", "-c", "-fPIC", "-o", object_file_path, source], check=True)

    def forward(q, k, v, tile_mn, mma_pv_is_rs):
        if not forward.compile_cache:
            seen.compiled += 1
            forward.compile_cache["key"] = SimpleNamespace(export_to_c=export_to_c)
        return stand_in(q, k, v), None

    def attend(q, k, v, out, lse, scale, *rest):
        assert (lse, scale, rest) == (None, 128**-0.5, (None,) * 9 + ((None, None), None, None))
        seen.called.append([x.stride() for x in (q, k, v)])
        out.copy_(seen.answer(q, k, v))

    def load_module(path):
        seen.loaded += 1
        assert Path(path).read_bytes().startswith(b"\x7fELF")
        return {"attend": attend}

    forward.compile_cache = {"their": "kernel"}
    runtime = tmp_path / "libruntime.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", runtime, "-x", "c", os.devnull], check=True)
    interface = SimpleNamespace(_flash_attn_fwd=forward, flash_attn_func=lambda q, k, v: (stand_in(q, k, v), None))

    def package():
        seen.imported += 1
        return interface

    linspace = torch.linspace
    monkeypatch.setattr(flash4, "package", package)
    monkeypatch.setattr(flash4, "version", lambda name: f"{name} 1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch, "linspace", lambda *given, device: linspace(*given))
    monkeypatch.setitem(sys.modules, "tvm_ffi", SimpleNamespace(load_module=load_module))
    monkeypatch.setitem(
        sys.modules,
        "cutlass.cute.runtime",
        SimpleNamespace(find_runtime_libraries=lambda enable_tvm_ffi: [str(runtime)]),
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    return seen


def qkv(dtype=torch.bfloat16, width=128):
    return [torch.randn(2, 5, 3, width).to(dtype) for _ in range(3)]


def libraries(tmp_path):
    return list((tmp_path / "cache" / "swiftwan" / "flash4-linked").iterdir())


@posix
@needs_compiler
@pytest.mark.parametrize("dtype", flash4.TYPES)
def test_the_first_process_compiles_and_a_later_one_imports_nothing(pretended, tmp_path, dtype):
    q, k, v = qkv(dtype)
    assert torch.equal(flash4.load()(q, k, v), stand_in(q, k, v))
    (library,) = libraries(tmp_path)
    assert library.stat().st_mode & 0o777 == 0o600
    assert library.parent.stat().st_mode & 0o777 == 0o700
    assert (pretended.compiled, pretended.imported) == (1, 2)
    assert torch.equal(flash4.load()(q, k, v), stand_in(q, k, v))  # as another process would
    assert (pretended.compiled, pretended.imported) == (1, 2)


@posix
@needs_compiler
def test_the_package_s_own_cache_is_as_it_was(pretended):
    flash4.load()(*qkv())
    assert flash4.package()._flash_attn_fwd.compile_cache == {"their": "kernel"}


@posix
@needs_compiler
def test_another_version_or_option_is_another_library(pretended, monkeypatch, tmp_path):
    flash4.keep(torch.bfloat16, flash4.WIDE)
    for options in (flash4.NARROW, flash4.WIDE._replace(mma_pv_is_rs=True)):
        assert flash4.kept(torch.bfloat16, options) is None
    flash4.keep(torch.bfloat16, flash4.NARROW)
    monkeypatch.setattr(flash4, "version", lambda name: "2")
    assert flash4.kept(torch.bfloat16, flash4.WIDE) is None
    flash4.keep(torch.bfloat16, flash4.WIDE)
    assert len(libraries(tmp_path)) == pretended.compiled == 3


@pytest.mark.parametrize(
    ("keys", "options"),
    [
        (1560, flash4.NARROW),  # a picture of 832x480: 1568 instead of 1664
        (3600, flash4.WIDE),  # of 1280x720: 3696 and 3712
        (4096, flash4.WIDE),
        (32760, flash4.WIDE),
        (90000, flash4.WIDE),
        (112, flash4.NARROW),
        (113, flash4.WIDE),
    ],
)
def test_tiles_are_narrow_where_wide_ones_hold_much_that_is_no_key(keys, options):
    assert flash4.options_for(keys) is options


@posix
@needs_compiler
def test_each_dtype_and_gpu_has_its_own(pretended, monkeypatch, tmp_path):
    flash4.keep(torch.bfloat16, flash4.WIDE)
    assert flash4.kept(torch.float16, flash4.WIDE) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 1))
    assert flash4.kept(torch.bfloat16, flash4.WIDE) is None


@posix
@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "another may write it"])
def test_what_is_not_what_was_written_is_not_loaded_and_made_again(pretended, tmp_path, damage):
    flash4.keep(torch.bfloat16, flash4.WIDE)
    (library,) = libraries(tmp_path)
    content = library.read_bytes()
    if damage == "another may write it":
        library.chmod(0o620)
    else:
        library.write_bytes({"cut": content[:-100], "changed": b"\0" + content[1:], "empty": b""}[damage])
    assert flash4.kept(torch.bfloat16, flash4.WIDE) is None
    assert libraries(tmp_path) == []
    assert pretended.loaded == 1
    q, k, v = qkv()
    assert torch.equal(flash4.load()(q, k, v), stand_in(q, k, v))
    assert libraries(tmp_path)[0].stat().st_mode & 0o777 == 0o600


@posix
@needs_compiler
@pytest.mark.parametrize("lack", ["compiler", "private folder", "folder", "linker"])
def test_where_nothing_can_be_kept_the_package_serves(pretended, monkeypatch, tmp_path, lack):
    folder = tmp_path / "cache" / "swiftwan" / "flash4-linked"
    if lack == "compiler":
        monkeypatch.setattr(shutil, "which", lambda name: None)
    elif lack == "linker":
        monkeypatch.setenv("CC", "/bin/false")
    elif lack == "folder":
        folder.parent.mkdir(parents=True)
        folder.touch()
    else:
        folder.mkdir(parents=True)
        folder.chmod(0o770)
    q, k, v = qkv()
    assert torch.equal(flash4.load()(q, k, v)[0], stand_in(q, k, v))
    assert pretended.loaded == 0
    assert folder.is_file() or not folder.is_dir() or not any(folder.iterdir())


@posix
@needs_compiler
@pytest.mark.parametrize("change", ["another answer", "another number of arguments"])
def test_a_kernel_that_is_not_the_package_s_call_is_not_kept(pretended, tmp_path, change):
    def refuse(q, k, v):
        raise TypeError("Expects 19 parameters")

    pretended.answer = refuse if "number" in change else lambda q, k, v: stand_in(q, k, v) * 2
    q, k, v = qkv()
    assert torch.equal(flash4.load()(q, k, v)[0], stand_in(q, k, v))
    assert pretended.loaded == 1
    assert libraries(tmp_path) == []


@posix
@needs_compiler
def test_another_user_s_library_is_not_loaded(pretended, monkeypatch, tmp_path):
    flash4.keep(torch.bfloat16, flash4.WIDE)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert flash4.kept(torch.bfloat16, flash4.WIDE) is None
    assert len(libraries(tmp_path)) == 1  # nor ours to remove
    assert pretended.loaded == 1


@posix
@needs_compiler
@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q[..., :64], k[..., :64], v[..., :64]),
        lambda q, k, v: (q.float(), k.float(), v.float()),
        lambda q, k, v: (q[:, :0], k, v),
    ],
)
def test_what_the_kernel_is_not_for_goes_to_the_package(pretended, change):
    inputs = change(*qkv())
    assert torch.equal(flash4.load()(*inputs)[0], stand_in(*inputs))
    assert pretended.compiled == 0


@posix
@needs_compiler
@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q, k[:1], v[:1]),
        lambda q, k, v: (q, k[:, :, :2], v[:, :, :2]),
        lambda q, k, v: (q, k, v[:, :4]),
        lambda q, k, v: (q, k.half(), v),
        lambda q, k, v: (q[0], k[0], v[0]),
    ],
)
def test_shapes_that_do_not_fit_are_the_package_s_to_refuse(pretended, monkeypatch, change):
    def refuse(q, k, v):
        raise AssertionError("does not fit")

    monkeypatch.setattr(flash4.package(), "flash_attn_func", refuse)
    with pytest.raises(AssertionError, match="does not fit"):
        flash4.load()(*change(*qkv()))


@posix
@needs_compiler
def test_strides_that_the_kernel_cannot_read_are_laid_out_anew(pretended):
    whole = torch.randn(2, 5, 3, 384).bfloat16()
    views = [whole[..., i * 128 : (i + 1) * 128] for i in range(3)]
    off = torch.randn(2 * 5 * 3 * 128 + 1).bfloat16()[1:].view(2, 5, 3, 128)
    repeated = torch.randn(1, 5, 3, 128).bfloat16().expand(2, -1, -1, -1)
    across = torch.randn(2, 5, 128, 3).bfloat16().transpose(2, 3)
    attend = flash4.load()
    for inputs in (views, [off] * 3, [repeated] * 3, [across] * 3):
        assert torch.equal(attend(*inputs), stand_in(*inputs))
    assert pretended.called[1] == [view.stride() for view in views]  # read where they are
    assert {stride for call in pretended.called[2:] for stride in call} == {(1920, 384, 128, 1)}


# With it


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """A true one, with an empty cache."""
    if missing := kernel("flash4").missing_on(torch.cuda.get_device_capability()):
        pytest.skip(missing)
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("a kernel is kept for Hopper alone")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


KEPT_ALONE = """
import hashlib, sys, torch
from swiftwan.ops.attention import kernel
attend = kernel("flash4").load()
q, k, v = torch.load(sys.argv[1], weights_only=True)
sys.stdout.write(hashlib.sha256(attend(*(x.cuda() for x in (q, k, v))).view(torch.int16).cpu().numpy()).hexdigest())
assert not {"cutlass", "flash_attn"} & sys.modules.keys()
"""


@gpu
@needs_cuda
@pytest.mark.filterwarnings("default")  # importing FlashAttention-4 warns of what its own packages deprecate
@pytest.mark.parametrize("dtype", flash4.TYPES)
@pytest.mark.parametrize("options", [flash4.WIDE, flash4.NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize(("queries", "keys"), [(1000, 1000), (257, 1), (640, 4090)])
def test_a_kept_kernel_has_the_bits_of_the_imported_function(hopper, dtype, options, queries, keys):
    kept = flash4.keep(dtype, options)
    assert kept is not None
    q, k, v = (torch.randn(2, n, 3, 128, device="cuda", dtype=dtype) for n in (queries, keys, keys))
    assert torch.equal(kept(q, k, v), flash4.imported(options, q, k, v)[0])
    assert (kept(q, k, v).float() - sdpa(*(x.float() for x in (q, k, v)))).abs().max() < 0.03
    grown = q.clone().requires_grad_()
    assert torch.equal(kept(grown, k, v), kept(q, k, v))


@gpu
@needs_cuda
@pytest.mark.filterwarnings("default")
def test_a_kept_kernel_keeps_to_the_current_stream_and_goes_into_a_graph(hopper):
    kept = flash4.keep(torch.bfloat16, flash4.WIDE)
    q, k, v = (torch.randn(1, 4096, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    expected = kept(q, k, v)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = kept(q * 1, k, v)
    stream.synchronize()
    assert torch.equal(late, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = kept(q, k, v)
    q.copy_(torch.randn_like(q))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(recorded, kept(q, k, v))


@gpu
@needs_cuda
@pytest.mark.filterwarnings("default")
def test_a_second_process_imports_neither_the_package_nor_its_compiler(hopper, tmp_path):
    kept = flash4.keep(torch.bfloat16, flash4.options_for(300))
    inputs = [torch.randn(1, 300, 2, 128, dtype=torch.bfloat16) for _ in range(3)]
    torch.save(inputs, given := tmp_path / "given.pt")
    command = [sys.executable, "-c", KEPT_ALONE, given]
    source = str(Path(flash4.__file__).parents[2])
    paths = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    assert (done.returncode, done.stderr) == (0, "")
    here = kept(*(x.cuda() for x in inputs)).view(torch.int16).cpu().numpy()
    assert done.stdout == hashlib.sha256(here).hexdigest()
