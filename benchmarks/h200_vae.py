"""`vae-832x480x81` and its like: latents to uint8 frames on one H200, beside diffusers' AutoencoderKLWan.

    python benchmarks/h200_vae.py bench vae-832x480x81 [--out FOLDER]   # rows, on standard output too
    python benchmarks/h200_vae.py encode vae-832x480x81                 # the other way: video to latents
    python benchmarks/h200_vae.py check                                 # errors per dtype, kernels and whole decoders
    python benchmarks/h200_vae.py variants                              # chunk lengths and layouts
    python benchmarks/h200_vae.py compiled ours|peer                    # torch.compile of the plain decoders
    python benchmarks/h200_vae.py profile                               # top kernels, to profile.txt
    python benchmarks/h200_vae.py all --out FOLDER                      # each of these, in its own process with a limit

Both have the same random weights and latents, in one process, turn about; the peer's frames are made uint8 on the
device too. Errors are relative, against diffusers in float32 without TF32. ``ceiling_fraction`` counts the
arithmetic of the plain layers, of which the fast ones do 0.65, so it may pass 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swiftwan.models.config import WAN21_VAE, WAN22_VAE, VAEConfig
from swiftwan.models.vae import WanVAE
from swiftwan.models.vae_fast import FastDecoder, Layout
from swiftwan.ops.vae_between import STACKED, VOLUME, WINOGRAD, Window

CASES = {
    "vae-832x480x81": (WAN21_VAE, 81, 480, 832),
    "vae-1280x720x81": (WAN21_VAE, 81, 720, 1280),
    "vae22-1280x704x121": (WAN22_VAE, 121, 704, 1280),
}
CEILING = 705e12  # the rate of the largest bf16 product measured on this chip, for ceiling_fraction
CHUNK = 4
WINDOWS = {"volume": VOLUME, "stacked": STACKED, "winograd": WINOGRAD}
WITH_FP32 = ("vae-832x480x81",)  # elsewhere it is too slow to repeat
PREFIX = 5  # latent frames that errors are taken over


def diffusers_vae(config: VAEConfig) -> Any:
    from diffusers import AutoencoderKLWan

    with torch.device("cuda"):
        values = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(config).items()}
        vae = AutoencoderKLWan(**values).eval().requires_grad_(False)
        torch.manual_seed(0)
        for name, parameter in vae.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            else:
                nn.init.normal_(parameter, mean=float(name.endswith("gamma")), std=0.2)
    return vae


def our_vae(config: VAEConfig, theirs: Any, dtype: torch.dtype, fast: bool = True) -> WanVAE:
    with torch.device("meta"):
        vae = WanVAE(config).eval().requires_grad_(False)
    vae.load_state_dict({k: v.to(dtype) for k, v in theirs.state_dict().items()}, assign=True)
    vae.prepare("cuda")
    return vae.run_fast() if fast else vae


def latents_of(config: VAEConfig, frames: int, height: int, width: int, seed: int = 1) -> Tensor:
    cell = config.scale_factor_spatial
    shape = (1, config.z_dim, (frames - 1) // 4 + 1, height // cell, width // cell)
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def to_uint8(video: Tensor) -> Tensor:
    frames = video[0].permute(1, 2, 3, 0).float()
    return ((frames / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def frames_of(vae: WanVAE, z: Tensor, chunk: int | None = CHUNK) -> Tensor:
    return torch.cat(list(vae.stream_frames(vae.normalize(z), chunk)))


@torch.no_grad()
def timed(run: Callable[[], Any]) -> tuple[float, int]:
    """Seconds and peak bytes of one run."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated()


def relative(ours: Tensor, reference: Tensor) -> float:
    return ((ours.float() - reference.float()).norm() / reference.float().norm()).item()


@torch.no_grad()
def arithmetic(config: VAEConfig, z: Tensor) -> int:
    """Operations of a plain decode of these latents, counted on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        vae = WanVAE(config)
        with FlopCounterMode(display=False) as counter:
            vae.decode_raw(torch.empty(z.shape))
    return counter.get_total_flops()


def tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def row(case: str, **values: Any) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    names = ("torch", "triton", "diffusers")
    return {"case": case, "rung": "exact"} | values | {
        "device": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in names} | {"cudnn": torch.backends.cudnn.version()},
        "commit": commit or "see LOG.md",
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip


@torch.no_grad()
def bench(case: str, repeats: int, out: Path) -> Iterator[dict[str, Any]]:
    config, *size = CASES[case]
    z = latents_of(config, *size)
    theirs = diffusers_vae(config)
    start = z[:, :, :PREFIX]  # the decoder is causal: the whole clip begins with the same frames
    tf32(False)
    reference = theirs.decode(start).sample
    tf32(True)
    runs: dict[str, Callable[[], Any]] = {}
    fast, plain = our_vae(config, theirs, torch.bfloat16), our_vae(config, theirs, torch.bfloat16, fast=False)
    wide = theirs
    low = diffusers_vae(config).bfloat16()
    fast_wide = our_vae(config, theirs, torch.float32)
    chunk = settle(fast, z, out)
    settle(fast_wide, z, out)
    benchmark = torch.backends.cudnn.benchmark

    def alone(run: Callable[[], Any]) -> Callable[[], Any]:
        """Only ours runs as variants settled it; the peer as it comes."""

        def scoped() -> Any:
            torch.backends.cudnn.benchmark = benchmark
            try:
                return run()
            finally:
                torch.backends.cudnn.benchmark = False

        return scoped

    torch.backends.cudnn.benchmark = False
    runs["vae:fast"] = alone(lambda: frames_of(fast, z, chunk))
    if case in WITH_FP32:
        runs["vae:fast fp32"] = alone(lambda: frames_of(fast_wide, z, 1))
    runs["plain"] = lambda: frames_of(plain, z, 1)
    runs["diffusers bf16"] = lambda: to_uint8(low.decode(z.bfloat16()).sample)
    if case in WITH_FP32:
        runs["diffusers fp32"] = lambda: to_uint8(wide.decode(z).sample)
    decoded = {
        "vae:fast": fast.decode(fast.normalize(start), chunk),
        "vae:fast fp32": fast_wide.decode(fast_wide.normalize(start), 1),
        "plain": plain.decode(plain.normalize(start), 1),
        "diffusers bf16": low.decode(start.bfloat16()).sample,
        "diffusers fp32": wide.decode(start).sample,
    }
    errors = {name: relative(video, reference) for name, video in decoded.items()}
    whole = to_uint8(reference).float()
    off = {name: (to_uint8(video).float() - whole).abs().mean().item() for name, video in decoded.items()}
    del decoded, whole, reference
    torch.cuda.empty_cache()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, int] = {}
    for repeat in range(repeats + 1):  # the first round warms up and is not counted
        for name, run in runs.items():
            if "fp32" in name and repeat not in (1, 2):  # slow
                continue
            taken, peaks[name] = timed(run)
            if repeat:
                seconds[name].append(taken)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    operations = arithmetic(config, z)
    for ours in ("vae:fast", "plain", "vae:fast fp32"):
        for peer in ("diffusers bf16", "diffusers fp32"):
            if not {ours, peer} <= runs.keys() or (ours.endswith("fp32") and not peer.endswith("fp32")):
                continue
            yield row(
                case,
                plan=[] if ours == "plain" else ours.split(),
                latent_frames_per_chunk=chunk if ours == "vae:fast" else 1,
                shape=f"latents {tuple(z.shape)} to uint8 frames on the device",
                seconds=round(median[ours], 4),
                spread=[round(min(seconds[ours]), 4), round(max(seconds[ours]), 4)],
                repeats=len(seconds[ours]),
                peer=f"{peer}, eager, TF32 allowed",
                peer_seconds=round(median[peer], 4),
                peer_spread=[round(min(seconds[peer]), 4), round(max(seconds[peer]), 4)],
                ratio=round(median[peer] / median[ours], 2),
                ceiling_fraction=round(operations / CEILING / median[ours], 3),
                tflop=round(operations / 1e12, 1),
                peak_bytes=peaks[ours],
                peer_peak_bytes=peaks[peer],
                error=round(errors[ours], 5),
                peer_error=round(errors[peer], 5),
                mean_uint8_difference=round(off[ours], 4),
                peer_mean_uint8_difference=round(off[peer], 4),
                status="ok",
            )


@torch.no_grad()
def check() -> Iterator[dict[str, Any]]:
    """Both decoders against diffusers in float32, at sizes that do not divide by anything convenient."""
    tf32(False)
    for config, size in ((WAN21_VAE, (17, 296, 424)), (WAN22_VAE, (17, 208, 304))):
        z = latents_of(config, *size)
        theirs = diffusers_vae(config)
        reference = theirs.decode(z).sample
        low = diffusers_vae(config).bfloat16().decode(z.bfloat16()).sample
        found = {"diffusers bf16": relative(low, reference)}
        for dtype in (torch.float32, torch.bfloat16):
            for fast in (False, True):
                vae = our_vae(config, theirs, dtype, fast)
                for chunk in (1, 2, None):
                    name = f"{'fast' if fast else 'plain'} {dtype} chunk {chunk}"
                    found[name] = relative(vae.decode(vae.normalize(z), chunk), reference)
            for name, layout in layouts(Path("nowhere")).items():
                vae.make_decoder = lambda d, layout=layout: FastDecoder(d, layout)
                found[f"fast {dtype} {name}"] = relative(vae.decode(vae.normalize(z), CHUNK), reference)
        for name, error in found.items():
            yield {"check": "wan2.2" if config.is_residual else "wan2.1", "what": name, "error": error}


def layouts(out: Path) -> dict[str, Layout]:
    """Each window wherever it divides, and the fastest of each shape where components have been measured."""

    def all_in(window: Window) -> Layout:
        return lambda i, o, t: VOLUME if window is WINOGRAD and t % 2 else window

    found = {name: all_in(window) for name, window in WINDOWS.items()}
    file = out / "layout.json"
    if file.exists():
        measured: dict[str, str] = json.loads(file.read_text())

        def fastest(i: int, o: int, t: int) -> Window:
            near = [(abs(int(key.split(",")[2]) - t), g) for key, g in measured.items() if key.startswith(f"{i},{o},")]
            return all_in(WINDOWS[min(near)[1]] if near else VOLUME)(i, o, t)

        found["components"] = fastest
    return found


@torch.no_grad()
def variants(out: Path) -> Iterator[dict[str, Any]]:
    """Every layout and chunk length; the fastest goes to best.json, which bench and profile run."""
    config, *size = CASES["vae-832x480x81"]
    z = latents_of(config, *size)
    vae = our_vae(config, diffusers_vae(config), torch.bfloat16)
    results = []
    for benchmark in (False, True):
        torch.backends.cudnn.benchmark = benchmark
        for name, layout in layouts(out).items():
            vae.make_decoder = lambda d, layout=layout: FastDecoder(d, layout)
            chunks = (1, 2, 4, 7) if name in ("winograd", "components") and not benchmark else (1, 4)
            for chunk in chunks:
                taken = [timed(lambda chunk=chunk: frames_of(vae, z, chunk)) for _ in range(2)]
                seconds, peak = taken[1]
                what = {"layout": name, "chunk": chunk, "benchmark": benchmark}
                results.append((seconds, what))
                yield {"variant": what, "seconds": seconds, "peak_gb": peak / 1e9}
    (out / "best.json").write_text(json.dumps(min(results, key=lambda result: result[0])[1]))


def settle(vae: WanVAE, z: Tensor, out: Path) -> int:
    """Make ``vae`` decode as variants found best, where it ran; the chunk length."""
    file = out / "best.json"
    if not file.exists():
        return vae.latent_frames_at_once(z)
    best = json.loads(file.read_text())
    torch.backends.cudnn.benchmark = best["benchmark"]
    vae.make_decoder = lambda d: FastDecoder(d, layouts(out)[best["layout"]])
    return int(best["chunk"])


@torch.no_grad()
def encode(case: str, repeats: int) -> Iterator[dict[str, Any]]:
    """Video to normalised latents, ours beside diffusers' posterior mode, on the same weights."""
    config, frames, height, width = CASES[case]
    video = (
        torch.rand(1, 3, frames, height, width, generator=torch.Generator("cuda").manual_seed(1), device="cuda") * 2 - 1
    )
    theirs = diffusers_vae(config)
    start = video[:, :, : 4 * PREFIX - 3]  # causal, as decoding is
    tf32(False)
    reference = theirs.encode(start).latent_dist.mode()
    tf32(True)
    fast = our_vae(config, theirs, torch.bfloat16)
    plain = our_vae(config, theirs, torch.bfloat16, fast=False)
    low = diffusers_vae(config).bfloat16()
    runs: dict[str, Callable[[Tensor], Tensor]] = {
        "vae:fast": lambda x: fast.denormalize(fast.encode(x)),
        "plain": lambda x: plain.denormalize(plain.encode(x)),
        "diffusers bf16": lambda x: low.encode(x.bfloat16()).latent_dist.mode(),
    }
    errors = {name: relative(run(start), reference) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, int] = {}
    for repeat in range(repeats + 1):  # the first round warms up and is not counted
        for name, run in runs.items():
            taken, peaks[name] = timed(lambda run=run: run(video))
            if repeat:
                seconds[name].append(taken)
    peer = statistics.median(seconds["diffusers bf16"])
    for name in ("vae:fast", "plain"):
        ours = statistics.median(seconds[name])
        yield row(
            case.replace("vae", "vae-encode", 1),
            plan=[] if name == "plain" else [name],
            shape=f"video {tuple(video.shape)} to latents",
            seconds=round(ours, 4),
            spread=[round(min(seconds[name]), 4), round(max(seconds[name]), 4)],
            repeats=repeats,
            peer="diffusers bf16, eager, TF32 allowed",
            peer_seconds=round(peer, 4),
            ratio=round(peer / ours, 2),
            peak_bytes=peaks[name],
            peer_peak_bytes=peaks["diffusers bf16"],
            error=round(errors[name], 5),
            peer_error=round(errors["diffusers bf16"], 5),
            error_against="diffusers in float32 without TF32",
            status="ok",
        )


@torch.no_grad()
def compiled(whose: str) -> Iterator[dict[str, Any]]:
    config, *size = CASES["vae-832x480x81"]
    z = latents_of(config, *size)
    theirs = diffusers_vae(config)
    if whose == "ours":
        vae = our_vae(config, theirs, torch.bfloat16, fast=False)
        for parameter in vae.parameters():
            if parameter.ndim == 5:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
        layers = torch.compile(vae.decoder, dynamic=False)
        vae.make_decoder = lambda decoder: layers
        run = lambda: frames_of(vae, z, 1)  # noqa: E731
    else:
        theirs = theirs.bfloat16()
        theirs.decoder = torch.compile(theirs.decoder, dynamic=False)
        run = lambda: to_uint8(theirs.decode(z.bfloat16()).sample)  # noqa: E731
    first, _ = timed(run)
    yield {"compiled": whose, "first_seconds": first}
    taken = [timed(run)[0] for _ in range(4)]
    yield {"compiled": whose, "first_seconds": first, "seconds": statistics.median(taken[1:])}


@torch.no_grad()
def profile(out: Path) -> Iterator[dict[str, Any]]:
    config, *size = CASES["vae-832x480x81"]
    z = latents_of(config, *size)
    vae = our_vae(config, diffusers_vae(config), torch.bfloat16)
    chunk = settle(vae, z, out)
    frames_of(vae, z, chunk)
    kinds = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as seen:
        frames_of(vae, z, chunk)
        torch.cuda.synchronize()
    table = seen.key_averages().table(sort_by="self_device_time_total", row_limit=40, max_name_column_width=110)
    (out / "profile.txt").write_text(table)
    yield {"profile": str(out / "profile.txt")}


def run_all(out: Path) -> None:
    me = [sys.executable, "-W", "ignore", __file__]
    parts = [
        (["check"], 80),
        ([str(Path(__file__).with_name("h200_vae_components.py"))], 120),
        (["variants"], 90),
        (["bench", "vae-832x480x81"], 100),
        (["profile"], 40),
        (["bench", "vae-1280x720x81", "--repeats", "2"], 75),
        (["bench", "vae22-1280x704x121", "--repeats", "2"], 120),
        (["compiled", "peer"], 100),
        (["compiled", "ours"], 100),
        (["encode", "vae-832x480x81"], 60),
    ]
    for part, limit in parts:
        command = (me if not part[0].endswith(".py") else me[:-1]) + part + ["--out", str(out)]
        start = time.monotonic()
        try:
            status: object = subprocess.run(command, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit} s"
        print(json.dumps({"part": part, "status": status, "seconds": round(time.monotonic() - start, 1)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["bench", "encode", "check", "variants", "compiled", "profile", "all"])
    parser.add_argument("what", nargs="?", default="vae-832x480x81")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("."))
    options = parser.parse_args()
    if options.mode == "all":
        return run_all(options.out)
    modes: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "bench": lambda: bench(options.what, options.repeats, options.out),
        "encode": lambda: encode(options.what, options.repeats),
        "check": check,
        "variants": lambda: variants(options.out),
        "compiled": lambda: compiled(options.what),
        "profile": lambda: profile(options.out),
    }
    with (options.out / "rows.jsonl").open("a") as file:
        try:
            for found in modes[options.mode]():
                print(json.dumps(found), flush=True)
                print(json.dumps(found), file=file, flush=True)
        except Exception as problem:
            failed = row(
                options.what, mode=options.mode, status="failed", reason=f"{type(problem).__name__}: {problem}"
            )
            print(json.dumps(failed), file=file, flush=True)
            raise
    return None


if __name__ == "__main__":
    main()
