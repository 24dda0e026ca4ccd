"""Rotary positions of cells on a grid: where a cell is, and how its vectors turn."""

from __future__ import annotations

import torch
from torch import Tensor

Size = tuple[int, int]


def cell_centres(grid: Size, extent: Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the (y, x) centres of a row-major grid of cells laid over `extent` pixels, [H*W, 2].

    y_i = (i + 1/2) * extent_h / grid_h, x likewise.
    """
    axes = [
        (torch.arange(cells, device=device, dtype=dtype) + 0.5) * (length / cells)
        for cells, length in zip(grid, extent, strict=True)
    ]
    return torch.stack(torch.meshgrid(axes[0], axes[1], indexing="ij"), -1).reshape(-1, 2)


def frequencies(width: int, theta: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return theta ** (-2i / width) for i < width / 2: the rotary frequencies of one half-head."""
    steps = torch.arange(width // 2, device=device, dtype=dtype)
    return theta ** (-2.0 * steps / width)


def rotate(vectors: Tensor, angle: Tensor) -> Tensor:
    """Rotate interleaved pairs (2i, 2i+1) of the last dim by `angle` [..., width / 2].

    A pair is a complex number, so this is one multiplication; fp32 or fp64.
    """
    paired = vectors.reshape(*vectors.shape[:-1], vectors.shape[-1] // 2, 2)
    pairs = torch.view_as_complex(paired.contiguous())
    turn = torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(pairs * turn).flatten(-2)


def rotate_axial(vectors: Tensor, centres: Tensor, theta: float) -> Tensor:
    """Apply 2-D axial RoPE: the first half of the last dim turns with x, the second with y.

    `vectors` [..., L, D], `centres` [L, 2] as (y, x).
    """
    half = vectors.shape[-1] // 2
    turn = frequencies(half, theta, centres.device, centres.dtype)
    angle_x = (centres[:, 1:] * turn).to(vectors.dtype)
    angle_y = (centres[:, :1] * turn).to(vectors.dtype)
    return torch.cat(
        (rotate(vectors[..., :half], angle_x), rotate(vectors[..., half:], angle_y)), -1
    )


def axis_angles(
    cells: int, length: int, width: int, theta: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return the angles [cells, width / 2] of cell centres along one axis, computed in fp64."""
    at = (torch.arange(cells, device=device, dtype=torch.float64) + 0.5) * (length / cells)
    turn = frequencies(width, theta, device, torch.float64)
    return (at[:, None] * turn).to(dtype)
