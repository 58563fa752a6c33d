"""Train the pocket model's tiny decoder, which draws what its VAE encoded.

    swiftwan train pocket-tiny --out runs/tiny --steps 6000

It learns from the world's own clips, not from what the VAE makes of them: so the VAE's errors are none of its own.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from swiftwan.models.config import POCKET
from swiftwan.models.vae import WanVAE
from swiftwan.models.vae_blocks import Stream
from swiftwan.models.vae_tiny import TinyDecoder, TinySizes
from swiftwan.train.loop import Run, Schedule, seed_of
from swiftwan.train.pocket_vae import clips, psnr

SIZES = TinySizes(latent_channels=POCKET.vae.z_dim, widths=(64, 48, 24, 16), patch=1)
NUM_FRAMES = 33
LOG_EVERY = 50
SAVE_EVERY = 500


def train(
    folder: Path,
    vae: WanVAE,
    *,
    steps: int,
    batch: int,
    seed: int,
    learning_rate: float,
    num_frames: int = NUM_FRAMES,
) -> TinyDecoder:
    """Train, or go on training, and return the decoder with averaged weights.

    Args:
        vae: the encoder whose latents it reads, on the device to train on.
    """
    torch.manual_seed(seed)
    device = vae.quant_conv.weight.device
    decoder = TinyDecoder(SIZES).to(device).channels_last()
    run = Run(folder, decoder, Schedule(steps, learning_rate, warmup=100), ema_decay=0.998)
    on_gpu = device.type == "cuda"

    def rebuild(latents: Tensor) -> Tensor:
        return decoder(latents, Stream())

    if on_gpu:
        rebuild = torch.compile(rebuild, dynamic=False)
    while run.step < steps:
        video = clips(batch, seed=seed_of(seed, run.step * batch), num_frames=num_frames, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            with torch.no_grad():
                latents = vae.normalize(vae.moments(video)[0])
            rebuilt = rebuild(latents)
        error = rebuilt.float() - video
        mse = error.square().mean()
        norm = run.update(error.abs().mean() + 4 * mse)
        if run.step % LOG_EVERY == 0:
            run.log(psnr=psnr(mse), gradient_norm=norm.item())
        if run.step % SAVE_EVERY == 0 or run.step == steps:
            run.save()
    run.deliver()
    return decoder.eval()


@torch.no_grad()
def evaluate(vae: WanVAE, *, clip_count: int, seed: int = 77) -> float:
    """Mean PSNR in dB of unseen clips, encoded by the VAE and decoded by whatever it decodes with."""
    device, values = vae.quant_conv.weight.device, []
    for index in range(0, clip_count, 8):
        video = clips(
            min(8, clip_count - index),
            seed=seed_of(seed, index),
            num_frames=NUM_FRAMES,
            device=device,
            split="held-out",
        )
        values += [psnr((vae.decode(vae.encode(clip)).float() - clip).square().mean()) for clip in video.split(1)]
    return sum(values) / len(values)
