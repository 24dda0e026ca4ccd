"""Four scales without a hierarchical encoder: resampled vanilla tokens (an ablation)."""

# B batch, S vanilla tokens, C channels of one scale

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from focus.config import HierarchicalConfig


class VanillaPyramid(nn.Module):
    """X'_L -> res2..res5: LayerNorm, one Linear per scale, bilinear resampling to its grid."""

    def __init__(self, config: HierarchicalConfig, in_dim: int) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(in_dim, eps=1e-6)
        self.scales = nn.ModuleList(nn.Linear(in_dim, dim) for dim in config.dims)

    def forward(self, x_low: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """x_low [B, S, in_dim], S = rows * columns of `grid` -> four maps, finest first."""
        normed = self.norm(x_low)
        height, width = self.config.image_size
        maps = []
        for index, scale in enumerate(self.scales):
            flat = scale(normed).transpose(1, 2).unflatten(2, grid)
            size = (height >> (2 + index), width >> (2 + index))
            maps.append(F.interpolate(flat, size=size, mode="bilinear", align_corners=False))
        return maps
