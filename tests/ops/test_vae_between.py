"""Weights and layouts against PyTorch's own convolutions, and the kernels against their plain forms."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swiftwan.models.vae_blocks import DuplicateUp, RMSNorm, Stream
from swiftwan.ops.vae_between import (
    POINT,
    STACKED,
    VOLUME,
    WINOGRAD,
    Products,
    Repeated,
    Step,
    Sum,
    Window,
    enter,
    enter_plain,
    fold_upsample,
    gather_taps,
    gather_taps_plain,
    stack_taps,
    winograd_taps,
)

WINDOWS = [VOLUME, STACKED, WINOGRAD]


def relative_error(ours: Tensor, reference: Tensor) -> float:
    assert ours.shape == reference.shape
    return ((ours.float() - reference.float()).norm() / reference.float().norm()).item()


def convolve(window: Window, buffer: Tensor, weight: Tensor) -> Tensor | Products:
    """A causal 3x3x3 convolution through a window's buffer, as the decoder runs it."""

    def images(x: Tensor, taps: Tensor) -> Tensor:
        return F.conv2d(x.permute(0, 3, 1, 2), taps, padding=1).permute(0, 2, 3, 1)

    if window.form == "winograd":
        return Products(*(images(x, taps) for x, taps in zip(buffer, winograd_taps(weight), strict=True)))
    if window.form == "volume":
        y = F.conv3d(buffer.permute(3, 0, 1, 2).unsqueeze(0), weight, padding=(0, 1, 1))
        return y[0].permute(1, 2, 3, 0)
    return images(buffer.flatten(3), stack_taps(weight))


def frames_of(y: Tensor | Products, bias: Tensor | None = None) -> Tensor:
    """(T, H, W, C) of a convolution's result."""
    return enter_plain(Sum(y, bias), Step(POINT), None).buffer


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("chunks", [(8,), (4, 4)], ids=str)
def test_every_window_is_a_causal_convolution(window, chunks):
    x, weight, bias = torch.randn(8, 5, 7, 6), torch.randn(4, 6, 3, 3, 3), torch.randn(4)
    expected = F.conv3d(F.pad(x.permute(3, 0, 1, 2), (0, 0, 0, 0, 2, 0)), weight, bias, padding=(0, 1, 1))
    past, made = None, []
    for part in x.split(chunks):
        entered = enter(Sum(part), Step(window), past)
        assert entered.buffer.shape == window.shape(*part.shape)
        past = entered.past
        made.append(frames_of(convolve(window, entered.buffer, weight), bias))
    assert relative_error(torch.cat(made), expected.permute(1, 2, 3, 0)) < 1e-5


def test_a_folded_upsampling_is_the_upsampling_and_its_convolution():
    x, weight, bias = torch.randn(3, 6, 5, 7), torch.randn(4, 6, 3, 3), torch.randn(4)
    expected = F.conv2d(F.interpolate(x, scale_factor=2), weight, bias, padding=1)
    folded = F.conv2d(x, fold_upsample(weight), padding=1).permute(0, 2, 3, 1).unflatten(3, (2, 2, 4))
    assert relative_error(frames_of(folded, bias), expected.permute(0, 2, 3, 1)) < 1e-5


@pytest.mark.parametrize("chunks", [(5,), (1, 4), (3, 2)], ids=str)
def test_gathered_products_are_a_causal_convolution(chunks):
    x, weight, bias = torch.randn(6, 5, 4, 7), torch.randn(3, 6, 3, 3, 3), torch.randn(3)
    expected = F.conv3d(F.pad(x, (0, 0, 0, 0, 2, 0)), weight, bias, padding=(0, 1, 1))
    rows = weight.permute(2, 3, 4, 0, 1).flatten(0, 3)
    products = torch.einsum("rc,cthw->rthw", rows, x)
    held, made = torch.zeros(81, 2, 4, 7), []
    for part in products.split(chunks, dim=1):
        made.append(gather_taps(part.contiguous(), held, bias))
        held = torch.cat((held, part), dim=1)[:, -2:].contiguous()
    assert relative_error(torch.cat(made, dim=1), expected) < 1e-5
    assert torch.equal(gather_taps(products, None, bias), gather_taps(products, torch.zeros(81, 2, 4, 7), bias))


@pytest.mark.parametrize("factor_t", [1, 2])
@pytest.mark.parametrize("at_start", [True, False])
def test_repeated_is_the_shortcut_of_wan22(factor_t, at_start):
    layer, stream = DuplicateUp(8, 4, factor_t, 2), Stream()
    stream.at_start = at_start
    x = torch.randn(1, 8, 1 if at_start else 3, 4, 5)
    expected = layer(x, stream)[0].permute(1, 2, 3, 0)
    ours = Repeated(x[0].permute(1, 2, 3, 0), factor_t, layer.repeats).frames(expected.shape[0], 4)
    assert torch.equal(ours, expected)


def test_norm_and_silu_are_those_of_the_layers():
    x, residual, bias = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6), torch.randn(6)
    norm = RMSNorm(6)
    torch.nn.init.normal_(norm.gamma)
    with torch.no_grad():
        total = x + bias + residual
        expected = F.silu(norm(total.permute(3, 0, 1, 2).unsqueeze(0)))[0].permute(1, 2, 3, 0)
        entered = enter(Sum(x, bias, residual), Step(POINT, norm.gamma, silu=True, keep=True), None)
    assert relative_error(entered.buffer, expected) < 1e-6
    torch.testing.assert_close(entered.kept, total)
    assert entered.past is None


def test_frames_that_do_not_divide():
    with pytest.raises(AssertionError):
        WINOGRAD.shape(3, 4, 4, 8)


SOURCES = ["frames", "folded", "products"]


def random_sum(source: str, residual: str, frames: int, channels: int, dtype: torch.dtype) -> Sum:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda").to(dtype)

    height, width = 10, 14
    shapes = {
        "frames": (frames, height, width, channels),
        "folded": (frames, height // 2 + 1, width // 2 + 1, 2, 2, channels),
        "products": (4, frames // 2, height, width, channels),
    }
    y = randn(*shapes[source])
    residuals = {
        "none": lambda: None,
        "same": lambda: randn(frames, height, width, channels),
        "repeated": lambda: Repeated(randn(frames // 2, height // 2, width // 2, 2 * channels), 2, 4),
    }
    return Sum(Products(*y) if source == "products" else y, randn(channels), residuals[residual]())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("window", [*WINDOWS, POINT, Window("stacked", 1)], ids=str)
def test_kernels_equal_their_plain_forms(source, window):
    # Each combination compiles a kernel of its own, so the remaining choices are drawn: 6 of 144.
    draw = random.Random(f"{source} {window}")
    for _ in range(6):
        dtype, limit = draw.choice([(torch.float32, 1e-5), (torch.bfloat16, 3e-3)])
        channels, residual = draw.choice([3, 96, 384]), draw.choice(["none", "same", "repeated"])
        total = random_sum(source, residual, 4, channels, dtype)
        past = torch.randn(window.reach, 10, 14, channels, device="cuda").to(dtype)
        gamma = draw.choice([None, torch.randn(channels, 1, 1, 1, device="cuda").to(dtype)])
        past = past if window.reach and draw.random() < 0.5 else None
        step = Step(window, gamma, silu=gamma is not None, keep=draw.random() < 0.5)
        ours, plain = enter(total, step, past), enter_plain(total, step, past)
        for name in ("buffer", "past", "kept"):
            mine, expected = getattr(ours, name), getattr(plain, name)
            if expected is not None:
                assert relative_error(mine, expected) < limit, (residual, channels, dtype, name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("out_dim", [3, 12])
def test_gathering_kernel_equals_its_plain_form(out_dim):
    products = torch.randn(27 * out_dim, 3, 9, 13, device="cuda")
    bias, held = torch.randn(out_dim, device="cuda"), torch.randn(27 * out_dim, 2, 9, 13, device="cuda")
    for past in (None, held):
        assert relative_error(gather_taps(products, past, bias), gather_taps_plain(products, past, bias)) < 1e-6
