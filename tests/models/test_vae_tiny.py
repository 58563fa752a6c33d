"""The tiny decoder beside TAEHV's own way through the same layers: all frames at once, the past as a shifted copy."""

import pytest
import torch
import torch.nn.functional as F

from swiftwan.errors import WeightsError
from swiftwan.models.vae_blocks import Stream
from swiftwan.models.vae_tiny import TinyDecoder, TinySizes

SIZES = {
    "wan2.1": TinySizes(16, (12, 8, 6, 4), 1),
    "wan2.2": TinySizes(48, (12, 8, 6, 4), 2),
    "super": TinySizes(48, (12, 8, 6, 4), 2, is_super=True),
}


def make(sizes):
    return TinyDecoder(sizes).eval().requires_grad_(False)


def conv(x, weights, name, padding=1, groups=1):
    return F.conv2d(x, weights[f"decoder.{name}.weight"], weights.get(f"decoder.{name}.bias"), 1, padding, 1, groups)


def taehv(weights, latents, sizes):
    """decode_video of github.com/madebyollin/taehv, (1, C, f, h, w) to (F, 3, H, W) in [0, 1], not clamped."""
    x = latents[0].transpose(0, 1)

    def block(x, i):
        shifted = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[: len(x)]
        both = torch.cat((x, shifted), 1)
        if sizes.is_super:
            h = conv(both, weights, f"{i}.conv.0", 3, groups=both.shape[1])
            return conv(conv(h, weights, f"{i}.conv.1", 0).relu(), weights, f"{i}.conv.3", 0) + x
        h = conv(both, weights, f"{i}.conv.0").relu()
        return (conv(conv(h, weights, f"{i}.conv.2").relu(), weights, f"{i}.conv.4") + x).relu()

    def grow(x, i):
        return conv(x, weights, f"{i}.conv", 0).reshape(-1, *x.shape[1:])

    if sizes.is_super:
        x = conv(x, weights, 0, 0)
        for at in (1, 8, 15):
            x = block(block(block(x, at), at + 1), at + 2)
            x = grow(F.pixel_shuffle(conv(x, weights, at + 3).relu(), 2), at + 6)
        x = conv(x, weights, 22)
    else:
        x = conv(torch.tanh(x / 3) * 3, weights, 1).relu()
        for at in (3, 9, 15):
            x = block(block(block(x, at), at + 1), at + 2)
            x = conv(grow(F.interpolate(x, scale_factor=2), at + 4), weights, at + 5)
        x = conv(x.relu(), weights, 22)
    return F.pixel_shuffle(x, sizes.patch)[3:]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_frames_are_those_of_taehv(name, dtype, limit):
    sizes = SIZES[name]
    model, latents = make(sizes), torch.randn(1, sizes.latent_channels, 4, 3, 5)
    expected = taehv(model.state_dict(), latents, sizes)
    video = model.to(dtype).channels_last()(latents, Stream())
    assert video.shape == (1, 3, 13, 24 * sizes.patch, 40 * sizes.patch)
    ours = (video[0].transpose(0, 1).float() + 1) / 2
    assert (ours - expected).norm() / expected.norm() < limit


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_and_batches_are_the_whole(name, chunk):
    model, latents = make(SIZES[name]), torch.randn(2, SIZES[name].latent_channels, 5, 3, 4)
    stream = Stream()
    whole = torch.cat([model(part, stream) for part in latents.split(chunk, dim=2)], dim=2)
    for clip, ours in zip(latents.split(1), whole.split(1), strict=True):
        assert torch.allclose(ours, model(clip, Stream()), atol=1e-5)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_read_off_the_shapes(name):
    shapes = {key: tuple(value.shape) for key, value in make(SIZES[name]).state_dict().items()}
    assert TinySizes.of(shapes, "a file") == SIZES[name]


def test_the_names_are_those_of_the_published_file():
    """taew2_1: 64 pixels' worth of names, from github.com/madebyollin/taehv (taehv.py)."""
    names = set(make(TinySizes(16, (256, 128, 64, 64), 1)).state_dict())
    blocks = {
        f"decoder.{i}.conv.{j}.{kind}" for i in (3, 4, 5, 9, 10, 11, 15, 16, 17) for j in (0, 2, 4) for kind in KINDS
    }
    single = {f"decoder.{i}.{kind}" for i in (1, 22) for kind in KINDS}
    assert names == blocks | single | {f"decoder.{i}.weight" for i in (8, 14, 20)} | {
        f"decoder.{i}.conv.weight" for i in (7, 13, 19)
    }


KINDS = ("weight", "bias")


def test_another_file_is_told():
    with pytest.raises(WeightsError, match="vae.safetensors holds no TAEHV decoder; take taew2_1"):
        TinySizes.of({"decoder.conv_in.weight": (3, 3, 3, 3, 3)}, "vae.safetensors")
