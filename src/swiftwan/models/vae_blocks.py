"""The layers of the Wan VAE, causal in time, and the memory they need to run a clip in chunks.

Shapes: B clips, C channels, T frames, H x W positions; every activation is (B, C, T, H, W).

Causal means that a frame depends on frames before it only. So a clip may be cut into chunks anywhere
between two latent frames, provided each layer finds the few frames before its chunk again: that is
what ``Stream`` holds. A whole clip is one chunk of a new stream; there is no second code path.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stream:
    """The past of one clip on its way through the encoder or the decoder, layer by layer.

    Make a new one for each clip (and each tile of it), and pass it with every chunk, in order.
    """

    def __init__(self) -> None:
        self.at_start = True
        """True while the chunk that holds the clip's first frame passes."""
        self.past: dict[nn.Module, Tensor] = {}
        """The frames that each layer saw last, laid out as whoever runs the layer wants them."""

    @property
    def nbytes(self) -> int:
        """Bytes held between two chunks: a few frames a layer, whatever the length of the clip."""
        return sum(past.nbytes for past in self.past.values())

    def is_single(self, layer: nn.Module, x: Tensor) -> bool:
        """Whether x is the clip's first frame, alone: a picture, or a stream's first chunk."""
        return x.shape[2] == 1 and layer not in self.past

    def extend(self, layer: nn.Module, x: Tensor, frames: int) -> Tensor:
        """Put the ``frames`` frames that ``layer`` saw last in front of x; zeros where it saw none."""
        past = self.past.get(layer)
        x = F.pad(x, (0, 0, 0, 0, frames, 0)) if past is None else torch.cat((past, x), dim=2)
        # A copy: a slice would keep the whole chunk alive.
        self.past[layer] = x[:, :, -frames:].clone()
        return x


class RMSNorm(nn.Module):
    """RMS norm over the channels, with a gain; the mean square is taken in float32."""

    def __init__(self, dim: int, ndim: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * ndim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = wide.square().mean(dim=1, keepdim=True).clamp_min(1e-24).rsqrt()
        return (wide * scale).to(x.dtype) * self.gamma


def conv_volume(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """Convolve (B, C, T, H, W), padded in space only, ``stride`` frames apart: PyTorch's own operator."""
    return F.conv3d(x, weight, bias, (stride, 1, 1), (0, weight.shape[3] // 2, weight.shape[4] // 2))


def conv_stacked(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """The same as one 2D convolution over frames stacked in the channels, channels last.

    For CPUs: PyTorch 2.13 sends a float32 ``conv3d`` of batch 1 with C x T x H at most 20,480 to its slow
    kernel. One thread of an EPYC, 16 channels, 4 frames of 128 x 128: 6 GFLOP/s there, 72 here.
    """
    taps = weight.shape[2]
    reach = x.shape[2] - taps + 1
    stacked = torch.cat([x[:, :, tap : tap + reach : stride] for tap in range(taps)], dim=1)
    flat = weight.transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
    return _as_video(F.conv2d(_as_images(stacked), flat, bias, padding=weight.shape[3] // 2), x.shape[0])


class Conv3d(nn.Conv3d):
    """A convolution over (T, H, W) that keeps H and W; ``convolve`` is how, chosen at loading."""

    convolve = staticmethod(conv_volume)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.weight, self.bias, self.stride[0])


class CausalConv3d(Conv3d):
    """A convolution whose window ends at the present frame: T is kept too."""

    def __init__(self, in_dim: int, out_dim: int, kernel_size: tuple[int, int, int] = (3, 3, 3)) -> None:
        super().__init__(in_dim, out_dim, kernel_size)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:  # type: ignore[override]
        is_single = stream.is_single(self, x)
        extended = stream.extend(self, x, self.kernel_size[0] - 1)
        if is_single:
            # Before it lie zeros, so only the window's last tap sees anything. One picture of 256 x 256, a VAE of base
            # 32, one CPU core: encoded in 0.36 s instead of 0.67, decoded in 0.70 instead of 1.17.
            return self.convolve(x, self.weight[:, :, -1:], self.bias, 1)
        return super().forward(extended)


class ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(in_dim)
        self.conv1 = CausalConv3d(in_dim, out_dim)
        self.norm2 = RMSNorm(out_dim)
        self.conv2 = CausalConv3d(out_dim, out_dim)
        self.conv_shortcut = Conv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)), stream)
        h = self.conv2(F.silu(self.norm2(h)), stream)
        return h + self.conv_shortcut(x)


class Attention(nn.Module):
    """Self-attention of one head over the positions of each frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, ndim=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        frames = _as_images(x)
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2)  # (B T, H W, 3 C)
        # Of a single position, PyTorch 2.11 on CUDA finds no kernel for the strides a transposition leaves, and
        # ``contiguous`` leaves them too; a clone has those of its shape.
        qkv = qkv.clone(memory_format=torch.contiguous_format)
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        attended = attended.transpose(1, 2).unflatten(2, frames.shape[2:])
        return x + _as_video(self.proj(attended), x.shape[0])


class MidBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(dim)])
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim), ResidualBlock(dim, dim)])

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.resnets[0](x, stream)
        x = self.attentions[0](x, stream)
        x = self.resnets[1](x, stream)
        return x


class Downsample(nn.Module):
    """Halve H and W; with ``time``, also turn 1 + 2k frames into 1 + k."""

    def __init__(self, dim: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = _as_video(self.resample(_as_images(x)), x.shape[0])
        if self.time_conv is None:
            return x
        joined = stream.extend(self.time_conv, x, 1)
        if not stream.at_start:
            return self.time_conv(joined)
        # The clip's first frame stays as it is; the windows after it begin at frames 0, 2, 4, ...
        return x if x.shape[2] == 1 else torch.cat((x[:, :, :1], self.time_conv(x)), dim=2)


class Upsample(nn.Module):
    """Double H and W; with ``time``, also turn 1 + k frames into 1 + 2k."""

    def __init__(self, in_dim: int, out_dim: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(in_dim, out_dim, 3, padding=1))
        self.time_conv = CausalConv3d(in_dim, 2 * in_dim, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if self.time_conv is not None:
            x = self._double_frames(x, stream)
        return _as_video(self.resample(_as_images(x)), x.shape[0])

    def _double_frames(self, x: Tensor, stream: Stream) -> Tensor:
        if not stream.at_start:
            return self._pairs(x, stream)
        # The clip's first frame stays single, and is not in the past of those after it: they see zeros.
        first, rest = x[:, :, :1], x[:, :, 1:]
        return x if x.shape[2] == 1 else torch.cat((first, self._pairs(rest, stream)), dim=2)

    def _pairs(self, x: Tensor, stream: Stream) -> Tensor:
        assert self.time_conv is not None
        early, late = self.time_conv(x, stream).chunk(2, dim=1)
        return torch.stack((early, late), dim=3).flatten(2, 3)


class AverageDown(nn.Module):
    """The shortcut of a Wan2.2 down block: means over groups of neighbours in time, space and channels."""

    def __init__(self, in_dim: int, out_dim: int, factor_t: int, factor_s: int) -> None:
        super().__init__()
        self.out_dim, self.factor_t, self.factor_s = out_dim, factor_t, factor_s
        assert in_dim * factor_t * factor_s**2 % out_dim == 0

    def forward(self, x: Tensor) -> Tensor:
        # Only the chunk with the clip's first frame has an odd count: that frame is averaged with zeros.
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.factor_t, 0))
        b, c, t, h, w = x.shape
        s = self.factor_s
        x = x.reshape(b, c, t // self.factor_t, self.factor_t, h // s, s, w // s, s)
        x = x.permute(0, 1, 3, 5, 7, 2, 4, 6)  # (B, C, factor_t, s, s, T, H, W)
        return x.flatten(1, 4).unflatten(1, (self.out_dim, -1)).mean(dim=2)


class DuplicateUp(nn.Module):
    """The shortcut of a Wan2.2 up block: each value repeated over neighbours in time, space and channels."""

    def __init__(self, in_dim: int, out_dim: int, factor_t: int, factor_s: int) -> None:
        super().__init__()
        self.out_dim, self.factor_t, self.factor_s = out_dim, factor_t, factor_s
        self.repeats = out_dim * factor_t * factor_s**2 // in_dim

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = x.repeat_interleave(self.repeats, dim=1)
        x = x.unflatten(1, (self.out_dim, self.factor_t, self.factor_s, self.factor_s))
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)  # (B, out_dim, T, factor_t, H, s, W, s)
        x = x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        # The clip's first frame becomes one frame, not factor_t.
        return x[:, :, self.factor_t - 1 :] if stream.at_start else x


class ResidualDownBlock(nn.Module):
    """Wan2.2: residual blocks and a downsampler, with a shortcut around them all."""

    def __init__(self, in_dim: int, out_dim: int, num_res_blocks: int, space: bool, time: bool) -> None:
        super().__init__()
        self.avg_shortcut = AverageDown(in_dim, out_dim, 2 if time else 1, 2 if space else 1)
        dims = [in_dim] + [out_dim] * num_res_blocks
        self.resnets = nn.ModuleList(ResidualBlock(a, b) for a, b in zip(dims, dims[1:], strict=False))
        self.downsampler = Downsample(out_dim, time) if space else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        shortcut = self.avg_shortcut(x)
        for resnet in self.resnets:
            x = resnet(x, stream)
        if self.downsampler is not None:
            x = self.downsampler(x, stream)
        return x + shortcut


class ResidualUpBlock(nn.Module):
    """Wan2.2: residual blocks and an upsampler, with a shortcut around them all."""

    def __init__(self, in_dim: int, out_dim: int, num_res_blocks: int, space: bool, time: bool) -> None:
        super().__init__()
        self.avg_shortcut = DuplicateUp(in_dim, out_dim, 2 if time else 1, 2) if space else None
        dims = [in_dim] + [out_dim] * (num_res_blocks + 1)
        self.resnets = nn.ModuleList(ResidualBlock(a, b) for a, b in zip(dims, dims[1:], strict=False))
        self.upsampler = Upsample(out_dim, out_dim, time) if space else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        block_input = x
        for resnet in self.resnets:
            x = resnet(x, stream)
        if self.upsampler is None or self.avg_shortcut is None:
            return x
        return self.upsampler(x, stream) + self.avg_shortcut(block_input, stream)


class UpBlock(nn.Module):
    """Wan2.1: residual blocks, then an upsampler that also halves the channels."""

    def __init__(self, in_dim: int, out_dim: int, num_res_blocks: int, space: bool, time: bool) -> None:
        super().__init__()
        dims = [in_dim] + [out_dim] * (num_res_blocks + 1)
        self.resnets = nn.ModuleList(ResidualBlock(a, b) for a, b in zip(dims, dims[1:], strict=False))
        self.upsamplers = nn.ModuleList([Upsample(out_dim, out_dim // 2, time)] if space else [])

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x, stream)
        for upsampler in self.upsamplers:
            x = upsampler(x, stream)
        return x


def _as_images(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B T, C, H, W)."""
    return x.transpose(1, 2).flatten(0, 1)


def _as_video(x: Tensor, batch: int) -> Tensor:
    """(B T, C, H, W) -> (B, C, T, H, W)."""
    if x.shape[0] == batch:
        # Of one frame the general form leaves a stride from which PyTorch no longer sees "channels last".
        return x.unsqueeze(2)
    return x.unflatten(0, (batch, -1)).transpose(1, 2)
