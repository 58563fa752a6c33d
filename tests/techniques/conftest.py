"""A tiny transformer and what is around it, for techniques that change one."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from swiftwan.device import Device
from swiftwan.models.config import TransformerConfig
from swiftwan.models.dit import WanTransformer

TINY = TransformerConfig(
    num_attention_heads=2, attention_head_dim=32, text_dim=20, freq_dim=32, ffn_dim=56, num_layers=2
)


def parts_of(config):
    """Two experts of random weights, as a technique finds them."""
    return SimpleNamespace(
        transformer=WanTransformer(config).eval(),
        transformer_2=WanTransformer(config).eval(),
        weights_move=False,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )


@pytest.fixture
def parts():
    return parts_of(TINY)


@pytest.fixture
def parts_by_16():
    """Of widths that all divide by 16, as products in 8 bits want them."""
    return parts_of(replace(TINY, ffn_dim=64))


@pytest.fixture
def forward():
    """One forward on inputs that are the same for every model given."""
    latents, text = torch.randn(1, 16, 2, 8, 8), torch.randn(1, 9, 20)

    @torch.no_grad()
    def run(model):
        where = model.scale_shift_table.device
        condition = model.condition(text.to(where), latents.shape)
        return model(latents.to(where), torch.tensor([300.0], device=where), condition).cpu()

    return run


@pytest.fixture
def gpu():
    """A device that is not here, by its compute capability."""

    def make(capability, dtype=torch.bfloat16):
        return Device("cuda:0", "a GPU", 10**11, 10**11, capability, 132, dtype, "for the test")

    return make
