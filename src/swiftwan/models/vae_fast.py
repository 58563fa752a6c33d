"""The VAE's decoder for GPUs: the layers of ``Decoder``, channels last, with one kernel between two convolutions.

Three things make it fast; each is exact but for rounding.

- Convolutions read channels-last frames, some as 3D ones and some as 2D ones over stacked frames, whichever was
  measured to be faster (``layout``).
- Everything between two convolutions is one kernel, which writes straight into the next one's input, past frames
  in front (``swiftwan.ops.vae_between``).
- A nearest upsampling and the 3x3 convolution behind it are a 2x2 convolution of the small image: 2.25 times less.

It takes no weights of its own and keeps no state: weights are laid out anew for each clip (a copy of the decoder's,
0.15 GB for Wan2.1 in bfloat16, for as long as the clip runs), so a changed model cannot be decoded with old weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftwan.models.vae_blocks import (
    Attention,
    CausalConv3d,
    MidBlock,
    ResidualBlock,
    ResidualUpBlock,
    RMSNorm,
    Stream,
    UpBlock,
    Upsample,
)
from swiftwan.ops.vae_between import Repeated, Step, Sum, Window, enter, fold_upsample, gather_taps, stack_taps

Layout = Callable[[int, int, int], int]
"""(channels in, channels out, frames) -> the ``group`` of a :class:`Window` for a 3x3x3 convolution."""

DENSE = Window(group=1, reach=0)


def layout(in_dim: int, out_dim: int, frames: int) -> int:
    """What was fastest on an H200 in bfloat16 (benchmarks/h200_vae.py components)."""
    return 0 if in_dim > 128 else 1


class FastDecoder:
    """Decode one clip: (1, z, T, h, w) -> (1, C, T', H, W), as ``Decoder`` does, stream and all. No gradients."""

    def __init__(self, decoder: nn.Module, layout: Layout = layout) -> None:
        self.decoder, self.layout = decoder, layout
        self._weights: dict[tuple[nn.Module, int], Tensor] = {}

    @torch.no_grad()
    def __call__(self, z: Tensor, stream: Stream) -> Tensor:
        assert z.shape[0] == 1
        # The clip's first frame goes alone: it stays single where others double, so all later counts are even.
        parts = [z[:, :, :1], z[:, :, 1:]] if stream.at_start and z.shape[2] > 1 else [z]
        frames = [self._chunk(part[0], stream) for part in parts]
        return frames[0] if len(frames) == 1 else torch.cat(frames, dim=2)

    def _chunk(self, z: Tensor, stream: Stream) -> Tensor:
        decoder = self.decoder
        x = Sum(z.permute(1, 2, 3, 0).unsqueeze(3).contiguous())
        x, _ = self._causal(decoder.conv_in, x, stream)
        x = self._mid(decoder.mid_block, x, stream)
        for block in decoder.up_blocks:
            x = self._up(block, x, stream)
        video = self._to_pixels(decoder.conv_out, decoder.norm_out, x, stream)
        stream.at_start = False
        return video.unsqueeze(0)

    # Blocks

    def _mid(self, block: MidBlock, x: Sum, stream: Stream) -> Sum:
        first, second = block.resnets
        (attention,) = block.attentions
        x, _ = self._residual(first, x, stream)
        x = self._attention(attention, x)
        x, _ = self._residual(second, x, stream)
        return x

    def _up(self, block: UpBlock | ResidualUpBlock, x: Sum, stream: Stream) -> Sum:
        block_input: Tensor | None = None
        for resnet in block.resnets:
            x, entered = self._residual(resnet, x, stream)
            block_input = entered if block_input is None else block_input
        if isinstance(block, UpBlock):
            for upsampler in block.upsamplers:
                x = self._upsample(upsampler, x, stream)
            return x
        if block.upsampler is None or block.avg_shortcut is None:
            return x
        assert block_input is not None
        shortcut = Repeated(block_input, block.avg_shortcut.factor_t, block.avg_shortcut.repeats)
        return replace(self._upsample(block.upsampler, x, stream), residual=shortcut)

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
        entered = enter(x, Step(DENSE, block.norm.gamma, keep=True), None)
        tokens = entered.buffer.flatten(1, 3)  # (T, H W, C)
        qkv = F.linear(tokens, block.to_qkv.weight.flatten(1), block.to_qkv.bias)
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        y = F.linear(attended, block.proj.weight.flatten(1)).view(entered.buffer.shape)
        return Sum(y, block.proj.bias, entered.kept)

    def _upsample(self, block: Upsample, x: Sum, stream: Stream) -> Sum:
        conv = block.resample[1]
        assert isinstance(conv, nn.Conv2d)
        if block.time_conv is None or stream.at_start:
            images = enter(x, Step(DENSE), None).buffer.squeeze(3)
        else:
            images = self._double_frames(block.time_conv, x, stream)
        weight = self._laid_out(conv, 2, lambda: fold_upsample(conv.weight))
        y = F.conv2d(images.permute(0, 3, 1, 2), weight, padding=1).permute(0, 2, 3, 1)
        return Sum(y.unflatten(3, (2, 2, conv.out_channels)), conv.bias)

    def _double_frames(self, conv: CausalConv3d, x: Sum, stream: Stream) -> Tensor:
        """(T, H, W, C) -> (2 T, H, W, C): a convolution over time alone is a matrix product of stacked frames."""
        frames, height, width, channels = x.shape
        entered = enter(x, Step(Window(1, conv.kernel_size[0] - 1)), stream.past.get(conv))
        assert entered.past is not None and conv.bias is not None
        stream.past[conv] = entered.past
        stacked = entered.buffer.flatten(3).flatten(1, 2)
        halves = self._laid_out(conv, 1, lambda: stack_taps(conv.weight, 1)).flatten(1).chunk(2)
        doubled = x.y.new_empty(frames, 2, height * width, channels)
        # Frame by frame, since a product cannot leave gaps between rows for the frame in between.
        for frame in range(frames):
            for half, (weight, bias) in enumerate(zip(halves, conv.bias.chunk(2), strict=True)):
                torch.addmm(bias, stacked[frame], weight.t(), out=doubled[frame, half])
        return doubled.view(2 * frames, height, width, channels)

    # Convolutions

    def _causal(
        self, conv: CausalConv3d, x: Sum, stream: Stream, norm: RMSNorm | None = None, keep: bool = False
    ) -> tuple[Sum, Tensor | None]:
        """(Norm, SiLU and) a 3x3x3 convolution: its sum, and, if kept, x added up."""
        group = self.layout(conv.in_channels, conv.out_channels, x.shape[0])
        window = Window(group, conv.kernel_size[0] - 1)
        step = Step(window, None if norm is None else norm.gamma, silu=norm is not None, keep=keep)
        entered = enter(x, step, stream.past.get(conv))
        assert entered.past is not None
        stream.past[conv] = entered.past
        weight = self._laid_out(conv, group, lambda: _taps(conv.weight, group))
        if group == 0:
            y = F.conv3d(entered.buffer.permute(3, 0, 1, 2).unsqueeze(0), weight, padding=(0, 1, 1))
            return Sum(y[0].permute(1, 2, 3, 0).unsqueeze(3), conv.bias), entered.kept
        y = F.conv2d(entered.buffer.flatten(3).permute(0, 3, 1, 2), weight, padding=1)
        return Sum(y.permute(0, 2, 3, 1).unflatten(3, (group, -1)), conv.bias), entered.kept

    def _to_pixels(self, conv: CausalConv3d, norm: RMSNorm, x: Sum, stream: Stream) -> Tensor:
        """Norm, SiLU and the convolution to few channels: (C, T, H, W)."""
        entered = enter(x, Step(DENSE, norm.gamma, silu=True), None)
        weight = self._laid_out(conv, 0, lambda: conv.weight.permute(2, 3, 4, 0, 1).flatten(0, 3).contiguous())
        frames, height, width, _ = x.shape
        products = torch.mm(weight, entered.buffer.flatten(0, 3).t()).view(-1, frames, height, width)
        past = stream.past.get(conv)
        assert conv.bias is not None
        video = gather_taps(products, past, conv.bias)
        latest = products if past is None else torch.cat((past, products[:, -2:]), dim=1)
        if latest.shape[1] == 1:
            latest = F.pad(latest, (0, 0, 0, 0, 1, 0))
        stream.past[conv] = latest[:, -2:].clone()
        return video

    def _laid_out(self, layer: nn.Module, form: int, make: Callable[[], Tensor]) -> Tensor:
        if (layer, form) not in self._weights:
            self._weights[layer, form] = make()
        return self._weights[layer, form]


def _taps(weight: Tensor, group: int) -> Tensor:
    """The weight of a 3x3x3 convolution as :class:`Window`'s ``group`` has it."""
    return weight.contiguous(memory_format=torch.channels_last_3d) if group == 0 else stack_taps(weight, group)
