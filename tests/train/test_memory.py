"""What blocks keep for the backward pass."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from swiftwan.models.config import POCKET
from swiftwan.models.dit import WanTransformer
from swiftwan.train import adapter, memory


@pytest.mark.parametrize("keep", ["products", "attention", "nothing"])
def test_what_is_computed_again_has_the_same_gradients(keep):
    torch.manual_seed(0)
    gradients = []
    for choice in ("all", keep):
        torch.manual_seed(1)
        model = WanTransformer(POCKET.transformer).requires_grad_(False)
        factors = adapter.inject(model, 4, 4.0, adapter.chosen_targets(("all",)), seed=2)
        for factor in factors.values():
            torch.nn.init.normal_(factor, std=0.05)
        memory.keep_in_blocks(model, [choice] * 7)
        assert factors.keys() == adapter.factors(model).keys()
        latents, text = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 6, 192)
        out = model(latents, torch.tensor([300.0]), model.condition(text, latents.shape))
        gradients.append(torch.autograd.grad(out.square().sum(), list(factors.values())))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_what_is_dear_is_not_computed_again():
    class Count(TorchDispatchMode):
        attentions = products = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.attentions += op in memory.ATTENTION_OPS and args[0].shape == args[1].shape
            self.products += op in memory.PRODUCTS
            return op(*args, **(kwargs or {}))

    counts = {}
    for keep in memory.KEEPS:
        model = WanTransformer(POCKET.transformer).requires_grad_(False)
        factors = adapter.inject(model, 2, 2.0, adapter.chosen_targets(("all",)), seed=2)
        memory.keep_in_blocks(model, [keep] * 7)
        latents, text = torch.randn(1, 16, 2, 8, 8), torch.randn(1, 6, 192)
        with Count() as count:
            out = model(latents, torch.tensor([300.0]), model.condition(text, latents.shape))
            torch.autograd.grad(out.square().sum(), list(factors.values()))
        counts[keep] = count.attentions, count.products
    assert [counts[keep][0] for keep in ("all", "products", "attention", "nothing")] == [7, 7, 7, 14]
    once = counts["all"][1]
    assert counts["products"][1] == once
    assert counts["attention"][1] >= once + 7 * 7


def test_the_choice_fits_the_budget_and_uses_it():
    config = POCKET.transformer
    cost = {keep: memory.bytes_kept(config, 1000, keep, 2) for keep in memory.KEEPS}
    assert cost["nothing"] < cost["attention"] < cost["products"] < cost["all"]
    aside = cost["all"]
    assert memory.choose(config, 1000, aside + 7 * cost["all"], 2) == ["all"] * 7
    most = memory.choose(config, 1000, aside + 5 * cost["products"] + 2 * cost["all"], 2)
    assert most == ["all"] * 2 + ["products"] * 5
    some = memory.choose(config, 1000, aside + 5 * cost["attention"] + 2 * cost["products"], 2)
    assert some == ["products"] * 2 + ["attention"] * 5
    assert memory.choose(config, 1000, aside + 7 * cost["attention"], 2) == ["attention"] * 7
    few = memory.choose(config, 1000, aside + 3 * cost["attention"] + 4 * cost["nothing"], 2)
    assert few == ["attention"] * 3 + ["nothing"] * 4
    assert memory.choose(config, 1000, 0, 2) == ["nothing"] * 7
