"""Train the pocket model's transformer and text encoder together, on latents made once.

    swiftwan train pocket-dit --vae runs/vae --out runs/dit --steps 24000

Flow matching (arXiv 2210.02747) with the noise level drawn logit-normally (arXiv 2403.03206) and shifted as in
sampling. Prompts are dropped one time in ten, for guidance. Some steps train single frames (text to image),
shorter clips, and clips whose first latent frame is given (image to video, as TI2V-5B does it).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from swiftwan.models.config import POCKET
from swiftwan.models.dit import WanTransformer
from swiftwan.models.vae import WanVAE
from swiftwan.pocket.scenes import BACKGROUNDS, COLOURS, Scene, sample_scenes
from swiftwan.pocket.world import draw
from swiftwan.train.loop import Run, Schedule, seed_of
from swiftwan.train.pocket_tokenizer import build
from swiftwan.train.recorded import Gradients, Recorded, plain

POCKET_TEXT: dict[str, Any] = {
    "d_model": 192,
    "d_kv": 32,
    "num_heads": 6,
    "d_ff": 384,
    "num_layers": 3,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
TEXT_TOKENS = 32
"""Longest prompt of the world, with room; the rest of the 512 is padding, kept once (see WanTransformer.condition)."""
DROP_PROMPT = 0.1
LOG_EVERY = 100
SAVE_EVERY = 2000
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Noise levels of the validation loss; its clips and noise are the same at every check."""


@dataclass(frozen=True)
class Kind:
    """One way to use a clip in a step: how many of its latent frames, and in what share of steps."""

    latent_frames: int
    share: float


KINDS = (Kind(9, 0.96), Kind(1, 0.04))
FIRST_GIVEN = 0.12
"""Share of clips whose first latent frame is given, within each step of clips."""


@dataclass(frozen=True)
class Latents:
    """A training set on the device: latents (N, z, 9, 16, 16) in float16, token ids (N, TEXT_TOKENS)."""

    values: Tensor
    tokens: Tensor


class Pocket(nn.Module):
    """Text encoder and transformer as one module, so that one optimizer trains both."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        from transformers import UMT5Config, UMT5EncoderModel

        self.text = UMT5EncoderModel(UMT5Config(vocab_size=vocabulary, **POCKET_TEXT))
        self.transformer = WanTransformer(POCKET.transformer)

    def read_text(self, folder: Path) -> None:
        """Take the text encoder of a folder; its file holds the tied embedding once."""
        self.text.load_state_dict(_weights(folder), strict=False)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (B, S) to embeddings (B, S, 192), zero behind each prompt's end, as Wan pads them."""
        mask = tokens.ne(0)
        return self.text(tokens, mask).last_hidden_state * mask[..., None]

    def forward(self, latents: Tensor, timestep: Tensor, tokens: Tensor) -> Tensor:
        condition = self.transformer.condition(self.embed(tokens), latents.shape)
        return self.transformer(latents, timestep, condition)


def caption(scene: Scene, rng: random.Random) -> str:
    """The scene's prompt; now and then only its beginning, so that short prompts work too."""
    prompt = scene.prompt
    chance = rng.random()
    if chance < 0.08:
        return prompt.split(" over a ")[0]
    if chance < 0.10 and len(scene.things) == 1:
        return f"{'an' if scene.things[0].colour == 'orange' else 'a'} {scene.things[0].colour} {scene.things[0].shape}"
    return prompt


def tokenize(prompts: Sequence[str], tokenizer) -> Tensor:  # type: ignore[no-untyped-def]
    """Token ids (N, TEXT_TOKENS), 0 behind the end."""
    batch = tokenizer(list(prompts), padding="max_length", max_length=TEXT_TOKENS, truncation=True)
    return torch.tensor(batch.input_ids)


def training_scenes(count: int, seed: int, *, two_things: float, twins: float) -> list[Scene]:
    """Scenes of the training split with chosen shares of what is hard.

    Args:
        two_things: share of scenes with two things.
        twins: share in which a thing's colour is also the name of a background, blue or green, and the
            background is one of these two: the model's first mistake was to swap them (LOG.md).
    """
    rng = random.Random(seed)
    pool: dict[tuple[bool, bool], list[Scene]] = {}
    for scene in sample_scenes(12 * count, seed, "train"):
        pool.setdefault((len(scene.things) == 2, _has_twin(scene)), []).append(scene)
    chosen = []
    for _ in range(count):
        kind = (rng.random() < two_things, rng.random() < twins)
        chosen.append(rng.choice(pool[kind]))
    return chosen


def _has_twin(scene: Scene) -> bool:
    return scene.background in COLOURS and any(thing.colour in BACKGROUNDS for thing in scene.things)


@torch.no_grad()
def make_latents(vae: WanVAE, scenes: Sequence[Scene], *, seed: int, device: torch.device, batch: int = 64) -> Latents:
    """Draw, caption and encode clips of the world."""
    count = len(scenes)
    tokenizer = build()
    rng = random.Random(seed)
    tokens = tokenize([caption(scene, rng) for scene in scenes], tokenizer).to(device)
    on_gpu = device.type == "cuda"
    moments = torch.compile(vae.moments, dynamic=False) if on_gpu else vae.moments  # 108 -> 58 ms for 64 clips
    values = torch.empty(count, vae.config.z_dim, 9, 16, 16, dtype=torch.float16, device=device)
    for start in range(0, count, batch):
        video = draw(list(scenes[start : start + batch]), seed_of(seed, start), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            mean, _ = moments(video)
        values[start : start + batch] = vae.normalize(mean).half()
    return Latents(values, tokens)


def flow_loss(
    model: nn.Module, latents: Tensor, tokens: Tensor, level: Tensor, noise: Tensor, given: Tensor | None = None
) -> Tensor:
    """Mean squared error of the predicted flow.

    Args:
        model: of (latents, timestep, tokens).
        latents, noise: (B, C, f, h, w).
        tokens: (B, S).
        level: share of noise, (B,) in [0, 1].
        given: (B,) booleans: of which clips the first latent frame is clean, and does not count. None: of none,
            and the model gets one timestep a clip instead of two.
    """
    amount = level.view(-1, 1, 1, 1, 1)
    noisy, flow = torch.lerp(latents, noise, amount), noise - latents
    if given is None:
        return (model(noisy, level * 1000, tokens).float() - flow).square().mean()
    clean = given.view(-1, 1, 1, 1, 1)
    noisy = torch.cat((torch.where(clean, latents[:, :, :1], noisy[:, :, :1]), noisy[:, :, 1:]), dim=2)
    timestep = 1000 * torch.stack((torch.where(given, 0.0, level), level), dim=1)
    error = (model(noisy, timestep, tokens).float() - flow).square().mean((1, 3, 4))
    first = error[:, 0] * ~given
    return (first.sum() + error[:, 1:].sum()) / (~given).sum().add(error[:, 1:].numel())


def train(
    folder: Path,
    data: Latents,
    held_out: Latents,
    *,
    steps: int,
    batch: int,
    device: torch.device,
    seed: int,
    learning_rate: float,
    shift: float = 3.0,
    stop_at: int | None = None,
    start: Path | None = None,
    text: Path | None = None,
) -> Pocket:
    """Train, or go on training, until ``stop_at`` or the end; returns the model with averaged weights.

    Args:
        start: a model's folder; its transformer and text encoder are the first weights.
        text: a folder that pocket-text wrote; its text encoder goes before that of ``start``.
    """
    torch.manual_seed(seed)
    model = Pocket(len(build())).to(device)
    if start is not None:
        model.transformer.load_state_dict(_weights(start / "transformer"))
        model.read_text(start / "text_encoder")
    if text is not None:
        model.read_text(text)
    run = Run(folder, model, Schedule(steps, learning_rate), ema_decay=0.9995)
    # Autocast would leave the residual stream in bf16 behind the first layer; small steps drown there.
    model.transformer.patch_embedding.register_forward_hook(lambda module, args, out: out.float())
    if device.type == "cuda":
        # The whole model as one graph took 203 ms a step, blocks alone 40: there RoPE's tables were computed in
        # float64 inside each kernel that used them.
        for block in model.transformer.blocks:
            block.compile(dynamic=False)
    steps_of = {kind: _step(model, run, device) for kind in KINDS}
    first_step = run.step
    while run.step < min(steps, stop_at or steps):
        choice = random.Random(seed_of(seed, run.step))
        kind = choice.choices(KINDS, [kind.share for kind in KINDS])[0]
        inputs = draw_batch(data, kind, batch, seed=seed_of(seed, run.step), shift=shift)
        loss, gradients = steps_of[kind](*inputs)
        norm = run.descend(gradients)
        if run.step % LOG_EVERY == 0:
            run.log(loss=loss.item(), latent_frames=kind.latent_frames, gradient_norm=norm.item())
        if run.step % SAVE_EVERY == 0 or run.step == first_step + 500:
            run.log(**validate(model, held_out, device=device))
            run.save()
    run.save()
    run.deliver()
    return model.eval()


def draw_batch(data: Latents, kind: Kind, batch: int, *, seed: int, shift: float) -> tuple[Tensor, ...]:
    """Random arguments of :func:`flow_loss` behind the model: clips, tokens, levels, noise, and which are given."""
    device = data.values.device
    generator = torch.Generator(device).manual_seed(seed)
    index = torch.randint(len(data.values), (batch,), generator=generator, device=device)
    latents = data.values[index, :, : kind.latent_frames].float()
    dropped = torch.rand(batch, 1, generator=generator, device=device) < DROP_PROMPT
    tokens = torch.where(dropped, _empty_prompt(device), data.tokens[index])
    u = torch.sigmoid(torch.randn(batch, generator=generator, device=device))
    level = shift * u / (1 + (shift - 1) * u)
    noise = torch.randn(latents.shape, generator=generator, device=device)
    if kind.latent_frames == 1:
        return latents, tokens, level, noise
    given = torch.rand(batch, generator=generator, device=device) < FIRST_GIVEN
    return latents, tokens, level, noise, given


def _step(model: Pocket, run: Run, device: torch.device) -> Callable[..., Gradients]:
    """Loss and gradients of one kind of batch; on a GPU recorded as a CUDA graph."""
    on_gpu = device.type == "cuda"

    def loss(*inputs: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            return flow_loss(model, *inputs)

    parameters = list(run.parameters.values())
    return Recorded(plain(loss, parameters)) if on_gpu else plain(loss, parameters)


def _weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _empty_prompt(device: torch.device) -> Tensor:
    """What the tokenizer makes of "": its end token alone."""
    return F.one_hot(torch.zeros(1, dtype=torch.long, device=device), TEXT_TOKENS) * POCKET_TEXT["eos_token_id"]


@torch.no_grad()
def validate(model: nn.Module, held_out: Latents, *, device: torch.device, batch: int = 128) -> dict[str, float]:
    """Flow loss of never-trained combinations at fixed noise levels, with fixed noise."""
    latents, tokens = held_out.values[:batch].float(), held_out.tokens[:batch]
    noise = torch.randn(latents.shape, generator=torch.Generator(device).manual_seed(1), device=device)
    losses = {}
    for value in LEVELS:
        level = torch.full((len(latents),), value, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses[f"held_out_{value}"] = flow_loss(model, latents, tokens, level, noise).item()
    return losses
