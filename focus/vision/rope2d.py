"""Rotary position embedding over two axes, in the layout of Qwen2-VL's vision tower.

A head of D dims holds D/4 frequencies; the angles of one token are
[row * f, column * f, row * f, column * f], and dim i is rotated together with dim i + D/2.
"""

# B batch, S tokens, H heads, D head width

from __future__ import annotations

import torch
from torch import Tensor

from focus.errors import ShapeError

Table = tuple[Tensor, Tensor]


def axial_table(rows: Tensor, columns: Tensor, head_dim: int, theta: float = 10_000.0) -> Table:
    """Return cos and sin of every token's angles.

    rows, columns: [S] positions, in any unit. Returns two fp32 tensors [S, D].
    Raises ShapeError when `head_dim` is no multiple of 4.
    """
    if head_dim % 4:
        raise ShapeError(
            f"2-D rotary embedding needs a head width that is a multiple of 4, got {head_dim}; "
            "change dim or num_heads"
        )
    half = head_dim // 2
    exponent = torch.arange(0, half, 2, dtype=torch.float32, device=rows.device) / half
    frequency = 1.0 / (theta**exponent)
    angle = torch.cat([rows.float()[:, None] * frequency, columns.float()[:, None] * frequency], -1)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def grid_positions(
    grid: tuple[int, int], device: torch.device, extent: tuple[float, float] | None = None
) -> Table:
    """Return the row and the column of every cell, row-major.

    Without `extent` these are the integers (row, column). With it they are cell centres on a
    canvas of that size: ((i + 0.5) * extent / grid), so that two grids share one frame.
    """
    rows = torch.arange(grid[0], device=device, dtype=torch.float32)
    columns = torch.arange(grid[1], device=device, dtype=torch.float32)
    if extent is not None:
        rows = (rows + 0.5) * (extent[0] / grid[0])
        columns = (columns + 0.5) * (extent[1] / grid[1])
    y = rows[:, None].expand(grid).reshape(-1)
    x = columns[None, :].expand(grid).reshape(-1)
    return y, x


def rotate(x: Tensor, table: Table) -> Tensor:
    """Rotate x [B, S, H, D] by a table of [S, D], in fp32 or wider; returns the dtype of x."""
    cos, sin = table[0][:, None, :], table[1][:, None, :]
    value = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = value.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (value * cos + turned * sin).to(x.dtype)
