"""The Wan VAE: video to latents and back, whole or streamed over time, Wan2.1 and Wan2.2.

Parameter names and shapes are those of diffusers' ``AutoencoderKLWan``. The maths is that of
github.com/Wan-Video/Wan2.1 (wan/modules/vae.py) and Wan2.2 (wan/modules/vae2_2.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftwan.errors import RequestError, WeightsError
from swiftwan.models.config import VAEConfig
from swiftwan.models.vae_blocks import (
    CausalConv3d,
    Conv3d,
    Downsample,
    MidBlock,
    ResidualBlock,
    ResidualDownBlock,
    ResidualUpBlock,
    RMSNorm,
    Stream,
    UpBlock,
    conv_stacked,
    conv_volume,
)
from swiftwan.models.vae_fast import FastDecoder, FastEncoder, latent_frames_at_once, memory_of
from swiftwan.models.vae_tiles import Tiles, Tiling
from swiftwan.models.vae_tiny import TinyDecoder

Layers = Callable[[Tensor, Stream], Tensor]
"""A chunk of one clip, and the clip's stream, through the encoder or the decoder."""


TINY_FRAMES = 4
"""Latent frames at once of a tiny decoder on a GPU: 16 frames of 64 channels, 0.8 GB at 832x480 in 16 bits."""


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        dims = [config.base_dim * mult for mult in (1, *config.dim_mult)]
        downsamples_time = (*config.temperal_downsample, None)  # None: the last level keeps its size

        self.conv_in = CausalConv3d(config.in_channels, dims[0])
        self.down_blocks = nn.ModuleList()
        for in_dim, out_dim, time in zip(dims, dims[1:], downsamples_time, strict=False):
            if config.is_residual:
                block = ResidualDownBlock(in_dim, out_dim, config.num_res_blocks, time is not None, bool(time))
                self.down_blocks.append(block)
                continue
            level = [in_dim] + [out_dim] * config.num_res_blocks
            self.down_blocks.extend(ResidualBlock(a, b) for a, b in zip(level, level[1:], strict=False))
            if time is not None:
                self.down_blocks.append(Downsample(out_dim, time))
        self.mid_block = MidBlock(dims[-1])
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], 2 * config.z_dim)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.conv_in(x, stream)
        for block in self.down_blocks:
            x = block(x, stream)
        x = self.mid_block(x, stream)
        x = self.conv_out(F.silu(self.norm_out(x)), stream)
        stream.at_start = False
        return x


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        base_dim = config.decoder_base_dim or config.base_dim
        dims = [base_dim * mult for mult in (config.dim_mult[-1], *reversed(config.dim_mult))]
        upsamples_time = (*reversed(config.temperal_downsample), None)

        self.conv_in = CausalConv3d(config.z_dim, dims[0])
        self.mid_block = MidBlock(dims[0])
        self.up_blocks = nn.ModuleList()
        for i, (in_dim, out_dim, time) in enumerate(zip(dims, dims[1:], upsamples_time, strict=False)):
            block: type[UpBlock] | type[ResidualUpBlock] = ResidualUpBlock if config.is_residual else UpBlock
            if not config.is_residual:
                in_dim = in_dim // 2 if i > 0 else in_dim
            self.up_blocks.append(block(in_dim, out_dim, config.num_res_blocks, time is not None, bool(time)))
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], config.out_channels)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.conv_in(x, stream)
        x = self.mid_block(x, stream)
        for block in self.up_blocks:
            x = block(x, stream)
        x = self.conv_out(F.silu(self.norm_out(x)), stream)
        stream.at_start = False
        return x


class WanVAE(nn.Module):
    """Causal 3D VAE. Video is (B, 3, F, H, W) in [-1, 1] with F = 4k + 1; latents are (B, z, f, h, w).

    f = (F - 1) / 4 + 1; h and w are H and W over 8 (Wan2.1) or 16 (Wan2.2).

    Nothing but parameters is stored: the latents' mean and deviation are read from the config when
    used, so a model built under ``torch.device("meta")`` is complete once its parameters are loaded,
    and casting the module cannot round them.

    Raises:
        WeightsError: the config asks for attention between the levels or for dropout; no published
            Wan VAE does.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        if config.attn_scales or config.dropout:
            raise WeightsError(
                f"the VAE's config.json has attn_scales {config.attn_scales} and dropout {config.dropout}; "
                "swiftwan knows Wan VAEs, which have neither. Is this a Wan checkpoint?"
            )
        self.config = config
        self.patch = config.patch_size or 1
        self.encoder = Encoder(config)
        self.quant_conv = Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)
        self.make_encoder: Callable[[nn.Module], Layers] = lambda encoder: encoder
        self.make_decoder: Callable[[nn.Module], Layers] = lambda decoder: decoder
        """Who runs the layers, made anew for each clip; ``moments`` and ``decode_raw``, which learn, run them plain."""
        self.tiny: TinyDecoder | None = None
        """Decodes in the decoder's place, if it is there."""

    def run_fast(self) -> Self:
        """From now on, encode with :class:`FastEncoder` and decode with :class:`FastDecoder`; what learns stays."""
        self.make_encoder, self.make_decoder = FastEncoder, FastDecoder
        return self

    def run_plain(self) -> Self:
        """Undo :meth:`run_fast`."""
        self.make_encoder = self.make_decoder = lambda layers: layers
        return self

    def latent_frames_at_once(self, latents: Tensor) -> int:
        """The chunk length for these latents on this device: fast decoding gains by longer chunks, as memory allows."""
        weight = self.decoder.conv_out.weight
        if self.tiny is not None:
            return TINY_FRAMES if weight.is_cuda else 1
        if self.make_decoder is not FastDecoder or not weight.is_cuda:
            return 1
        height, width = latents.shape[3:]
        return latent_frames_at_once(weight.shape[1], height, width, weight.element_size(), memory_of(weight.device))

    def prepare(self, device: torch.device | str) -> Self:
        """Move to ``device``, and choose how convolutions run there. Call once, when the weights are loaded.

        The results are equal but for rounding, and both ways are differentiable; a model that was never
        prepared runs plain ``conv3d``.
        """
        convolve = conv_stacked if torch.device(device).type == "cpu" else conv_volume
        for layer in self.modules():
            if isinstance(layer, Conv3d):
                layer.convolve = convolve
            elif isinstance(layer, nn.Conv2d):
                layer.weight.data = layer.weight.data.to(memory_format=torch.channels_last)
        return self.to(device)

    @property
    def latents_mean(self) -> Tensor:
        """(1, z, 1, 1, 1), float32, on the weights' device."""
        return self._per_channel(self.config.latents_mean, self.quant_conv.weight.device)

    @property
    def latents_std(self) -> Tensor:
        """(1, z, 1, 1, 1), float32, on the weights' device."""
        return self._per_channel(self.config.latents_std, self.quant_conv.weight.device)

    @staticmethod
    def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1, 1)

    def normalize(self, z: Tensor) -> Tensor:
        """Latents as the VAE makes them -> latents as the transformer sees them, float32."""
        return (z.float() - self.latents_mean) / self.latents_std

    def denormalize(self, latents: Tensor) -> Tensor:
        """The inverse of ``normalize``, float32."""
        return latents.float() * self.latents_std + self.latents_mean

    def moments(
        self, video: Tensor, frames_per_chunk: int | None = None, tiling: Tiling | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, each (B, z, f, h, w), not normalised; differentiable.

        Args:
            video: (B, 3, F, H, W) in [-1, 1].
            frames_per_chunk: how many frames to encode at once, a multiple of 4; the first chunk has one
                more. None encodes the clip whole, as training needs.

        Raises:
            RequestError: F is not 4k + 1, H or W does not divide, or a chunk or tile size does not.
        """
        self._check_video(video)
        chunks = self._encode_chunks(self.encoder, video, frames_per_chunk, tiling)
        mean, logvar = torch.cat(list(chunks), dim=2).chunk(2, dim=1)
        return mean, logvar

    @torch.no_grad()
    def encode(self, video: Tensor, frames_per_chunk: int | None = 4, tiling: Tiling | None = None) -> Tensor:
        """The posterior's mode, normalised: (B, 3, F, H, W) in [-1, 1] -> (B, z, f, h, w), float32.

        Arguments and errors as in ``moments``.
        """
        self._check_video(video)
        clips = [
            torch.cat(list(self._encode_chunks(self.make_encoder(self.encoder), clip, frames_per_chunk, tiling)), dim=2)
            for clip in video.split(1)
        ]
        return self.normalize(torch.cat(clips).chunk(2, dim=1)[0])

    def decode_raw(self, z: Tensor) -> Tensor:
        """Decode whole clips, differentiable.

        (B, z, f, h, w), not normalised -> (B, 3, F, H, W), not clamped.
        """
        return _unpatchify(self.decoder(self._before_decoder(z), Stream()), self.patch)

    @torch.no_grad()
    def decode(self, latents: Tensor, latent_frames_per_chunk: int | None = 1, tiling: Tiling | None = None) -> Tensor:
        """Normalised latents (B, z, f, h, w) -> video (B, 3, F, H, W) in [-1, 1], in the weights' dtype.

        Raises:
            RequestError: a chunk or tile size does not fit.
        """
        clips = [
            torch.cat([chunk.clamp(-1, 1) for chunk in self._decode_chunks(z, latent_frames_per_chunk, tiling)], dim=2)
            for z in latents.split(1)
        ]
        return torch.cat(clips)

    @torch.no_grad()
    def stream_frames(
        self, latents: Tensor, latent_frames_per_chunk: int | None = 1, tiling: Tiling | None = None
    ) -> Iterator[Tensor]:
        """Decode one clip and yield its frames as they are made: uint8 (frames, H, W, 3), on the same device.

        Rounds as diffusers' ``VideoProcessor`` does.

        Args:
            latents: (1, z, f, h, w), normalised.

        Raises:
            RequestError: more than one clip, or a chunk or tile size does not fit.
        """
        if latents.shape[0] != 1:
            raise RequestError(f"stream_frames got {latents.shape[0]} clips; it takes 1. Call it once a clip.")
        for chunk in self._decode_chunks(latents, latent_frames_per_chunk, tiling):
            frames = chunk[0].permute(1, 2, 3, 0).float()
            yield ((frames / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)

    def _encode_chunks(
        self, encoder: Layers, video: Tensor, frames: int | None, tiling: Tiling | None
    ) -> Iterator[Tensor]:
        step = self.config.scale_factor_temporal
        if frames is not None and (frames < step or frames % step):
            near = max(step, frames // step * step)
            raise RequestError(
                f"frames_per_chunk is {frames}; this VAE needs a multiple of {step}. Nearest: {near} or {near + step}."
            )
        paste, cut = self._grids(tiling)
        tiles = Tiles(lambda x, stream: self.quant_conv(encoder(x, stream)), cut, paste)
        x = _patchify(video.to(self.quant_conv.weight.dtype), self.patch)
        frames = frames or x.shape[2]
        yield tiles(x[:, :, : 1 + frames])
        for start in range(1 + frames, x.shape[2], frames):
            yield tiles(x[:, :, start : start + frames])

    def _decode_chunks(self, latents: Tensor, frames: int | None, tiling: Tiling | None) -> Iterator[Tensor]:
        if frames is not None and frames < 1:
            raise RequestError(f"latent_frames_per_chunk is {frames}; it must be at least 1.")
        frames = frames or latents.shape[2]
        if self.tiny is not None:
            stream = Stream()
            yield from (self.tiny(chunk, stream) for chunk in latents.split(frames, dim=2))
            return
        cut, paste = self._grids(tiling)
        tiles = Tiles(self.make_decoder(self.decoder), cut, paste)
        for chunk in self._before_decoder(self.denormalize(latents)).split(frames, dim=2):
            yield _unpatchify(tiles(chunk), self.patch)

    def _before_decoder(self, z: Tensor) -> Tensor:
        """Latents as the encoder made them, in the weights' dtype; a product of few channels, so of a clip at once."""
        return self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype))

    def _grids(self, tiling: Tiling | None) -> tuple[Tiling | None, Tiling | None]:
        """The tiling in latent positions, and in those that the outermost convolutions see."""
        if tiling is None:
            return None, None
        return tiling.over(self.config.scale_factor_spatial), tiling.over(self.patch)

    def _check_video(self, video: Tensor) -> None:
        _, _, frames, height, width = video.shape
        step, cell = self.config.scale_factor_temporal, self.config.scale_factor_spatial
        if frames % step != 1:
            low = (frames - 1) // step * step + 1
            near = f"{low} or {low + step}" if low > 0 else f"{low + step}"
            raise RequestError(f"the video has {frames} frames; Wan needs {step}k + 1. Nearest: {near}.")
        for name, size in (("height", height), ("width", width)):
            if size % cell or not size:
                low = size // cell * cell
                near = f"{low} or {low + cell}" if low else f"{cell}"
                raise RequestError(
                    f"the video's {name} is {size}; this VAE needs a multiple of {cell}. Nearest: {near}."
                )


def _patchify(video: Tensor, patch: int) -> Tensor:
    """(B, C, F, H p, W p) -> (B, C p p, F, H, W); of the two p, the column's counts slower."""
    b, c, f, h, w = video.shape
    x = video.reshape(b, c, f, h // patch, patch, w // patch, patch)
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def _unpatchify(x: Tensor, patch: int) -> Tensor:
    """The inverse of ``_patchify``."""
    return x.unflatten(1, (-1, patch, patch)).permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
