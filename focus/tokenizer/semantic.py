"""Semantic branch of the tokenizer: transformer blocks on both sides of the semantic codes."""

# B batch, S semantic tokens, d code width

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focus.config import SemanticConfig
from focus.errors import ShapeError
from focus.vision.block import Block, initialise
from focus.vision.rope2d import axial_table, grid_positions

Grid = tuple[int, int]


class Tower(nn.Module):
    """Blocks with full attention and 2-D rotary positions on a grid of tokens."""

    def __init__(self, depth: int, dim: int, num_heads: int) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """x [B, S, dim] in row-major order -> [B, S, dim]."""
        if grid[0] * grid[1] != x.shape[1]:
            raise ShapeError(
                f"{grid[0]} x {grid[1]} semantic tokens expected, got {x.shape[1]}; "
                "pass the grid of this picture"
            )
        table = axial_table(*grid_positions(grid, x.device), self.head_dim)
        for block in self.blocks:
            x = block(x, table)
        return x


class SemanticBranch(nn.Module):
    """E' -> vectors to quantise, and codes -> the vanilla feature they stand for.

    encode: (Linear when the widths differ,) blocks, Linear to d.
    decode: Linear from d, blocks, Linear to the vanilla width, LayerNorm.
    """

    def __init__(self, config: SemanticConfig, in_dim: int, target_dim: int) -> None:
        super().__init__()
        width = config.codebook.dim
        self.input = nn.Linear(in_dim, config.dim) if in_dim != config.dim else nn.Identity()
        self.encoder = Tower(config.depth, config.dim, config.num_heads)
        self.to_code = nn.Linear(config.dim, width)
        self.from_code = nn.Linear(width, config.dim)
        self.decoder = Tower(config.depth, config.dim, config.num_heads)
        self.out = nn.Linear(config.dim, target_dim)
        self.norm = nn.LayerNorm(target_dim, eps=1e-6)
        initialise(self)

    def encode(self, e_prime: Tensor, grid: Grid) -> Tensor:
        """e_prime [B, S, in_dim] -> [B, S, d]. Raises ShapeError when grid is not of S cells."""
        vectors: Tensor = self.to_code(self.encoder(self.input(e_prime), grid))
        return vectors

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        """codes [B, S, d] -> [B, S, target_dim]. Raises ShapeError like `encode`."""
        feature: Tensor = self.norm(self.out(self.decoder(self.from_code(codes), grid)))
        return feature


def semantic_loss(decoded: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of 1 - cos(decoded, LN(target)), LN without scale and shift, in fp32.

    decoded, target [B, S, C]; no gradient reaches the target.
    """
    with torch.autocast(decoded.device.type, enabled=False):
        reference = F.layer_norm(target.detach().float(), target.shape[-1:], eps=1e-6)
        return (1.0 - F.cosine_similarity(decoded.float(), reference, dim=-1)).mean()
