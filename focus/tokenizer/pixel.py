"""Pixel branch of the tokenizer: MoVQ encoder and decoder (ILLUME+ variant).

Differences from the published MoVQ, all with the same function or better conditioning:
the code map is modulated at its own size and then enlarged (a 1x1 convolution and nearest resizing
commute), and spatial norms start as plain group norms (scale 1, shift 0 plus what the codes add).
"""

# B batch, H W picture, h w code grid, C channels, d code width, Z merged code channels

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focus.config import PixelConfig
from focus.errors import ShapeError


class CodeNorm(nn.Module):
    """GroupNorm, or with codes SpatialNorm: GN(x) * y(z) + b(z), z resized to x by nearest."""

    def __init__(self, channels: int, groups: int, code_channels: int | None) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.modulate: nn.Conv2d | None = None
        if code_channels is not None:
            self.modulate = nn.Conv2d(code_channels, 2 * channels, kernel_size=1)
            nn.init.ones_(self.modulate.bias[:channels])  # type: ignore[index]
            nn.init.zeros_(self.modulate.bias[channels:])  # type: ignore[index]

    def forward(self, x: Tensor, codes: Tensor | None) -> Tensor:
        """x [B, C, *, *], codes [B, Z, h, w] or None -> like x."""
        x = self.norm(x)
        if self.modulate is None:
            return x
        scale, shift = self.modulate(codes).chunk(2, dim=1)
        if scale.shape[-2:] != x.shape[-2:]:
            scale = F.interpolate(scale, size=x.shape[-2:], mode="nearest")
            shift = F.interpolate(shift, size=x.shape[-2:], mode="nearest")
        return torch.addcmul(shift.to(x.dtype), x, scale.to(x.dtype))


class ResBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x))))))."""

    def __init__(self, channels: int, out: int, groups: int, code_channels: int | None) -> None:
        super().__init__()
        self.norm1 = CodeNorm(channels, groups, code_channels)
        self.conv1 = nn.Conv2d(channels, out, kernel_size=3, padding=1)
        self.norm2 = CodeNorm(out, groups, code_channels)
        self.conv2 = nn.Conv2d(out, out, kernel_size=3, padding=1)
        self.shortcut = nn.Conv2d(channels, out, kernel_size=1) if channels != out else None

    def forward(self, x: Tensor, codes: Tensor | None) -> Tensor:
        """x [B, C, *, *] -> [B, out, *, *]."""
        h = self.conv1(F.silu(self.norm1(x, codes)))
        h = self.conv2(F.silu(self.norm2(h, codes)))
        out: Tensor = h + (x if self.shortcut is None else self.shortcut(x))
        return out


class AttentionBlock(nn.Module):
    """x + single-head self-attention over all positions of norm(x)."""

    def __init__(self, channels: int, groups: int, code_channels: int | None) -> None:
        super().__init__()
        self.norm = CodeNorm(channels, groups, code_channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, kernel_size=1)
        self.project = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor, codes: Tensor | None) -> Tensor:
        """x [B, C, *, *] -> like x."""
        q, k, v = self.qkv(self.norm(x, codes)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        project: Tensor = self.project(out.transpose(1, 2).reshape(x.shape))
        return x + project


class Down(nn.Module):
    """Halve both sides.

    residual: pixel-unshuffle of a convolution to C / 4 channels, plus a 2x2 mean of x. Otherwise a
    convolution of stride 2, padded below and to the right.
    """

    def __init__(self, channels: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        if residual:
            self.conv = nn.Conv2d(channels, channels // 4, kernel_size=3, padding=1)
        else:
            self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, 2h, 2w] -> [B, C, h, w]."""
        if self.residual:
            return F.pixel_unshuffle(self.conv(x), 2) + F.avg_pool2d(x, 2)
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Up(nn.Module):
    """Double both sides.

    residual: pixel-shuffle of a convolution to 4 C channels, plus x enlarged by nearest. Otherwise
    a convolution of x enlarged by nearest.
    """

    def __init__(self, channels: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        out = 4 * channels if residual else channels
        self.conv = nn.Conv2d(channels, out, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C, 2h, 2w]."""
        larger = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.residual:
            return F.pixel_shuffle(self.conv(x), 2) + larger
        out: Tensor = self.conv(larger)
        return out


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where the config says so."""

    def __init__(
        self,
        channels: int,
        out: int,
        num_blocks: int,
        attention: bool,
        groups: int,
        code_channels: int | None,
    ) -> None:
        super().__init__()
        widths = [channels] + [out] * (num_blocks - 1)
        self.blocks = nn.ModuleList(ResBlock(c, out, groups, code_channels) for c in widths)
        self.attentions = nn.ModuleList(
            AttentionBlock(out, groups, code_channels)
            for _ in range(num_blocks if attention else 0)
        )

    def forward(self, x: Tensor, codes: Tensor | None) -> Tensor:
        """x [B, C, *, *] -> [B, out, *, *]."""
        for index, block in enumerate(self.blocks):
            x = block(x, codes)
            if self.attentions:
                x = self.attentions[index](x, codes)
        return x


class Middle(nn.Module):
    """ResBlock, attention, ResBlock at the lowest resolution."""

    def __init__(self, channels: int, groups: int, code_channels: int | None) -> None:
        super().__init__()
        self.block1 = ResBlock(channels, channels, groups, code_channels)
        self.attention = AttentionBlock(channels, groups, code_channels)
        self.block2 = ResBlock(channels, channels, groups, code_channels)

    def forward(self, x: Tensor, codes: Tensor | None) -> Tensor:
        """x [B, C, h, w] -> like x."""
        x = self.attention(self.block1(x, codes), codes)
        out: Tensor = self.block2(x, codes)
        return out


def _check_shortcut(name: str, wide: int, narrow: int) -> None:
    if wide % narrow:
        raise ShapeError(
            f"pixel {name}: {wide} channels at the lowest level must be a multiple of {narrow} "
            "for residual_sampling; change channels or codebook.dim, or switch it off"
        )


class PixelEncoder(nn.Module):
    """Picture -> continuous code map X_T, one d-vector per 2^(levels - 1) pixels each way."""

    def __init__(self, config: PixelConfig) -> None:
        super().__init__()
        self.config = config
        groups, widths = (
            config.norm_groups,
            [config.encoder_channels * m for m in config.multipliers],
        )
        last = len(widths) - 1
        self.input = nn.Conv2d(3, config.encoder_channels, kernel_size=3, padding=1)
        self.levels = nn.ModuleList(
            Level(before, width, config.num_blocks, i in config.attention_levels, groups, None)
            for i, (before, width) in enumerate(
                zip([config.encoder_channels, *widths], widths, strict=False)
            )
        )
        self.downs = nn.ModuleList(Down(width, config.residual_sampling) for width in widths[:last])
        self.middle = Middle(widths[last], groups, None)
        self.norm = CodeNorm(widths[last], groups, None)
        self.out = nn.Conv2d(widths[last], config.codebook.dim, kernel_size=3, padding=1)
        if config.residual_sampling:
            _check_shortcut("encoder", widths[last], config.codebook.dim)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W], RGB in [0, 1] -> [B, d, H / stride, W / stride].

        Raises ShapeError when H or W is no multiple of the stride.
        """
        stride = self.config.stride
        if images.ndim != 4 or images.shape[1] != 3:
            raise ShapeError(f"images must be [B, 3, H, W], got {tuple(images.shape)}")
        if images.shape[2] % stride or images.shape[3] % stride:
            raise ShapeError(
                f"picture sides must be multiples of {stride} pixels, got "
                f"{images.shape[2]} x {images.shape[3]}; letterbox the picture first"
            )
        x = self.input((images * 2.0 - 1.0).contiguous(memory_format=torch.channels_last))
        for index, level in enumerate(self.levels):
            x = level(x, None)
            if index < len(self.downs):
                x = self.downs[index](x)
        x = F.silu(self.norm(self.middle(x, None), None))
        out: Tensor = self.out(x)
        if self.config.residual_sampling:
            out = out + x.reshape(x.shape[0], self.config.codebook.dim, -1, *x.shape[2:]).mean(2)
        return out


class PixelDecoder(nn.Module):
    """Merged codes -> picture; every norm is modulated by the codes."""

    def __init__(self, config: PixelConfig, code_channels: int) -> None:
        super().__init__()
        self.config = config
        self.code_channels = code_channels
        groups, widths = (
            config.norm_groups,
            [config.decoder_channels * m for m in config.multipliers],
        )
        last = len(widths) - 1
        self.post_quantise = nn.Conv2d(code_channels, code_channels, kernel_size=1)
        self.input = nn.Conv2d(code_channels, widths[last], kernel_size=3, padding=1)
        self.middle = Middle(widths[last], groups, code_channels)
        self.levels = nn.ModuleList(
            Level(
                widths[min(i + 1, last)],
                widths[i],
                config.num_blocks + 1,
                i in config.attention_levels,
                groups,
                code_channels,
            )
            for i in reversed(range(last + 1))
        )
        self.ups = nn.ModuleList(
            Up(widths[i], config.residual_sampling) for i in reversed(range(1, last + 1))
        )
        self.norm = CodeNorm(widths[0], groups, code_channels)
        self.out = nn.Conv2d(widths[0], 3, kernel_size=3, padding=1)
        if config.residual_sampling:
            _check_shortcut("decoder", widths[last], code_channels)

    def forward(self, codes: Tensor) -> Tensor:
        """codes [B, Z, h, w] -> picture [B, 3, H, W] on the [0, 1] scale, not clamped.

        Raises ShapeError when Z is not `code_channels`.
        """
        if codes.ndim != 4 or codes.shape[1] != self.code_channels:
            raise ShapeError(
                f"codes must be [B, {self.code_channels}, h, w], got {tuple(codes.shape)}"
            )
        codes = codes.contiguous(memory_format=torch.channels_last)
        z = self.post_quantise(codes)
        x = self.input(z)
        if self.config.residual_sampling:
            x = x + z.repeat_interleave(x.shape[1] // z.shape[1], dim=1)
        x = self.middle(x, codes)
        for index, level in enumerate(self.levels):
            x = level(x, codes)
            if index < len(self.ups):
                x = self.ups[index](x)
        out: Tensor = self.out(F.silu(self.norm(x, codes)))
        return out * 0.5 + 0.5
