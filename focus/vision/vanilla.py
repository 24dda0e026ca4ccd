"""Vanilla encoder: Qwen2-VL's vision tower over still pictures, one picture per row (paper 3.1)."""

# B batch, H W picture, h w patch grid, S merged tokens, C channels, P patch size, M merge size

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focus.config import VanillaConfig
from focus.errors import CheckpointMismatch, ShapeError
from focus.vision.block import Block, GatedBlock, initialise
from focus.vision.rope2d import Table, axial_table, grid_positions

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class PatchMerger(nn.Module):
    """LayerNorm each patch, concatenate M x M of them, Linear, GELU, Linear."""

    def __init__(
        self, dim: int, merge_size: int, out_dim: int, norm_eps: float, rms: bool = False
    ) -> None:
        super().__init__()
        self.merged = dim * merge_size**2
        self.norm: nn.Module = (nn.RMSNorm if rms else nn.LayerNorm)(dim, eps=norm_eps)
        self.up = nn.Linear(self.merged, self.merged)
        self.down = nn.Linear(self.merged, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S * M * M, C], the patches of one merged token side by side -> [B, S, out_dim]."""
        x = self.norm(x).view(x.shape[0], -1, self.merged)
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out


class VanillaEncoder(nn.Module):
    """Vision transformer with 2-D rotary positions that merges 2x2 patches into one token.

    X_L [B, 3, H, W] -> X'_L [B, S, out_dim], S = H W / stride^2 in row-major order. The still
    picture fills every frame of the temporal patch. H and W may differ from the config's: the grid
    is that of the picture given. Equal to transformers' `Qwen2VisionTransformerPretrainedModel`
    with weights copied by `from_qwen2_vl`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: VanillaConfig) -> None:
        super().__init__()
        self.config = config
        pixels = 3 * config.temporal_patch_size * config.patch_size**2
        self.patch = nn.Linear(pixels, config.dim, bias=False)
        gated = config.family == "qwen2_5_vl"
        self.blocks = nn.ModuleList(
            GatedBlock(config.dim, config.num_heads, config.ffn_dim, config.norm_eps)
            if gated
            else Block(config.dim, config.num_heads, config.mlp_ratio, config.norm_eps)
            for _ in range(config.depth)
        )
        self.merger = PatchMerger(
            config.dim, config.merge_size, config.out_dim, config.norm_eps, rms=gated
        )
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD).view(3, 1, 1), persistent=False)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W], RGB in [0, 1] -> merged tokens [B, S, out_dim].

        Raises ShapeError when H or W is no multiple of the stride.
        """
        stride = self.config.stride
        if images.ndim != 4 or images.shape[1] != 3:
            raise ShapeError(f"images must be [B, 3, H, W], got {tuple(images.shape)}")
        height, width = images.shape[-2:]
        if height % stride or width % stride:
            fitting = tuple(max(1, side // stride) * stride for side in (height, width))
            raise ShapeError(
                f"picture sides must be multiples of {stride} pixels, got {height} x {width}; "
                f"resize to {fitting[0]} x {fitting[1]}"
            )
        normed = ((images - self.mean) / self.std).to(images.dtype)
        x = self.patch(self.patches(normed))
        table = self.table(height // stride, width // stride, images.device)
        windows = self.windows(height // stride, width // stride, images.device)
        for index, block in enumerate(self.blocks):
            x = block(x, table, None if index in self.config.full_blocks else windows)
        out: Tensor = self.merger(x)
        return out

    def patches(self, images: Tensor) -> Tensor:
        """Cut [B, 3, H, W] into flat patches [B, h * w, 3 * frames * P * P].

        Patches of one merged token lie side by side; values go channel, frame, row, column.
        """
        config = self.config
        patch, merge = config.patch_size, config.merge_size
        batch, _, height, width = images.shape
        rows, columns = height // config.stride, width // config.stride
        x = images.view(batch, 3, rows, merge, patch, columns, merge, patch)
        x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
        x = x.expand(-1, -1, -1, -1, -1, -1, config.temporal_patch_size, -1, -1)
        return x.reshape(batch, rows * columns * merge**2, self.patch.in_features)

    def windows(self, rows: int, columns: int, device: torch.device) -> Tensor | None:
        """Which patches share a window, [S * M * M] squared bool; None where all see all."""
        config = self.config
        side = config.window_size // config.stride
        if config.family == "qwen2_vl" or (rows <= side and columns <= side):
            return None
        y = torch.arange(rows, device=device)[:, None] // side
        x = torch.arange(columns, device=device) // side
        number = (y * columns + x).reshape(-1).repeat_interleave(config.merge_size**2)
        return number[:, None] == number

    def table(self, rows: int, columns: int, device: torch.device) -> Table:
        """Rotary table of `rows` x `columns` merged tokens, in the order of `patches`."""
        config, merge = self.config, self.config.merge_size
        y, x = grid_positions((rows * merge, columns * merge), device)
        blocked = [
            axis.view(rows, merge, columns, merge).transpose(1, 2).reshape(-1) for axis in (y, x)
        ]
        return axial_table(
            blocked[0], blocked[1], config.dim // config.num_heads, config.rope_theta
        )


def qwen2_vl_names(config: VanillaConfig) -> dict[str, str]:
    """Map every parameter name of `VanillaEncoder` to its name in Qwen2-VL's vision tower.

    With the family "qwen2_5_vl", in Qwen2.5-VL's.
    """
    names = {"patch.weight": "patch_embed.proj.weight"}
    parts = {
        "attention_norm": "norm1",
        "attention.qkv": "attn.qkv",
        "attention.project": "attn.proj",
        "mlp_norm": "norm2",
        "mlp.up": "mlp.fc1",
        "mlp.down": "mlp.fc2",
    }
    gated = config.family == "qwen2_5_vl"
    if gated:
        parts = {ours: theirs for ours, theirs in parts.items() if not ours.startswith("mlp.")}
        parts.update({f"mlp.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")})
    for layer in range(config.depth):
        for ours, theirs in parts.items():
            for kind in ("weight",) if gated and ours.endswith("_norm") else ("weight", "bias"):
                names[f"blocks.{layer}.{ours}.{kind}"] = f"blocks.{layer}.{theirs}.{kind}"
    for ours, theirs in {"norm": "ln_q", "up": "mlp.0", "down": "mlp.2"}.items():
        for kind in ("weight",) if gated and ours == "norm" else ("weight", "bias"):
            names[f"merger.{ours}.{kind}"] = f"merger.{theirs}.{kind}"
    return names


def from_qwen2_vl(config: VanillaConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn the state dict of a Qwen2-VL vision tower into one for `VanillaEncoder`.

    Keys may carry the prefix of a whole Qwen2-VL checkpoint ("visual." or "model.visual."); other
    keys of such a checkpoint are ignored. The Conv3d kernel becomes the weight of a Linear.
    Raises CheckpointMismatch when a tensor is missing or has another shape than the config's.
    """
    prefix = _tower_prefix(state)
    with torch.device("meta"):
        expected = VanillaEncoder(config).state_dict()
    names = qwen2_vl_names(config)
    missing = sorted(prefix + name for name in names.values() if prefix + name not in state)
    if missing:
        raise CheckpointMismatch(
            f"a Qwen2-VL vision tower of depth {config.depth} expected, {len(missing)} tensors are "
            f"missing, first {missing[:3]}; check vanilla.depth and the checkpoint"
        )
    converted: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        value = state[prefix + theirs]
        if ours == "patch.weight":
            value = value.reshape(value.shape[0], -1)
        if value.shape != expected[ours].shape:
            raise CheckpointMismatch(
                f"{prefix + theirs}: shape {tuple(expected[ours].shape)} expected, got "
                f"{tuple(value.shape)}; set the vanilla config to the checkpoint's sizes"
            )
        converted[ours] = value
    return converted


def _tower_prefix(state: Mapping[str, Tensor]) -> str:
    suffix = "patch_embed.proj.weight"
    found = [name for name in state if name.endswith(suffix)]
    if len(found) != 1:
        raise CheckpointMismatch(
            f"one tensor named *{suffix} expected, got {found}; give the state dict of one Qwen2-VL"
        )
    return found[0][: -len(suffix)]
