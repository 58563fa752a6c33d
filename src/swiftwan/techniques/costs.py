"""What a run takes, stated so that each technique can change its own part of it before anything loads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from swiftwan.models.config import KnownModel, TransformerConfig

Home = Literal["gpu", "cpu", "blocks", "unload"]
Residency = Literal["resident", "streamed", "one at a time"]


@dataclass(frozen=True)
class Costs:
    """A plain run's costs at first; :meth:`Technique.cost` returns them changed. Bytes are of device memory.

    Attributes:
        model, dtype, tokens: what runs: sizes, format, and video tokens of a forward.
        block_bytes: one transformer's blocks at rest.
        rest_bytes: what a transformer has beside its blocks.
        text_bytes, text_linear_parameters: the text encoder, and how many of its weights are in linear layers.
        text_block_share: of its bytes, those of one block.
        scratch_bytes: taken by a layer while it computes, beyond its inputs and outputs.
        kept_bytes: kept from step to step, and by adapters.
        residency: where transformers wait. ``streamed``: all blocks but the first ``resident_blocks`` in host memory.
        text_home: where the text encoder works and stays.
        fused: norms, gates and GELU take no memory of their own.
        batch: predictions in one forward.
        product: what the linear layers multiply in: ``16`` for bf16 and fp16, ``fp8``, ``int8``, ``tf32``, ``fp32``.
        expanded_parameters: weights that each forward expands.
        attention: the kernel of self-attention.
        attention_share: of self-attention's work, what is computed.
        block_share: of the blocks' work, what is computed.
        decoder: what makes frames of latents.
        skips: steps may be skipped, how many depends on the video: the time told is the longest.
        graphs: forwards are replayed, without launches.
        quantized: some linear layers of the blocks hold other numbers than floats of ``dtype``.
    """

    model: KnownModel
    dtype: torch.dtype
    tokens: int
    block_bytes: float
    rest_bytes: float
    text_bytes: float
    text_linear_parameters: int
    text_block_share: float
    scratch_bytes: float = 0.0
    kept_bytes: float = 0.0
    residency: Residency = "resident"
    resident_blocks: int = 0
    text_home: Home = "gpu"
    fused: bool = False
    batch: int = 1
    product: str = "16"
    expanded_parameters: float = 0.0
    attention: str = "sdpa"
    attention_share: float = 1.0
    block_share: float = 1.0
    decoder: Literal["plain", "fast", "tiny"] = "plain"
    skips: bool = False
    graphs: bool = False
    quantized: bool = False

    @property
    def sizes(self) -> TransformerConfig:
        return self.model.transformer

    @property
    def token_bytes(self) -> int:
        """One tensor of all tokens, (L, D)."""
        return self.tokens * self.sizes.dim * self.dtype.itemsize

    @property
    def linear_parameters(self) -> int:
        """Weights in the linear layers of one transformer's blocks."""
        dim, added = self.sizes.dim, self.sizes.added_kv_proj_dim
        block = 8 * dim**2 + 2 * dim * self.sizes.ffn_dim + (2 * added * dim if added else 0)
        return self.sizes.num_layers * block

    def lighter_linear(self, bytes_each: float, share: float = 1.0) -> Costs:
        """The share of the blocks' linear layers in another format."""
        saved = share * self.linear_parameters * (self.dtype.itemsize - bytes_each)
        return replace(self, block_bytes=self.block_bytes - saved, quantized=True)

    def lighter_text(self, bytes_each: float) -> Costs:
        """The text encoder's linear layers in another format."""
        saved = self.text_linear_parameters * (self.dtype.itemsize - bytes_each)
        return replace(self, text_bytes=self.text_bytes - saved)

    def in_one_memory(self) -> Costs:
        """Where the device computes in host memory: what waits there takes its room all the same."""
        home: Home = "gpu" if self.text_home in ("cpu", "blocks") else self.text_home
        return replace(self, residency="resident", text_home=home)
