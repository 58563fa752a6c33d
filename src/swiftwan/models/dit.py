"""The Wan diffusion transformer, for every published Wan, with diffusers' parameter names.

The maths is that of github.com/Wan-Video/Wan2.1 (wan/modules/model.py); the names are those of diffusers'
``WanTransformer3DModel``, so that its checkpoints, LoRA files and peft fit. What stays the same over all
denoising steps is computed once, in :meth:`WanTransformer.condition`.

Shapes: B batch, C latent channels, f h w latent frames, height, width; L video tokens, S text tokens,
D width of a token, H heads, E width of a head, K timesteps in a clip (1, or 2 with a clean first frame).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftwan.errors import WeightsError
from swiftwan.models.config import TransformerConfig
from swiftwan.models.dit_layers import ConditionEmbedder, FeedForward, LayerNorm32, PatchEmbedding
from swiftwan.ops.attention import Attend, AttendForLinear, sdpa
from swiftwan.ops.block import PLAIN, BlockOps
from swiftwan.ops.modulate import Tokens
from swiftwan.ops.rope import Rope, rope_tables

TEXT_LENGTH = 512
"""Text tokens that Wan attends to, padding included."""

TokenOrder = Callable[..., Tensor]
"""(frames, height, width, device=) of the patch grid to the token at each place; int64 (L,), first frame first."""

KEEP_FP32 = ("*time_embedder*", "*scale_shift_table", "*.norm1.*", "*.norm2.*", "*.norm3.*")
"""Parameters that stay in float32 whatever the dtype, as in diffusers (``_keep_in_fp32_modules``)."""


# Conditions


@dataclass(frozen=True)
class Memory:
    """Keys and values of one block's cross-attention, (B, S, H, E); the image's where a model has CLIP."""

    key: Tensor
    value: Tensor
    image_key: Tensor | None = None
    image_value: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Condition:
    """All that a forward needs besides latents and timestep: made once a prompt and shape.

    ``order`` says which token of the grid stands at each place, where that is not the grid's own order;
    ``calls`` how many forwards will use it, so that techniques know the last; 0 where nobody said.
    """

    memories: tuple[Memory, ...]
    text_bias: Tensor | None
    rope: Rope
    order: Tensor | None = None
    calls: int = 0


class Opening:
    """What comes before a forward's first text: the first block's self-attention, alike for all prompts of one video
    at one timestep. The first forward that is given an opening computes it, the others read it.
    """

    def __init__(self) -> None:
        self.update: Any = None

    def once(self, attend: Callable[[], Any]) -> Any:
        if self.update is None:
            self.update = attend()
        return self.update


# Layers


class Attention(nn.Module):
    """What self- and cross-attention share: projections, and RMS norm over the whole width of q and k."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_attention_heads
        self.eps = config.eps
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Identity()])
        self.norm_q = nn.RMSNorm(dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(dim, eps=config.eps)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


class SelfAttention(Attention):
    def __init__(self, config: TransformerConfig, attend: Attend) -> None:
        super().__init__(config)
        self.attend: AttendForLinear = attend
        self.project: Callable[[SelfAttention, Tensor], tuple[Tensor, Tensor, Tensor]] = project

    def forward(self, x: Tensor, rope: Rope, ops: BlockOps) -> Tensor:
        q, k, v = self.project(self, x)
        q, k = ops.norm_rope(q, k, self.norm_q.weight, self.norm_k.weight, rope, self.num_heads, self.eps)
        return self.to_out[0](self.attend(q, k, self.heads(v)).flatten(2))


def project(attention: SelfAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of x, each (B, L, D)."""
    return attention.to_q(x), attention.to_k(x), attention.to_v(x)


class CrossAttention(Attention):
    """Attention to the text and, where ``added_kv_proj_dim`` is set, to the CLIP tokens of an image."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.attend: Callable[..., Tensor] = sdpa
        self.sees_image = config.added_kv_proj_dim is not None
        if config.added_kv_proj_dim is not None:
            self.add_k_proj = nn.Linear(config.added_kv_proj_dim, config.dim)
            self.add_v_proj = nn.Linear(config.added_kv_proj_dim, config.dim)
            self.norm_added_k = nn.RMSNorm(config.dim, eps=config.eps)

    def remember(self, text: Tensor, image: Tensor | None) -> Memory:
        """Keys and values of text (B, S, D) and image tokens (B, 257 or 514, D): once a prompt."""
        key, value = self.heads(self.norm_k(self.to_k(text))), self.heads(self.to_v(text))
        if image is None:
            return Memory(key, value)
        image_key = self.heads(self.norm_added_k(self.add_k_proj(image)))
        return Memory(key, value, image_key, self.heads(self.add_v_proj(image)))

    def forward(self, x: Tensor, memory: Memory, text_bias: Tensor | None, ops: BlockOps) -> Tensor:
        """x (B, L, D), or (1, L, D) where all B prompts still see the same video, to (B, L, D)."""
        q = self.to_q(x)
        if memory.image_key is None or memory.image_value is None:
            text = (memory.key, memory.value, text_bias)
            return self.to_out[0](ops.norm_attend(q, self.norm_q.weight, *text, self.eps, self.attend))
        q = self.heads(self.norm_q(q)).expand(len(memory.key), -1, -1, -1)
        out = self.attend(q, memory.key, memory.value, text_bias)
        out = out + self.attend(q, memory.image_key, memory.image_value)
        return self.to_out[0](out.flatten(2))


def modulation_table(rows: int, dim: int) -> nn.Parameter:
    """Normal with a standard deviation of 1/sqrt(dim); on meta, where weights are loaded into it, nothing is drawn."""
    table = torch.empty(1, rows, dim)
    # On meta torch would import its compiler to draw nothing: a second of every cold start.
    return nn.Parameter(table if table.is_meta else table.normal_(0, dim**-0.5))


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; the first and last modulated by the timestep.

    ``ops`` computes what lies between the matrix products; a technique may put faster ones in their place.
    """

    def __init__(self, config: TransformerConfig, attend: Attend) -> None:
        super().__init__()
        dim = config.dim
        self.eps = config.eps
        self.ops = PLAIN
        self.attn1 = SelfAttention(config, attend)
        self.attn2 = CrossAttention(config)
        self.norm2 = LayerNorm32(dim, config.eps)
        self.ffn = FeedForward(dim, config.ffn_dim, dim, approximate="tanh")
        self.scale_shift_table = modulation_table(6, dim)

    def remember(self, text: Tensor, image: Tensor | None) -> Memory:
        """What cross-attention needs of text (B, S, D) and image tokens: once a prompt."""
        return self.attn2.remember(text, image)

    def forward(
        self,
        x: Tokens,
        time: Tensor,
        spans: Sequence[int],
        memory: Memory,
        text_bias: Tensor | None,
        rope: Rope,
        opening: Opening | None = None,
    ) -> Tokens:
        """x (B, L, D) and time (B, K, 6, D) to x. Either may come with a batch of 1, for B prompts of one video."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.scale_shift_table + time).unbind(2)
        norm2, ops, eps = self.norm2, self.ops, self.eps
        x, normed = ops.norm_modulate(x, shift, scale, spans, eps)
        attend = partial(self.attn1, normed, rope, ops)
        update = attend() if opening is None else opening.once(attend)
        x, normed = ops.gated_add_norm(x, update, gate, spans, norm2.weight, norm2.bias, eps)
        update = self.attn2(normed, memory, text_bias, ops)
        x, normed = ops.add_norm_modulate(x, update, ffn_shift, ffn_scale, spans, eps)
        return ops.gated_add(x, self.ffn(normed), ffn_gate, spans)


def log_counts(count: int, dtype: torch.dtype) -> list[float]:
    """Numbers of this dtype whose exponentials sum to ``count``, to one part in 50,000.

    bf16 rounds the log of 450 by up to 0.016, a weight by 1.6 %; the logs of what is missing make up for it.
    """
    logs: list[float] = []
    missing = float(count)
    while missing > 2e-5 * count:
        log = torch.tensor(math.log(missing))
        rounded = log.to(dtype)
        if rounded > log:  # step down, so that what is missing stays positive
            rounded = torch.nextafter(rounded, torch.tensor(-math.inf, dtype=dtype))
        logs.append(rounded.item())
        missing -= math.exp(logs[-1])
    return logs


# The model

Run = Callable[[int, Tokens], Tokens]
"""A block by its number, on tokens (B, L, D)."""

Walk = Callable[[Run, int, Tensor, Condition], Tokens]
"""(run a block, how many there are, tokens (B, L, D), condition) to tokens: which blocks run."""


def run_blocks(run: Run, numbers: range, x: Tokens) -> Tokens:
    """These blocks, one after the other."""
    for number in numbers:
        x = run(number, x)
    return x


def all_blocks(run: Run, count: int, x: Tensor, condition: Condition) -> Tokens:
    """Each block once, in order."""
    return run_blocks(run, range(count), x)


class WanTransformer(nn.Module):
    """Predicts the flow (noise minus data) of a noisy latent video.

    Args:
        config: sizes.
        attend: the kernel of self-attention.

    Raises:
        WeightsError: a block does not norm what cross-attention reads, as every published Wan does.
    """

    def __init__(self, config: TransformerConfig, attend: Attend = sdpa) -> None:
        super().__init__()
        if not config.cross_attn_norm:
            raise WeightsError(
                "the transformer's config.json has cross_attn_norm false; every published Wan model has true. "
                "Is this a Wan checkpoint?"
            )
        self.config = config
        self.ops = PLAIN
        self.patch_embedding = PatchEmbedding(config.in_channels, config.dim, config.patch_size)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList([Block(config, attend) for _ in range(config.num_layers)])
        self.proj_out = nn.Linear(config.dim, config.out_channels * math.prod(config.patch_size))
        self.scale_shift_table = modulation_table(2, config.dim)
        self.token_order: TokenOrder | None = None
        self.walk: Walk = all_blocks
        self.takes_opening = True  # no compiled block or recorded forward does, since it does the same each time

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def condition(
        self,
        text: Tensor,
        latent_shape: Sequence[int],
        image: Tensor | None = None,
        text_length: int = TEXT_LENGTH,
        calls: int = 0,
    ) -> Condition:
        """Compute what all steps share.

        Wan pads text with zeros to 512 tokens and attends to the padding. Behind the text embedding all
        padding is one and the same vector, so it is kept once, and the log of its count is added to its
        score: the same softmax (exact), with a few dozen keys instead of 512. (In 16 bits it is kept more than
        once: see :func:`log_counts`.)

        Args:
            text: (B, S, text_dim) embeddings, zero where a prompt of the batch is shorter; S at most 512.
            latent_shape: (..., f, h, w) of the latents to come.
            image: (B, 257, image_dim) CLIP tokens for models that see them; (2 B, 257, image_dim) for FLF2V.
            text_length: tokens that the model was trained to attend to, padding included.
            calls: how many forwards it is for, where that is known.
        """
        padding = text_length - text.shape[1]
        text_bias = None
        if padding > 0:
            counts = log_counts(padding, self.dtype)
            # Made on the device, so that a CUDA graph can record it.
            pieces = [torch.full((1,), count, dtype=self.dtype, device=text.device) for count in counts]
            text_bias = torch.cat((torch.zeros(text.shape[1], dtype=self.dtype, device=text.device), *pieces))
            text_bias = text_bias.view(1, 1, 1, -1)
            text = F.pad(text, (0, 0, 0, len(counts)))
        embedder = self.condition_embedder
        text = embedder.text_embedder(text.to(self.dtype))
        if image is not None and embedder.image_embedder is not None:
            image = embedder.image_embedder(image.to(self.dtype))
        frames, height, width = self.patch_grid(latent_shape)
        rope = rope_tables(self.config.attention_head_dim, frames, height, width, device=text.device)
        order = None
        if self.token_order is not None:
            order = self.token_order(frames, height, width, device=text.device)
            rope = (rope[0][order], rope[1][order])
        memories = tuple(cast(Block, block).remember(text, image) for block in self.blocks)
        return Condition(memories, text_bias, rope, order, calls)

    def patch_grid(self, latent_shape: Sequence[int]) -> tuple[int, int, int]:
        """How many patches a latent video (..., f, h, w) has along time, height and width."""
        frames, height, width = (
            size // patch for size, patch in zip(latent_shape[-3:], self.config.patch_size, strict=True)
        )
        return frames, height, width

    def forward(
        self, latents: Tensor, timestep: Tensor, condition: Condition, opening: Opening | None = None
    ) -> Tensor:
        """Predict the flow.

        Args:
            latents: (B, C, f, h, w); image-to-video models take the noise, mask and image channels joined.
                (1, C, f, h, w) under B prompts is computed once up to the first block's cross-attention.
            timestep: (B,) in [0, 1000], or (B, 2): that of the first latent frame, and that of the others.
            condition: from :meth:`condition`, for these B prompts and this shape.
            opening: to share with other forwards of these latents and this timestep.

        Returns:
            (B, out_channels, f, h, w) in the latents' dtype.
        """
        grid = self.patch_grid(latents.shape)
        tokens = math.prod(grid)
        if timestep.ndim == 1:
            timestep, spans = timestep[:, None], [tokens]
        else:
            spans = [tokens // grid[0], tokens - tokens // grid[0]]
        vector, time = self.condition_embedder.time(timestep, self.dtype)
        time = time.float()
        x = self.patch_embedding(latents.to(self.dtype))
        if condition.order is not None:
            x = x[:, condition.order]

        def run(number: int, x: Tokens) -> Tokens:
            inputs = (x, time, spans, condition.memories[number], condition.text_bias, condition.rope)
            out: Tokens = self.blocks[number](*inputs, opening if number == 0 else None)
            return out

        walked = self.walk(run, len(self.blocks), x, condition)
        shift, scale = (self.scale_shift_table + vector[:, :, None]).unbind(2)
        x, normed = self.ops.norm_modulate(walked, shift, scale, spans, self.config.eps)
        x = self.proj_out(normed)
        if condition.order is not None:
            x = torch.empty_like(x).index_copy_(1, condition.order, x)
        return self.unpatchify(x, grid).to(latents.dtype)

    def unpatchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """(B, L, patch volume * C) to (B, C, f, h, w)."""
        p, q, r = self.config.patch_size
        x = x.view(x.shape[0], *grid, p, q, r, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def each_block(*transformers: WanTransformer | None) -> Iterator[Block]:
    """The blocks of all transformers that are there."""
    for transformer in transformers:
        if transformer is not None:
            for block in transformer.blocks:
                yield cast(Block, getattr(block, "inner", block))  # behind the wrapper of streamed weights
