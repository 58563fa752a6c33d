"""The parts of the fast VAE decoder alone: each convolution in each layout (TFLOP/s), each fused kernel (GB/s).

    python benchmarks/h200_vae_components.py [--out FOLDER]

TFLOP/s count the useful arithmetic of the plain convolution, so layouts that do more or less of it compare fairly.
Writes components.jsonl, and layout.json: the fastest layout of each shape, as h200_vae.py's variants read it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftwan.ops.vae_between import (
    STACKED,
    VOLUME,
    WINOGRAD,
    Products,
    Step,
    Sum,
    enter,
    fold_upsample,
    gather_taps,
    stack_taps,
    winograd_taps,
)

SHAPES = [  # (channels in, out, height, width, frames per latent frame), Wan2.1 at 832 x 480
    (96, 96, 480, 832, 4),
    (192, 192, 240, 416, 4),
    (384, 384, 120, 208, 2),
    (192, 384, 120, 208, 2),
    (384, 384, 60, 104, 1),
]
WAN22 = [  # 1280 x 704
    (256, 256, 352, 640, 4),
    (512, 512, 176, 320, 4),
    (1024, 1024, 88, 160, 2),
]
UPSAMPLES = [(384, 192, 120, 208, 4), (192, 96, 240, 416, 4), (384, 192, 60, 104, 2)]


def milliseconds(run: Callable[[], object], repeats: int = 7) -> float:
    for _ in range(2):
        run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


WINDOWS = {"volume": VOLUME, "stacked": STACKED, "winograd": WINOGRAD}


def convolution(name: str, c: int, o: int, t: int, h: int, w: int) -> Callable[[], object] | None:
    """The layout's convolutions alone; None where the frames do not divide."""
    weight = randn(o, c, 3, 3, 3) / (27 * c) ** 0.5
    if name == "contiguous":
        x = randn(1, c, t + 2, h, w)
        return lambda: F.conv3d(x, weight, padding=(0, 1, 1))
    window = WINDOWS[name]
    if name == "winograd" and t % 2:
        return None
    buffer = randn(*window.shape(t, h, w, c))
    if name == "volume":
        volume, last = buffer.permute(3, 0, 1, 2).unsqueeze(0), weight.contiguous(memory_format=torch.channels_last_3d)
        return lambda: F.conv3d(volume, last, padding=(0, 1, 1))
    if name == "winograd":
        images, planes = buffer.permute(0, 1, 4, 2, 3).unbind(), winograd_taps(weight)
        return lambda: [F.conv2d(i, p, padding=1) for i, p in zip(images, planes, strict=True)]
    stacked, wide = buffer.flatten(3).permute(0, 3, 1, 2), stack_taps(weight)
    return lambda: F.conv2d(stacked, wide, padding=1)


def convolutions(say: Callable[..., None]) -> dict[str, str]:
    best: dict[str, tuple[float, str]] = {}
    for benchmark in (False, True):
        torch.backends.cudnn.benchmark = benchmark
        for c, o, h, w, per in SHAPES + WAN22:
            for latent_frames in (1, 4) if c < 512 and c != 256 else (1,):
                t = per * latent_frames
                for name in ("contiguous", *WINDOWS):
                    if name == "contiguous" and (not benchmark or latent_frames > 1):
                        continue
                    run = convolution(name, c, o, t, h, w)
                    if run is None:
                        continue
                    ms = milliseconds(run)
                    rate = 2 * 27 * c * o * t * h * w / ms / 1e9
                    say("conv", f"{c}->{o} {t}x{h}x{w} {name} benchmark={benchmark}", ms=ms, tflops=rate)
                    key = f"{c},{o},{t}"
                    if name in WINDOWS and not benchmark and (key not in best or ms < best[key][0]):
                        best[key] = (ms, name)
        for c, o, h, w, t in UPSAMPLES:
            weight = randn(o, c, 3, 3) / (9 * c) ** 0.5
            large, small = randn(t, 2 * h, 2 * w, c).permute(0, 3, 1, 2), randn(t, h, w, c).permute(0, 3, 1, 2)
            plain, folded = weight.contiguous(memory_format=torch.channels_last), fold_upsample(weight)
            useful = 2 * 9 * c * o * t * h * w * 4
            for name, image, kernel in (("plain", large, plain), ("folded", small, folded)):
                ms = milliseconds(lambda image=image, kernel=kernel: F.conv2d(image, kernel, padding=1))
                what = f"upsample {c}->{o} {t}x{h}x{w} {name} benchmark={benchmark}"
                say("conv", what, ms=ms, tflops=useful / ms / 1e9)
    torch.backends.cudnn.benchmark = False
    return {key: name for key, (_, name) in best.items()}


def kernels(say: Callable[..., None]) -> None:
    for c, h, w, t in ((96, 480, 832, 4), (192, 240, 416, 4), (384, 120, 208, 2), (384, 60, 104, 1)):
        bias, gamma, past, residual = randn(c), randn(c), randn(2, h, w, c), randn(t, h, w, c)
        sources: dict[str, Tensor | Products] = {"frames": randn(t, h, w, c)}
        if t % 2 == 0:
            sources["winograd"] = Products(*randn(4, t // 2, h, w, c))
        for name, y in sources.items():
            for into, window in WINDOWS.items():
                if into == "winograd" and t % 2:
                    continue
                for kept in (False, True):
                    total = Sum(y, bias, residual if kept else None)
                    step = Step(window, gamma, silu=True, keep=kept)
                    ms = milliseconds(lambda total=total, step=step, past=past: enter(total, step, past))
                    size = residual.nbytes * (2 if name == "winograd" else 1)
                    moved = size + enter(total, step, past).buffer.nbytes + 2 * past.nbytes
                    moved += 2 * residual.nbytes if kept else 0
                    what = f"enter {c} {t}x{h}x{w} from {name} to {into} {'with residual' if kept else ''}"
                    say("kernel", what, ms=ms, gbs=moved / ms / 1e6)
    t, h, w = 4, 480, 832
    x, weight, bias = randn(t * h * w, 96), randn(81, 96), randn(3)
    ms = milliseconds(lambda: torch.mm(weight, x.t()))
    say("kernel", "to pixels: products", ms=ms, gbs=(x.nbytes + 81 * 2 * t * h * w) / ms / 1e6)
    products, past = randn(81, t, h, w), randn(81, 2, h, w)
    ms = milliseconds(lambda: gather_taps(products, past, bias))
    say("kernel", "to pixels: gather", ms=ms, gbs=(products.nbytes + past.nbytes) / ms / 1e6)
    for out in (3, 8):
        conv, stacked = stack_taps(randn(out, 96, 3, 3, 3), 1), randn(t, h, w, 288).permute(0, 3, 1, 2)
        ms = milliseconds(lambda conv=conv, stacked=stacked: F.conv2d(stacked, conv, padding=1))
        say("kernel", f"to pixels: cuDNN, {out} channels", ms=ms, gbs=stacked.nbytes / ms / 1e6)
    for frames, tokens, dim in ((1, 6240, 384), (1, 3520, 1024)):
        q, k, v = randn(3, frames, 1, tokens, dim).unbind()
        ms = milliseconds(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v))
        say("kernel", f"attention {frames}x{tokens}x{dim}", ms=ms, tflops=4 * tokens**2 * dim * frames / ms / 1e9)

        def explicit(q: Tensor = q, k: Tensor = k, v: Tensor = v, dim: int = dim) -> Tensor:
            return torch.softmax(q @ k.transpose(-1, -2) * dim**-0.5, dim=-1) @ v

        ms = milliseconds(explicit)
        say("kernel", f"attention as products {tokens}x{dim}", ms=ms, tflops=4 * tokens**2 * dim * frames / ms / 1e9)
    stacked, half, out = randn(24960, 1152), randn(384, 1152), randn(24960, 384)
    ms = milliseconds(lambda: torch.addmm(randn(384), stacked, half.t(), out=out))
    say("kernel", "time_conv half frame", ms=ms, tflops=2 * 24960 * 1152 * 384 / ms / 1e9)
    big = randn(1 << 30)
    ms = milliseconds(lambda: big.clone())
    say("kernel", "copy", ms=ms, gbs=2 * big.nbytes / ms / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("."))
    out = parser.parse_args().out
    with (out / "components.jsonl").open("a") as file:

        def say(kind: str, what: str, **numbers: float) -> None:
            row = {"kind": kind, "what": what} | {name: round(value, 3) for name, value in numbers.items()}
            print(json.dumps(row), file=file, flush=True)
            print(f"{what:60}", *(f"{name} {value:8.3f}" for name, value in numbers.items()), flush=True)

        kernels(say)
        (out / "layout.json").write_text(json.dumps(convolutions(say)))


if __name__ == "__main__":
    main()
