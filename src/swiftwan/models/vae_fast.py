"""The VAE for GPUs: the layers of ``Decoder`` and ``Encoder``, channels last, one kernel between two convolutions.

Three things make it fast; each is exact but for rounding.

- Convolutions read channels-last frames, and make two frames at a time with four 2D convolutions where six would be
  plain (Winograd's F(2, 3) over time; ``layout`` says where).
- Everything between two convolutions is one kernel, which writes straight into the next one's input, past frames
  in front (``swiftwan.ops.vae_between``).
- A nearest upsampling and the 3x3 convolution behind it are a 2x2 convolution of the small image: 2.25 times less.

It takes no weights of its own and keeps no state: weights are laid out anew for each clip (a copy of the decoder's,
0.15 GB for Wan2.1 in bfloat16, for as long as the clip runs), so a changed model cannot run with old weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftwan.models.vae_blocks import (
    Attention,
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
    Upsample,
)
from swiftwan.ops.vae_between import (
    POINT,
    VOLUME,
    WINOGRAD,
    Products,
    Repeated,
    Step,
    Sum,
    Window,
    enter,
    fold_upsample,
    gather_taps,
    stack_taps,
    winograd_taps,
)

FRAMES, POSITIONS = 4, 64
"""What the last convolution sees for each latent frame and position."""
MOST_ELEMENTS = 2**30
"""Of the last level at once, 2 GiB in bfloat16; cuDNN counts to 2**31. Longer chunks are cut."""
COPIES = 12
"""Of the last level, that a latent frame of a chunk may hold; chunks are made by it (benchmarks/h200_vae.jsonl)."""

Layout = Callable[[int, int, int], Window]
"""(channels in, channels out, frames) -> the window of a 3x3x3 convolution."""


def layout(in_dim: int, out_dim: int, frames: int) -> Window:
    """What was fastest on an H200 in bfloat16 for nearly every shape of both VAEs.

    TFLOP/s of useful work by volume, stacked frames, Winograd (benchmarks/h200_vae_components.jsonl): 96 channels at
    480 x 832: 292, 538, 771; 192 at 240 x 416: 546, 562, 951; 384 at 120 x 208: 530, 630, 774. One frame of 384 at
    60 x 104: 411, 280. ``cudnn.benchmark`` changes the whole decode by less than 2 %, so it stays off, and with it
    the choice of kernels stays the same from run to run.
    """
    return VOLUME if frames % 2 else WINOGRAD


def latent_frames_at_once(in_dim: int, height: int, width: int, element_size: int, total_bytes: int) -> int:
    """How many latent frames of height x width fit a quarter of a device's memory; at least one.

    By the device's whole memory, not what is free: another chunk length rounds otherwise, and a seed shall mean the
    same video again. One latent frame at a time is 12 % slower than seven, at 480 x 832 on an H200.

    Args:
        in_dim: channels that the last convolution reads.
    """
    each = FRAMES * POSITIONS * height * width * in_dim
    return max(1, min(MOST_ELEMENTS // each, total_bytes // (4 * COPIES * element_size * each)))


@dataclass(frozen=True)
class Peak:
    """What a decoder holds where it is fullest, in its last level, in copies of four frames of that.

    ``each`` latent frame of a chunk, ``held`` beside them, and all of it where the last level goes ``by_pairs``, and of
    a ``picture``, a single frame. Counted from the tensors that live together (tests/test_estimate.py); those of Wan2.1
    are measured too.
    """

    each: float
    held: float
    by_pairs: float
    picture: float

    def copies(self, latent_frames: int) -> float:
        return self.each * latent_frames + self.held


PEAKS = {False: Peak(12.2, 7.7, 13.9, 8.7), True: Peak(15.8, 10.6, 20.5, 12.2)}
"""By ``is_residual``: Wan2.2's last level begins with twice its channels."""


def goes_by_pairs(peak: Peak, copy_bytes: float, total_bytes: int) -> bool:
    """Whether the last level runs two frames at a time: where a latent frame's four, 12 GB of TI2V-5B at 1280 x 704,
    would leave too little of a device's memory. Only there, since other calls round otherwise."""
    return peak.copies(1) * copy_bytes > 0.8 * total_bytes


def memory_of(device: torch.device) -> int:
    """Bytes of a GPU's memory that this process may take; no limit elsewhere."""
    if device.type != "cuda":
        return sys.maxsize
    share = torch.cuda.get_per_process_memory_fraction(device)
    return int(share * torch.cuda.get_device_properties(device).total_memory)


class FastLayers:
    """What encoder and decoder share. Activations are sums not yet added up, (T, H, W, C); no gradients."""

    def __init__(self, layout: Layout = layout) -> None:
        self.layout = layout
        self._weights: dict[tuple[nn.Module, object], tuple[Tensor, ...]] = {}

    def _mid(self, block: MidBlock, x: Sum, stream: Stream) -> Sum:
        (first, second), (attention,) = _layers(block.resnets), _layers(block.attentions)
        x, _ = self._residual(first, x, stream)
        x = self._attention(attention, x)
        x, _ = self._residual(second, x, stream)
        return x

    def _residual(self, block: ResidualBlock, x: Sum, stream: Stream) -> tuple[Sum, Tensor]:
        """The block's sum, and what went into the block."""
        h, shortcut = self._causal(block.conv1, x, stream, block.norm1, keep=True)
        h, _ = self._causal(block.conv2, h, stream, block.norm2)
        assert shortcut is not None
        if isinstance(block.conv_shortcut, nn.Conv3d):
            weight, bias = block.conv_shortcut.weight.flatten(1), block.conv_shortcut.bias
            return replace(h, residual=F.linear(shortcut, weight, bias)), shortcut
        return replace(h, residual=shortcut), shortcut

    def _attention(self, block: Attention, x: Sum) -> Sum:
        entered = enter(x, Step(POINT, block.norm.gamma, keep=True), None)
        tokens = entered.buffer.flatten(1, 2)  # (T, H W, C)
        qkv = F.linear(tokens, block.to_qkv.weight.flatten(1), block.to_qkv.bias)
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        y = F.linear(attended, block.proj.weight.flatten(1)).view(entered.buffer.shape)
        return Sum(y, block.proj.bias, entered.kept)

    def _causal(
        self, conv: CausalConv3d, x: Sum, stream: Stream, norm: RMSNorm | None = None, keep: bool = False
    ) -> tuple[Sum, Tensor | None]:
        """(Norm, SiLU and) a 3x3x3 convolution: its sum, and, if kept, x added up."""
        window = self.layout(conv.in_channels, conv.out_channels, x.shape[0])
        step = Step(window, None if norm is None else norm.gamma, silu=norm is not None, keep=keep)
        entered = enter(x, step, stream.past.get(conv))
        assert entered.past is not None
        stream.past[conv] = entered.past
        return Sum(self._convolve(conv, window, entered.buffer), conv.bias), entered.kept

    def _convolve(self, conv: CausalConv3d, window: Window, buffer: Tensor) -> Tensor | Products:
        match window.form:
            case "winograd":
                planes = self._laid_out(conv, window, lambda: winograd_taps(conv.weight))
                return Products(*(_images(part, plane) for part, plane in zip(buffer, planes, strict=True)))
            case "stacked":
                (stacked,) = self._laid_out(conv, window, lambda: (stack_taps(conv.weight),))
                return _images(buffer.flatten(3), stacked)
            case "volume":
                (volume,) = self._laid_out(conv, window, lambda: (_last(conv.weight),))
                y = F.conv3d(buffer.permute(3, 0, 1, 2).unsqueeze(0), volume, padding=(0, 1, 1))
                return y[0].permute(1, 2, 3, 0)

    def _laid_out(self, layer: nn.Module, form: object, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        if (layer, form) not in self._weights:
            self._weights[layer, form] = make()
        return self._weights[layer, form]


class FastDecoder(FastLayers):
    """Decode one clip: (1, z, T, h, w) -> (1, C, T', H, W), as ``Decoder`` does, stream and all. No gradients."""

    def __init__(self, decoder: Any, layout: Layout = layout) -> None:
        super().__init__(layout)
        self.decoder = decoder

    @torch.no_grad()
    def __call__(self, z: Tensor, stream: Stream) -> Tensor:
        assert z.shape[0] == 1
        frames = [self._chunk(part[0], stream) for part in self._parts(z, stream.at_start)]
        return frames[0] if len(frames) == 1 else torch.cat(frames, dim=2)

    def _parts(self, z: Tensor, at_start: bool) -> list[Tensor]:
        """The clip's first frame goes alone: it stays single where others double, so all later counts are even."""
        height, width = z.shape[3:]
        each = FRAMES * POSITIONS * height * width * self.decoder.conv_out.in_channels
        most = max(1, MOST_ELEMENTS // each)
        if not at_start or z.shape[2] == 1:
            return list(z.split(most, dim=2))
        return [z[:, :, :1], *z[:, :, 1:].split(most, dim=2)]

    def _chunk(self, z: Tensor, stream: Stream) -> Tensor:
        decoder = self.decoder
        x = Sum(z.permute(1, 2, 3, 0).contiguous())
        x, _ = self._causal(decoder.conv_in, x, stream)
        x = self._mid(decoder.mid_block, x, stream)
        *blocks, last = decoder.up_blocks
        for block in blocks:
            x = self._up(block, x, stream)
        video = [
            self._to_pixels(decoder.conv_out, decoder.norm_out, self._up(last, part, stream), stream)
            for part in (x.split(2) if self._goes_by_pairs(z) else [x])
        ]
        stream.at_start = False
        return (video[0] if len(video) == 1 else torch.cat(video, dim=1)).unsqueeze(0)

    def _goes_by_pairs(self, z: Tensor) -> bool:
        """:func:`goes_by_pairs`, of a chunk (C, T, h, w)."""
        copy_bytes = FRAMES * POSITIONS * z[0, 0].numel() * self.decoder.conv_out.in_channels * z.element_size()
        peak = PEAKS[isinstance(self.decoder.up_blocks[-1], ResidualUpBlock)]
        return goes_by_pairs(peak, copy_bytes, memory_of(z.device))

    def _up(self, block: UpBlock | ResidualUpBlock, x: Sum, stream: Stream) -> Sum:
        block_input: Tensor | None = None
        for resnet in _layers(block.resnets):
            x, entered = self._residual(resnet, x, stream)
            block_input = entered if block_input is None else block_input
        if isinstance(block, UpBlock):
            for upsampler in _layers(block.upsamplers):
                x = self._upsample(upsampler, x, stream)
            return x
        if block.upsampler is None or block.avg_shortcut is None:
            return x
        assert block_input is not None
        shortcut = Repeated(block_input, block.avg_shortcut.factor_t, block.avg_shortcut.repeats)
        return replace(self._upsample(block.upsampler, x, stream), residual=shortcut)

    def _upsample(self, block: Upsample, x: Sum, stream: Stream) -> Sum:
        conv = block.resample[1]
        assert isinstance(conv, nn.Conv2d)
        if block.time_conv is None or stream.at_start:
            images = added_up(x)
        else:
            images = self._double_frames(block.time_conv, x, stream)
        (weight,) = self._laid_out(conv, "folded", lambda: (fold_upsample(conv.weight),))
        return Sum(_images(images, weight).unflatten(3, (2, 2, conv.out_channels)), conv.bias)

    def _double_frames(self, conv: CausalConv3d, x: Sum, stream: Stream) -> Tensor:
        """(T, H, W, C) -> (2 T, H, W, C): a convolution over time alone is a matrix product of stacked frames."""
        frames, height, width, channels = x.shape
        entered = enter(x, Step(Window("stacked", conv.kernel_size[0] - 1)), stream.past.get(conv))
        assert entered.past is not None
        assert conv.bias is not None
        stream.past[conv] = entered.past
        stacked = entered.buffer.flatten(3).flatten(1, 2)
        (weights,) = self._laid_out(conv, "rows", lambda: (stack_taps(conv.weight).flatten(1),))
        doubled = stacked.new_empty(frames, 2, height * width, channels)
        # Frame by frame, since a product cannot leave gaps between rows for the frame in between.
        for frame in range(frames):
            for half, (weight, bias) in enumerate(zip(weights.chunk(2), conv.bias.chunk(2), strict=True)):
                torch.addmm(bias, stacked[frame], weight.t(), out=doubled[frame, half])
        return doubled.view(2 * frames, height, width, channels)

    def _to_pixels(self, conv: CausalConv3d, norm: RMSNorm, x: Sum, stream: Stream) -> Tensor:
        """Norm, SiLU and the convolution to few channels: (C, T, H, W)."""
        entered = enter(x, Step(POINT, norm.gamma, silu=True), None)
        (weight,) = self._laid_out(conv, "rows", lambda: (conv.weight.permute(2, 3, 4, 0, 1).flatten(0, 3),))
        frames, height, width, _ = x.shape
        products = torch.mm(weight, entered.buffer.flatten(0, 2).t()).view(-1, frames, height, width)
        past = stream.past.get(conv)
        assert conv.bias is not None
        video = gather_taps(products, past, conv.bias)
        latest = products if past is None else torch.cat((past, products[:, -2:]), dim=1)
        if latest.shape[1] == 1:
            latest = F.pad(latest, (0, 0, 0, 0, 1, 0))
        stream.past[conv] = latest[:, -2:].clone()
        return video


class FastEncoder(FastLayers):
    """Encode one clip: (1, C, T', H, W) -> (1, 2 z, T, h, w), as ``Encoder`` does, stream and all. No gradients."""

    def __init__(self, encoder: Any, layout: Layout = layout) -> None:
        super().__init__(layout)
        self.encoder = encoder

    @torch.no_grad()
    def __call__(self, video: Tensor, stream: Stream) -> Tensor:
        assert video.shape[0] == 1
        # The clip's first frame goes alone: it stays single where others are halved, so all later counts are even.
        parts = [video[:, :, :1], video[:, :, 1:]] if stream.at_start and video.shape[2] > 1 else [video]
        return torch.cat([self._chunk(part[0], stream) for part in parts], dim=2)

    def _chunk(self, video: Tensor, stream: Stream) -> Tensor:
        encoder = self.encoder
        x = Sum(video.permute(1, 2, 3, 0).contiguous())
        x, _ = self._causal(encoder.conv_in, x, stream)
        for block in encoder.down_blocks:
            x = self._down(block, x, stream)
        x = self._mid(encoder.mid_block, x, stream)
        x, _ = self._causal(encoder.conv_out, x, stream, encoder.norm_out)
        stream.at_start = False
        return added_up(x).permute(3, 0, 1, 2).unsqueeze(0)

    def _down(self, block: ResidualBlock | Downsample | ResidualDownBlock, x: Sum, stream: Stream) -> Sum:
        if isinstance(block, ResidualBlock):
            return self._residual(block, x, stream)[0]
        if isinstance(block, Downsample):
            return self._downsample(block, x, stream)
        block_input = added_up(x)
        x = Sum(block_input)
        for resnet in _layers(block.resnets):
            x, _ = self._residual(resnet, x, stream)
        x = Sum(added_up(x)) if block.downsampler is None else self._downsample(block.downsampler, x, stream)
        shortcut = block.avg_shortcut(block_input.permute(3, 0, 1, 2).unsqueeze(0))
        return replace(x, residual=shortcut[0].permute(1, 2, 3, 0).contiguous())

    def _downsample(self, block: Downsample, x: Sum, stream: Stream) -> Sum:
        conv = block.resample[1]
        assert isinstance(conv, nn.Conv2d)
        padded = F.pad(added_up(x), (0, 0, 0, 1, 0, 1)).permute(0, 3, 1, 2)
        x = Sum(F.conv2d(padded, conv.weight, stride=2).permute(0, 2, 3, 1).contiguous(), conv.bias)
        return x if block.time_conv is None else self._halve_frames(block.time_conv, x, stream)

    def _halve_frames(self, conv: Conv3d, x: Sum, stream: Stream) -> Sum:
        """(2 T, H, W, C) -> (T, H, W, C): a convolution over time alone is a matrix product of stacked frames."""
        frames = added_up(x)
        past, stream.past[conv] = stream.past.get(conv), frames[-1:].clone()
        if past is None:
            return Sum(frames)  # the clip's first, which stays as it is
        stacked = torch.cat((past, frames)).unfold(0, 3, 2).transpose(3, 4).flatten(3)
        (weight,) = self._laid_out(conv, "rows", lambda: (stack_taps(conv.weight).flatten(1),))
        return Sum(F.linear(stacked, weight), conv.bias)


def added_up(x: Sum) -> Tensor:
    """(T, H, W, C)."""
    return enter(x, Step(POINT), None).buffer


def _layers(modules: nn.ModuleList) -> Iterator[Any]:
    """As their own types, which ModuleList forgets."""
    return iter(modules)


def _images(x: Tensor, weight: Tensor) -> Tensor:
    """A 2D convolution, padded by 1, of (N, H, W, C)."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight, padding=1).permute(0, 2, 3, 1)


def _last(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last_3d)
