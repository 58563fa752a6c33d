"""The decoder for GPUs against the plain layers. Off GPUs its kernels run in their plain forms, so all of it runs."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from swiftwan.models import vae_fast
from swiftwan.models.config import WAN22_VAE, VAEConfig
from swiftwan.models.vae import Tiling, WanVAE
from swiftwan.models.vae_blocks import Stream
from swiftwan.models.vae_fast import FastDecoder, FastEncoder, latent_frames_at_once
from swiftwan.ops.vae_between import STACKED, VOLUME, WINOGRAD

SMALL_21 = VAEConfig(base_dim=8, num_res_blocks=1)
SMALL_22 = replace(WAN22_VAE, base_dim=8, decoder_base_dim=16, num_res_blocks=1)
KINDS = [pytest.param((SMALL_21, 5, 7), id="wan2.1"), pytest.param((SMALL_22, 2, 5), id="wan2.2")]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


def relative_error(ours: Tensor, reference: Tensor) -> float:
    assert ours.shape == reference.shape
    return ((ours.float() - reference.float()).norm() / reference.float().norm()).item()


def random_vae(config: VAEConfig, device: str = "cpu") -> WanVAE:
    """With weights large enough that every layer and bias shows in the output."""
    torch.manual_seed(0)
    vae = WanVAE(config).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if name.endswith("weight"):
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, mean=float(name.endswith("gamma")), std=0.2)
    return vae.to(device)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return request.param


@pytest.mark.parametrize("window", [VOLUME, STACKED, WINOGRAD], ids=str)
def test_every_layout_equals_the_plain_layers(kind, device, window):
    config, rows, columns = kind
    vae = random_vae(config, device)
    latents = torch.randn(2, config.z_dim, 4, rows, columns, device=device)
    expected = vae.decode(latents)
    vae.make_decoder = lambda d: FastDecoder(d, lambda i, o, frames: STACKED if frames % 2 else window)
    for chunk in (None, 1, 2, 3):
        assert relative_error(vae.decode(latents, chunk), expected) < 1e-4


@pytest.mark.parametrize("window", [VOLUME, STACKED, WINOGRAD], ids=str)
def test_encoding_in_every_layout_equals_the_plain_layers(kind, device, window):
    config, rows, columns = kind
    vae = random_vae(config, device)
    cell = config.scale_factor_spatial
    video = torch.rand(2, 3, 17, rows * cell, columns * cell, device=device) * 2 - 1
    expected = vae.encode(video)
    tiled = vae.encode(video[:, :, :5], tiling=Tiling(3 * cell, 2 * cell))
    vae.make_encoder = lambda e: FastEncoder(e, lambda i, o, frames: STACKED if frames % 2 else window)
    for chunk in (None, 4, 8, 12):
        assert relative_error(vae.encode(video, chunk), expected) < 1e-4
    assert relative_error(vae.encode(video[:, :, :5], tiling=Tiling(3 * cell, 2 * cell)), tiled) < 1e-4
    assert relative_error(vae.encode(video[:, :, :1]), expected[:, :, :1]) < 1e-4


def test_encoding_in_bfloat16_is_no_further_off_than_the_plain_layers(kind, device):
    config, rows, columns = kind
    vae = random_vae(config, device)
    cell = config.scale_factor_spatial
    video = torch.rand(1, 3, 9, rows * cell, columns * cell, device=device) * 2 - 1
    exact = vae.encode(video)
    vae.bfloat16()
    plain = relative_error(vae.encode(video), exact)
    assert relative_error(vae.run_fast().encode(video), exact) < 1.1 * plain


def test_tiles_and_frames_equal_the_plain_ones(kind, device):
    config, rows, columns = kind
    vae = random_vae(config, device)
    cell = config.scale_factor_spatial
    latents = torch.randn(1, config.z_dim, 3, rows + 2, columns, device=device)
    tiling = Tiling(3 * cell, 2 * cell)
    tiled, frames = vae.decode(latents, tiling=tiling), torch.cat(list(vae.stream_frames(latents)))
    vae.run_fast()
    for chunk in (None, 1, 2):
        assert relative_error(vae.decode(latents, chunk, tiling), tiled) < 1e-4
        ours = torch.cat(list(vae.stream_frames(latents, chunk)))
        assert ours.dtype == torch.uint8
        assert (ours.int() - frames.int()).abs().max() <= 1


def test_bfloat16_is_no_further_off_than_the_plain_layers(kind, device):
    config, rows, columns = kind
    vae = random_vae(config, device)
    latents = torch.randn(1, config.z_dim, 3, rows, columns, device=device)
    exact = vae.decode(latents)
    vae.bfloat16()
    plain = relative_error(vae.decode(latents), exact)
    for window in (VOLUME, WINOGRAD):
        vae.make_decoder = lambda d, window=window: FastDecoder(d, lambda i, o, t: STACKED if t % 2 else window)
        decoded = vae.decode(latents)
        assert decoded.dtype == torch.bfloat16
        assert relative_error(decoded, exact) < 1.1 * plain, (window, plain)


def test_long_chunks_are_cut(kind, monkeypatch):
    config, rows, columns = kind
    vae = random_vae(config).run_fast()
    latents = torch.randn(1, config.z_dim, 6, rows, columns)
    whole = vae.decode(latents, None)
    lengths = []
    chunk = FastDecoder._chunk
    monkeypatch.setattr(FastDecoder, "_chunk", lambda self, z, s: (lengths.append(z.shape[1]), chunk(self, z, s))[1])
    channels = vae.decoder.conv_out.in_channels
    monkeypatch.setattr(vae_fast, "MOST_ELEMENTS", 2 * 4 * 64 * rows * columns * channels)
    assert relative_error(vae.decode(latents, None), whole) < 1e-5
    assert lengths == [1, 2, 2, 1]


def test_the_last_level_goes_by_pairs_where_memory_is_short(kind, device, monkeypatch):
    config, rows, columns = kind
    vae = random_vae(config, device)
    latents = torch.randn(1, config.z_dim, 4, rows, columns, device=device)
    expected = vae.decode(latents)
    vae.run_fast()
    counts, up = [], FastDecoder._up
    monkeypatch.setattr(FastDecoder, "_up", lambda self, b, x, s: (counts.append(x.shape[0]), up(self, b, x, s))[1])
    for total, each in ((10**12, [1, 2, 4, 4]), (10**3, [1, 2, 4, 2, 2])):
        counts.clear()
        monkeypatch.setattr(vae_fast, "memory_of", lambda device, total=total: total)
        assert relative_error(vae.decode(latents, 1), expected) < 1e-4
        assert counts == [1, 1, 1, 1] + 3 * each


def test_memory_of_a_stream_does_not_grow_with_the_clip(kind):
    config, rows, columns = kind
    vae = random_vae(config)
    decoder, stream, held = FastDecoder(vae.decoder), Stream(), []
    for _ in range(5):
        decoder(torch.randn(1, config.z_dim, 1, rows, columns), stream)
        held.append(stream.nbytes)
        for past in stream.past.values():
            assert past.untyped_storage().nbytes() == past.nbytes, "a slice keeps its chunk alive"
    assert held[0] > 0
    assert len(set(held[2:])) == 1, held


def test_new_weights_are_used_and_gradients_still_flow():
    vae = random_vae(SMALL_21).run_fast()
    latents = torch.randn(1, 16, 2, 3, 4)
    before = vae.decode(latents)
    vae.requires_grad_(True)
    vae.decode_raw(latents).square().mean().backward()
    assert all(parameter.grad is not None for parameter in vae.decoder.parameters())
    vae.moments(torch.rand(1, 3, 5, 24, 32))[0].square().mean().backward()
    assert all(parameter.grad is not None for parameter in vae.encoder.parameters())
    with torch.no_grad():
        for parameter in vae.decoder.parameters():
            parameter.mul_(1.1)
    plain = random_vae(SMALL_21)
    plain.load_state_dict(vae.state_dict())
    assert relative_error(vae.decode(latents), plain.decode(latents)) < 1e-4
    assert relative_error(vae.decode(latents), before) > 1e-2


def test_chunk_length_follows_the_device():
    gib = 2**30
    # channels, latent height and width, bytes of an element: Wan2.1 at 832 x 480 and 1280 x 720
    assert [latent_frames_at_once(96, 60, 104, 2, n * gib) for n in (8, 24, 80, 141)] == [1, 1, 5, 7]
    assert [latent_frames_at_once(96, 90, 160, 2, n * gib) for n in (24, 80, 141)] == [1, 2, 3]
    vae = random_vae(SMALL_21)
    assert vae.latent_frames_at_once(torch.zeros(1, 16, 5, 4, 4)) == 1
    assert vae.run_fast().latent_frames_at_once(torch.zeros(1, 16, 5, 4, 4)) == 1
