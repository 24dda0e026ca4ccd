"""Fusion: vanilla tokens attend to hierarchical features (eq. 1-2)."""

# B batch, S vanilla tokens, L hierarchical tokens, H heads, D head width, C channels

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focus.config import SCALES, FusionConfig, HierarchicalConfig, VanillaConfig
from focus.errors import ShapeError
from focus.vision.block import initialise, output_norm
from focus.vision.rope2d import Table, axial_table, grid_positions, rotate

Grid = tuple[int, int]


class Fused(NamedTuple):
    """What the fusion hands on."""

    e_prime: Tensor  # [B, S, dim] E', what the semantic codes are made of
    e_img: Tensor  # [B, S, dim] E_img = MLP(E') + E'
    projected: Tensor  # [B, S, llm_dim] E_img as the language model reads it


class FusionAttention(nn.Module):
    """E' = CA(X'_L, X'_H), queries from the vanilla tokens, keys from the chosen scales (eq. 1).

    With p = P LN(X'_L): E' = p + W_o softmax(q k^T / sqrt(D)) v, W_o zero at the start;
    `residual=False` drops "p +" (eq. 1 to the letter). q and k are rotated by their place in the
    picture, measured in cells of the vanilla grid, so that both pictures share one frame.
    """

    def __init__(
        self, config: FusionConfig, vanilla: VanillaConfig, hierarchical: HierarchicalConfig
    ) -> None:
        super().__init__()
        if config.dim % config.num_heads:
            raise ShapeError(
                f"fusion.dim ({config.dim}) must be a multiple of fusion.num_heads "
                f"({config.num_heads}); change one of them"
            )
        self.config = config
        self.head_dim = config.dim // config.num_heads
        self.input_norm = nn.LayerNorm(vanilla.out_dim, eps=1e-6, elementwise_affine=False)
        self.input = nn.Linear(vanilla.out_dim, config.dim)
        if not config.scales:
            initialise(self)
            return
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.query = nn.Linear(config.dim, config.dim)
        self.key_value = nn.ModuleDict(
            {
                scale: nn.Linear(hierarchical.dim_of(scale), 2 * config.dim)
                for scale in config.scales
            }
        )
        self.out = nn.Linear(config.dim, config.dim)
        initialise(self)
        if config.residual:
            nn.init.zeros_(self.out.weight)

    def forward(self, x_low: Tensor, features: Sequence[Tensor], grid: Grid) -> Tensor:
        """x_low [B, S, C], four maps, grid of x_low -> E' [B, S, dim]."""
        batch, tokens, _ = x_low.shape
        entry: Tensor = self.input(self.input_norm(x_low))
        if not self.config.scales:
            return entry
        query = self.query(self.norm(entry)).view(batch, tokens, -1, self.head_dim)
        query = rotate(query, self._table(grid, grid, x_low.device))
        keys, values = self._keys_values(features, grid)
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        )
        attended: Tensor = self.out(out.transpose(1, 2).reshape(batch, tokens, -1))
        return entry + attended if self.config.residual else attended

    def _keys_values(self, features: Sequence[Tensor], grid: Grid) -> tuple[Tensor, Tensor]:
        keys, values = [], []
        for scale in self.config.scales:
            feature = features[SCALES.index(scale)]
            size = (feature.shape[-2], feature.shape[-1])
            flat = feature.flatten(2).transpose(1, 2)
            pair = self.key_value[scale](flat)
            key, value = pair.view(*pair.shape[:2], 2, -1, self.head_dim).unbind(2)
            keys.append(rotate(key, self._table(size, grid, feature.device)))
            values.append(value)
        if len(keys) == 1:
            return keys[0], values[0]
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)

    def _table(self, size: Grid, extent: Grid, device: torch.device) -> Table:
        rows, columns = grid_positions(size, device, extent)
        return axial_table(rows, columns, self.head_dim, self.config.rope_theta)


class FusionMLP(nn.Module):
    """E_img = MLP(E') + E' (eq. 2): Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, dim] -> MLP(x) + x."""
        out: Tensor = x + self.down(F.gelu(self.up(x)))
        return out


class Fusion(nn.Module):
    """Eq. 1-2 and the projection to the language model.

    `attention` makes E', from which the semantic codes are made: it trains in stage 1 and is frozen
    afterwards, or the codes would drift. `mlp` and `project` may train later.
    """

    def __init__(
        self,
        config: FusionConfig,
        vanilla: VanillaConfig,
        hierarchical: HierarchicalConfig,
        llm_dim: int,
        gain: float | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.grid = vanilla.grid
        self.attention = FusionAttention(config, vanilla, hierarchical)
        self.mlp = FusionMLP(config.dim, int(config.dim * config.mlp_ratio))
        self.project = nn.Linear(config.dim, llm_dim)
        initialise(self.project)
        self.out_norm = output_norm(llm_dim, gain)

    def forward(self, x_low: Tensor, features: Sequence[Tensor], grid: Grid | None = None) -> Fused:
        """x_low [B, S, out_dim], four maps res2..res5 -> `Fused`.

        `grid` is the (rows, columns) of x_low when the picture is not of the config's size.
        Raises ShapeError when rows * columns is not S, or when there are not four maps.
        """
        rows, columns = grid if grid is not None else self.grid
        if rows * columns != x_low.shape[1]:
            raise ShapeError(
                f"{rows} x {columns} vanilla tokens expected, got {x_low.shape[1]}; "
                "pass grid=(rows, columns) of the picture"
            )
        if len(features) != len(SCALES):
            raise ShapeError(f"the four maps {SCALES} expected, got {len(features)}")
        e_prime = self.attention(x_low, features, (rows, columns))
        e_img = self.mlp(e_prime)
        return Fused(e_prime, e_img, self.out_norm(self.project(e_img)))
