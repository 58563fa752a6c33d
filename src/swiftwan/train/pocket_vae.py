"""Train the pocket model's VAE on clips that the world draws as they are needed.

    swiftwan train pocket-vae --out runs/vae --steps 9000

Absolute and squared error make the picture right; a small KL term keeps the latents smooth, which is what
the transformer has to learn (arXiv 2112.10752).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from swiftwan.models.config import POCKET, VAEConfig
from swiftwan.models.vae import WanVAE
from swiftwan.pocket.scenes import sample_scenes
from swiftwan.pocket.world import draw
from swiftwan.train.loop import Run, Schedule, seed_of

KL_WEIGHT = 1e-4
LOG_EVERY = 50
SAVE_EVERY = 1000
STATISTICS_CLIPS = 1024


def clips(batch: int, *, seed: int, num_frames: int, device: torch.device, split: str = "train") -> Tensor:
    """Fresh clips of the world, (batch, 3, num_frames, 128, 128) in [-1, 1]."""
    return draw(sample_scenes(batch, seed, split), seed, num_frames=num_frames, device=device)


def train(
    folder: Path,
    *,
    steps: int,
    batch: int,
    num_frames: int,
    device: torch.device,
    seed: int,
    learning_rate: float,
    start: Mapping[str, Tensor] | None = None,
) -> WanVAE:
    """Train, or go on training, and return the VAE with averaged weights and measured latent statistics.

    Train on the length that will be decoded: after 17 frames only, frames 1 to 21 came back at 35 dB and
    those after it at 15, since a causal layer had never seen a past so long (LOG.md, 2026-11-21).
    """
    torch.manual_seed(seed)
    vae = WanVAE(POCKET.vae)
    if start is not None:
        vae.load_state_dict(start)
    vae = channels_last(vae.to(device))
    run = Run(folder, vae, Schedule(steps, learning_rate), ema_decay=0.999)
    latent_shape = (batch, POCKET.vae.z_dim, (num_frames - 1) // 4 + 1, 16, 16)

    def rebuild(video: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = vae.moments(video)
        logvar = logvar.float().clamp(-20, 10)
        return vae.decode_raw(mean + (0.5 * logvar).exp() * noise), mean.float(), logvar

    on_gpu = device.type == "cuda"
    if on_gpu:  # 228 -> 111 ms a step of 32 clips of 17 frames on an H200 (torch 2.11)
        rebuild = torch.compile(rebuild, dynamic=False)
    while run.step < steps:
        step_seed = seed_of(seed, run.step * batch)  # clip i is drawn from step_seed + i
        video = clips(batch, seed=step_seed, num_frames=num_frames, device=device)
        generator = torch.Generator(device).manual_seed(step_seed)
        noise = torch.randn(latent_shape, generator=generator, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            rebuilt, mean, logvar = rebuild(video, noise)
        error = rebuilt.float() - video
        mse = error.square().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        norm = run.update(error.abs().mean() + 4 * mse + KL_WEIGHT * kl)
        if run.step % LOG_EVERY == 0:
            run.log(psnr=psnr(mse), kl=kl.item(), gradient_norm=norm.item())
        if run.step % SAVE_EVERY == 0 or run.step == steps:
            run.save()
    run.deliver()
    return measured(vae.eval(), seed=seed, device=device)


def channels_last(vae: WanVAE) -> WanVAE:
    """Lay convolution weights out channels-last: up to 1.3x on the 3x3x3 convolutions."""
    for parameter in vae.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    return vae


def psnr(mse: Tensor) -> float:
    """Decibels, for a picture in [-1, 1] (peak to peak 2)."""
    return (10 * torch.log10(4 / mse)).item()


@torch.no_grad()
def measured(vae: WanVAE, *, seed: int, device: torch.device, batch: int = 32) -> WanVAE:
    """Return the VAE with latents_mean and latents_std measured on training clips."""
    total = torch.zeros(vae.config.z_dim, dtype=torch.float64, device=device)
    squares, count = total.clone(), 0
    for start in range(0, STATISTICS_CLIPS, batch):
        video = clips(batch, seed=seed_of(seed + 1, start), num_frames=33, device=device)
        mean, _ = vae.moments(video)
        flat = mean.double().transpose(0, 1).flatten(1)
        total, squares, count = total + flat.sum(1), squares + flat.square().sum(1), count + flat.shape[1]
    mean, std = total / count, (squares / count - (total / count).square()).sqrt()
    vae.config = replace(vae.config, latents_mean=_rounded(mean), latents_std=_rounded(std))
    return vae


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(round(value, 6) for value in values.tolist())


@torch.no_grad()
def evaluate(vae: WanVAE, *, clip_count: int, device: torch.device, seed: int = 77, split: str = "held-out") -> float:
    """Mean PSNR in dB of unseen clips of 33 frames after the VAE and rounding to 8 bits."""
    values = []
    for index in range(0, clip_count, 16):
        video = clips(min(16, clip_count - index), seed=seed_of(seed, index), num_frames=33, device=device, split=split)
        for clip in video.split(1):
            frames = torch.cat(list(vae.stream_frames(vae.encode(clip))))
            rebuilt = frames.permute(3, 0, 1, 2).float() / 127.5 - 1
            values.append(psnr((rebuilt - clip[0]).square().mean()))
    return sum(values) / len(values)


def as_config_json(config: VAEConfig) -> dict[str, object]:
    """The VAE's config.json as diffusers reads it."""
    return {"_class_name": "AutoencoderKLWan"} | asdict(config)
