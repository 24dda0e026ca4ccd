"""Bicubic resizing as two small products: the same numbers, in operators that every runtime has."""

# n cells before, m cells after

from __future__ import annotations

import torch
from torch import Tensor

SHARPNESS = -0.75  # of the cubic kernel, as torch.nn.functional.interpolate has it


def resize_bicubic(x: Tensor, size: tuple[int, int]) -> Tensor:
    """x [B, C, h, w] -> [B, C, *size] in fp32: R_h x R_w^T.

    Equals `F.interpolate(mode="bicubic", align_corners=False)` up to rounding. A product instead of
    a resize, because TensorRT takes no cubic one and a graph of fixed sizes folds R to a constant.
    """
    with torch.autocast(x.device.type, enabled=False):
        rows = cubic_weights(x.shape[2], size[0], x.device)
        columns = cubic_weights(x.shape[3], size[1], x.device)
        return rows @ x.float() @ columns.transpose(0, 1)


def cubic_weights(before: int, after: int, device: torch.device) -> Tensor:
    """Return R [m, n]: how much of each cell before enters each cell after; rows sum to one.

    Cell i lies at p = (i + 1/2) n / m - 1/2 and reads the four cells around p with weights
    k(|p - j|), k the cubic convolution kernel (Keys, 1981); cells beyond the edge are the edge's.
    """
    a = SHARPNESS
    cells = torch.arange(before, device=device, dtype=torch.float32)
    steps = torch.arange(after, device=device, dtype=torch.float32)
    place = ((2.0 * steps + 1.0) * before - after) / (2.0 * after)
    first = place.floor()
    taps = first[:, None] + torch.arange(-1, 3, device=device, dtype=torch.float32)
    far = (place[:, None] - taps).abs()
    inside = ((a + 2.0) * far - (a + 3.0)) * far * far + 1.0
    outside = ((a * far - 5.0 * a) * far + 8.0 * a) * far - 4.0 * a
    weights = torch.where(far <= 1.0, inside, outside)
    read = torch.minimum(taps.relu(), cells[-1:])
    return ((read[:, :, None] == cells).float() * weights[:, :, None]).sum(1)
