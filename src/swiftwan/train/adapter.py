"""The LoRA that a run trains: peft's layers in our transformer, their factors in float32 beside frozen weights.

Low-rank adapters: arXiv 2106.09685. peft does the finding of layers, the first values and the names; the product
is ours, since peft widens the activations to the factors' float32 where we cast the small factors down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftwan.device import Device
from swiftwan.errors import RequestError, UnavailableError, did_you_mean
from swiftwan.models.dit import Block, WanTransformer
from swiftwan.models.dit_layers import GELU
from swiftwan.ops.attention import kernel
from swiftwan.ops.fp8_training import Fp8FrozenLinear
from swiftwan.quiet import silence

silence()
try:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear
except ImportError:
    raise UnavailableError("training a LoRA needs the package 'peft': pip install 'swiftwan[train]'.") from None

TARGETS = {
    "self-q": "attn1.to_q",
    "self-k": "attn1.to_k",
    "self-v": "attn1.to_v",
    "self-o": "attn1.to_out.0",
    "cross-q": "attn2.to_q",
    "cross-k": "attn2.to_k",
    "cross-v": "attn2.to_v",
    "cross-o": "attn2.to_out.0",
    "ffn-in": "ffn.net.0.proj",
    "ffn-out": "ffn.net.2",
}
"""The linear layers of a block, by the words of ``--targets``."""

GROUPS = {
    "all": tuple(TARGETS),
    "self": tuple(word for word in TARGETS if word.startswith("self")),
    "cross": tuple(word for word in TARGETS if word.startswith("cross")),
    "attention": tuple(word for word in TARGETS if not word.startswith("ffn")),
    "ffn": ("ffn-in", "ffn-out"),
}

NAME = "default"
"""Of the adapter inside peft."""


def chosen_targets(words: Sequence[str]) -> list[str]:
    """Module names within a block, of words and groups of them.

    Raises:
        RequestError: a word is neither.
    """
    chosen: list[str] = []
    for word in words:
        if word not in GROUPS and word not in TARGETS:
            raise RequestError(f"target '{word}' is unknown." + did_you_mean(word, [*GROUPS, *TARGETS]))
        chosen += [TARGETS[name] for name in GROUPS.get(word, (word,))]
    return list(dict.fromkeys(chosen))


def check_rank(transformer: WanTransformer, rank: int, targets: Sequence[str]) -> None:
    """Raise RequestError for a rank larger than a layer it is for."""
    block = transformer.blocks[0]
    widths = {name: min(cast(nn.Linear, block.get_submodule(name)).weight.shape) for name in targets}
    narrowest = min(widths, key=lambda name: widths[name])
    if rank > widths[narrowest]:
        raise RequestError(
            f"rank is {rank}, and {narrowest} is {widths[narrowest]} wide; a rank above that adds nothing: take "
            f"{widths[narrowest]} or less."
        )


class LoraLinear(Linear):
    """``base(x) + scaling * up(down(x))``, the factors float32 and multiplied in the activations' dtype."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.base_layer(x)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            down, up = self.scaled_factors(name, x.dtype)
            y = y + F.linear(F.linear(x, down), up)
        return y

    def scaled_factors(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``down`` (R, in) and ``scaling * up`` (out, R) of an adapter."""
        down, up = cast(nn.Linear, self.lora_A[name]).weight, cast(nn.Linear, self.lora_B[name]).weight
        return down.to(dtype), (up * self.scaling[name]).to(dtype)


def fuse_gelu(block: Block, in_one_pass: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Let one kernel add an adapter's part to a feed-forward's first layer and take GELU.

    Args:
        in_one_pass: computes what :func:`swiftwan.ops.lora_gelu_training.reference` does.
    """
    gelu = cast(GELU, block.ffn.net[0])
    if isinstance(gelu.proj, LoraLinear) and gelu.proj.r[NAME] <= 128:  # of which the kernel holds a tile whole
        gelu.linear_gelu = partial(_lora_gelu, in_one_pass)


def _lora_gelu(in_one_pass: Callable[[Tensor, Tensor, Tensor], Tensor], layer: LoraLinear, x: Tensor) -> Tensor:
    """Of an adapter that is always on: :class:`LoraLinear` is trained, validated and sampled with it, never without.
    Distillation, whose teacher is the model without its adapters, has peft's own layers and GELU by itself."""
    down, up = layer.scaled_factors(NAME, x.dtype)
    return in_one_pass(layer.base_layer(x), F.linear(x, down), up)


def inject(
    transformer: WanTransformer, rank: int, alpha: float, targets: Sequence[str], *, seed: int
) -> dict[str, nn.Parameter]:
    """Put an adapter into every block; its first values follow from the seed, and change nothing yet.

    Args:
        targets: module names within a block, as in ``TARGETS``.

    Returns:
        The factors, float32, by name: ``blocks.0.attn1.to_q.lora_A.weight``.

    Raises:
        RequestError: as :func:`check_rank`.
    """
    check_rank(transformer, rank, targets)
    config = lora_config(rank, alpha, targets)
    config._register_custom_module({nn.Linear: LoraLinear})
    device = transformer.patch_embedding.weight.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, transformer, adapter_name=NAME)
    # As if the first block's input learnt too: so one compilation serves it and the others.
    transformer.patch_embedding.register_forward_hook(_require_gradient)
    return factors(transformer)


def _require_gradient(module: nn.Module, inputs: tuple[Tensor, ...], tokens: Tensor) -> None:
    if torch.is_grad_enabled():
        tokens.requires_grad_()


def lora_config(rank: int, alpha: float, targets: Sequence[str]) -> LoraConfig:
    """peft's own record of the adapter; its pattern matches within blocks only."""
    names = "|".join(name.replace(".", r"\.") for name in targets)
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=rf".*blocks\.\d+\.({names})", lora_dropout=0.0)  # type: ignore[arg-type]


def factors(transformer: WanTransformer) -> dict[str, nn.Parameter]:
    """The adapter's parameters, by names without peft's own word for the adapter; made float32 if they are not."""
    found = {}
    for name, parameter in transformer.named_parameters():
        if f".{NAME}.weight" in name and "lora_" in name:
            parameter.data = parameter.data.float()
            found[name.replace(f".{NAME}.weight", ".weight").replace("_checkpoint_wrapped_module.", "")] = parameter
    return found


def check_fp8(transformer: WanTransformer, device: Device) -> None:
    """Raise UnavailableError where the device has no 8-bit float products, RequestError beside a dtype but bf16."""
    if (device.capability or (0, 0)) < (8, 9):
        raise UnavailableError(
            "--base fp8 and fp8-attention need an NVIDIA GPU of compute capability 8.9 or more; leave --base out."
        )
    if transformer.dtype is not torch.bfloat16:
        dtype = str(transformer.dtype).removeprefix("torch.")
        raise RequestError(
            f"--base fp8 and fp8-attention go with --dtype bf16, and this is {dtype}; leave one of them out."
        )


def check_fp8_attention(transformer: WanTransformer, device: Device) -> None:
    """Raise UnavailableError where self-attention cannot compute forward in 8 bits."""
    for name in ("fp8", "flash4"):  # forward, and backward
        if missing := kernel(name).missing_on(device.capability):
            raise UnavailableError(
                f"--base fp8-attention cannot run here: {missing}. Take --base fp8, or leave it out."
            )
    if (width := transformer.config.attention_head_dim) not in (widths := kernel("fp8").widths):
        raise UnavailableError(
            f"--base fp8-attention needs heads of {widths[0]}, and here they are {width}; leave it out."
        )


def freeze_in_fp8(transformer: WanTransformer, device: Device) -> None:
    """Run the products with the frozen weights below the adapters in 8 bits. Raises as :func:`check_fp8`."""
    check_fp8(transformer, device)
    for module in transformer.modules():
        if isinstance(module, LoraLinear) and _by_16(module.base_layer):
            module.base_layer = Fp8FrozenLinear(module.base_layer)


def tie(transformer: WanTransformer, to: WanTransformer) -> None:
    """Make two adapters one: the first transformer's factors become the other's own."""
    for name, module in transformer.named_modules():
        if isinstance(module, LoraLinear):
            other = to.get_submodule(name)
            assert isinstance(other, LoraLinear)
            module.lora_A, module.lora_B = other.lora_A, other.lora_B


def _by_16(layer: nn.Module) -> TypeGuard[nn.Linear]:
    return type(layer) is nn.Linear and layer.in_features % 16 == 0 and layer.out_features % 16 == 0
