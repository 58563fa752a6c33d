"""Linear layers in 8 or 4 bits: less memory, and with 8-bit activations less time."""

from __future__ import annotations

import importlib.util
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from swiftwan.errors import PlanError, did_you_mean
from swiftwan.ops.fp8 import Fp8Linear
from swiftwan.ops.int4 import GROUP, Int4Linear
from swiftwan.quiet import silence
from swiftwan.techniques.base import Settings, Slot, Technique
from swiftwan.techniques.ends import Ends, LinearOtherAtEnds

if TYPE_CHECKING:
    from swiftwan.device import Device
    from swiftwan.models.config import KnownModel
    from swiftwan.techniques.costs import Costs
    from swiftwan.weights.build import Parts

FORMATS = ("fp8", "int8", "int4", "nf4")
BYTES_EACH = {"fp8": 1.0, "int8": 1.0, "int4": 0.625, "nf4": 0.516}
"""A weight with its share of the scales."""
_CHOICES = {
    "value": FORMATS,
    "on": ("transformer", "text"),
    "activations": ("", "dynamic", "none"),
    "scale": ("row", "tensor"),
}


@dataclass(frozen=True)
class Quantize(Technique):
    """``quantize:fp8``, ``int8``, ``int4`` or ``nf4``: the linear layers of all blocks, by torchao (8 bits),
    bitsandbytes (nf4), ``ops/int4`` or ``ops/fp8``. Norms, embeddings and the last projection keep their format.

    Args:
        value: format of the weights.
        on: ``transformer`` (both experts) or ``text``.
        activations: ``dynamic`` multiplies in 8 bits, ``none`` expands the weights for each product. Unset:
            dynamic for fp8 where the GPU can, else none.
        scale: of dynamic fp8: one a ``row`` (token), or one a ``tensor``.
        keep: so many blocks at either end stay as they are; they hurt most (xDiT found the same of attention). nf4
            must keep one or more: it costs the embedded model 2 to 3 points of its judge, int4 costs none.
        keep_steps: so many first and last steps compute in 16 bits, which the layers then hold as well: for speed,
            not for memory.
    """

    value: str
    on: str = "transformer"
    activations: str = ""
    scale: str = "row"
    keep: int = 0
    keep_steps: int = 0

    name = "quantize"
    kind = "near"
    reason = "linear layers hold their weights in fewer bits"
    slot = Slot.LINEAR
    values = ("fp8", "int8", "int4", "nf4:keep=1")

    def __post_init__(self) -> None:
        for option, allowed in _CHOICES.items():
            if (said := getattr(self, option)) not in allowed:
                raise PlanError(f"quantize: {option} is '{said}'." + did_you_mean(said, filter(None, allowed)))
        if self.keep < 0:
            raise PlanError(f"quantize: keep is {self.keep}; it is a number of blocks, 0 or more.")
        if self.value == "nf4" and self.on == "transformer" and not self.keep:
            raise PlanError(
                "quantize:nf4 costs 2 to 3 points of the embedded model's judge; take quantize:int4, which costs none, "
                "or say so by keeping blocks at either end: quantize:nf4:keep=1."
            )
        if self.keep_steps < 0:
            raise PlanError(f"quantize: keep-steps is {self.keep_steps}; it is a number of steps, 0 or more.")
        if self.keep_steps and self.on == "text":
            raise PlanError("quantize:on=text has no steps to keep; leave 'keep-steps' out.")
        if self.activations == "dynamic" and self.value in ("int4", "nf4"):
            raise PlanError(f"quantize:{self.value} has no 8-bit activations; leave 'activations' out.")

    @property
    def claims(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.on,)

    @property
    def makes(self) -> frozenset[str]:  # type: ignore[override]
        made = {f"scales beside {self.on} weights"} if self.value == "nf4" else set()
        return frozenset(made | {"steps-differ"} if self.keep_steps else made)

    @property
    def is_dynamic(self) -> bool:
        return self.activations == "dynamic" or (self.activations == "" and self.value == "fp8")

    @property
    def _is_ours(self) -> bool:
        """Whether it runs by ops/fp8, without a package."""
        return self.value == "fp8" and self.is_dynamic and self.scale == "row"

    def missing_on(self, device: Device) -> str:
        package = {"fp8": "torchao", "int8": "torchao", "nf4": "bitsandbytes"}.get(self.value)
        if self._is_ours:
            package = None
        if package and importlib.util.find_spec(package) is None:
            return f"{package} is not installed; pip install 'swiftwan[quantize]'"
        if self.value == "fp8" and self.is_dynamic and (device.capability or (0, 0)) < (8, 9):
            return "8-bit float products need compute capability 8.9 or more; take quantize:fp8:activations=none"
        return ""

    def fit(self, model: KnownModel) -> list[str]:
        if self.on == "transformer" and 2 * self.keep >= (layers := model.transformer.num_layers):
            raise PlanError(
                f"keep is {self.keep} blocks at either end of the {layers} of '{model.name}': none is left to change"
            )
        return []

    def apply(self, settings: Settings) -> Settings:
        if self.on == "text" or settings.merges:
            return settings
        return replace(settings, as_loaded=self._as_loaded)

    def cost(self, costs: Costs) -> Costs:
        each = BYTES_EACH[self.value]
        if self.on == "text":
            return costs.lighter_text(each)
        layers = costs.sizes.num_layers
        share = max(0, layers - 2 * self.keep) / layers
        costs = costs.lighter_linear(each + costs.dtype.itemsize if self.keep_steps else each, share)
        if self.is_dynamic:
            # torchao's product leaves int32, which lives beside what it is scaled to.
            scratch = 6 * costs.tokens * costs.sizes.ffn_dim if self.value == "int8" else 0
            return replace(costs, product=self.value, scratch_bytes=scratch)
        # The largest layer is expanded whole, with float32 in between.
        largest = costs.sizes.dim * costs.sizes.ffn_dim
        scratch = largest * (5 + costs.dtype.itemsize)
        return replace(costs, scratch_bytes=scratch, expanded_parameters=share * costs.linear_parameters)

    def _as_loaded(self, model: nn.Module, path: str, layer: nn.Module) -> nn.Module:
        """Each layer as soon as it is there, so that the model is never whole in 16 bits."""
        head, _, rest = path.partition(".")
        number = int(rest.partition(".")[0]) if head == "blocks" else -1
        inside = self.keep <= number < len(model.get_submodule("blocks")) - self.keep  # type: ignore[arg-type]
        return self._changed(path, layer) if inside and type(layer) is nn.Linear else layer

    def install(self, parts: Parts) -> None:
        """What could not be done in loading: the text encoder, which loads later, and weights merged before."""
        if self.on == "text":
            parts.text.identity += f" {self.spec}"  # other bits, so another entry in the cache
            parts.text.after_load.append(self._quantize)
            return
        for transformer in filter(None, (parts.transformer, parts.transformer_2)):
            blocks = transformer.blocks
            for block in blocks[self.keep : len(blocks) - self.keep]:
                self._quantize(block)
            if self.keep_steps:
                ends = Ends(self.keep_steps, self.keep_steps)
                transformer.register_forward_pre_hook(ends)
                for layer in transformer.modules():
                    if isinstance(layer, LinearOtherAtEnds):
                        layer.ends = ends

    def _quantize(self, module: nn.Module) -> None:
        for path, parent in list(module.named_modules()):
            for name, child in () if isinstance(parent, LinearOtherAtEnds) else parent.named_children():
                # UMT5's wo reads the encoder's largest numbers; transformers keeps it in float32 for that.
                if name != "wo" and type(child) is nn.Linear and type(child.weight) is nn.Parameter:
                    setattr(parent, name, self._changed(f"{path}.{name}", child))

    def _changed(self, path: str, linear: nn.Linear) -> nn.Module:
        """The layer at this path of a model, in its new format or, where steps are kept, in both."""
        if not self.keep_steps:
            return self.linear(linear)
        if path.endswith(("attn2.to_k", "attn2.to_v", "attn2.add_k_proj", "attn2.add_v_proj")):
            return linear  # once a prompt, outside of any step
        return LinearOtherAtEnds(self.linear(deepcopy(linear)), linear)

    def linear(self, linear: nn.Linear) -> nn.Module:
        """The layer in its new format, on the device where it lies."""
        match self.value:
            case "int4":
                return Int4Linear(linear) if linear.in_features % GROUP == 0 else linear
            case "nf4":
                return _nf4(linear)
            case "fp8" if self._is_ours:
                return Fp8Linear.of(linear) if _by_16(linear) else linear
            case _:
                return self._by_torchao(linear)

    def _by_torchao(self, linear: nn.Linear) -> nn.Module:
        silence()
        from torchao import quantization as ao

        config: Any
        match self.value, self.is_dynamic:
            case "int8", False:
                config = ao.Int8WeightOnlyConfig()
            case "int8", True:
                config = ao.Int8DynamicActivationInt8WeightConfig()
            case _, False:
                config = ao.Float8WeightOnlyConfig()
            case _:
                rows = {"row": ao.PerRow, "tensor": ao.PerTensor}[self.scale]()
                config = ao.Float8DynamicActivationFloat8WeightConfig(granularity=rows)
        ao.quantize_(holder := nn.Sequential(linear), config)
        return holder[0]


def _by_16(linear: nn.Linear) -> bool:
    return linear.in_features % 16 == 0 and linear.out_features % 16 == 0


def _nf4(linear: nn.Linear) -> nn.Module:
    silence()
    import bitsandbytes

    device, has_bias = linear.weight.device, linear.bias is not None
    small = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, has_bias, compute_dtype=linear.weight.dtype, quant_type="nf4"
    )
    small.weight = bitsandbytes.nn.Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4")
    small.bias = linear.bias
    moved: nn.Module = small.to(device)  # bitsandbytes quantizes as it moves
    return moved
