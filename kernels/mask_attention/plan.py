"""Classes of a mask: cells that share their mask values share everything but their position.

Axes: B batch, L = Hk * Wk cells, M mask channels, C classes, S soft cells (padded).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_CLASSES = 16


@dataclass(frozen=True)
class MaskClass:
    """One distinct mask vector and the cells that carry it.

    `indicator` [B, rows, columns] counts tokens per cell of the occupied rectangle; `row_bias`
    [B, rows] and `column_bias` [B, columns] are 0 where occupied and -inf elsewhere, or None when
    nothing is to be excluded. `rows` and `columns` cut the rectangle out of the tables.
    """

    indicator: Tensor
    rows: slice
    columns: slice
    row_bias: Tensor | None
    column_bias: Tensor | None


@dataclass(frozen=True)
class Plan:
    """How a batch of masks is evaluated: class by class, the rest token by token.

    `values` [C, M]; `soft` [B, S] cell indices with `soft_valid` [B, S]; `owner` [B, L] the class
    of each cell, -1 where soft.
    """

    values: Tensor
    classes: tuple[MaskClass, ...]
    soft: Tensor
    soft_valid: Tensor
    owner: Tensor


def distinct(cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return distinct rows of [T, M], their ids per token [T], and counts, frequent ones first."""
    ids = torch.zeros(cells.shape[0], dtype=torch.int64, device=cells.device)
    for channel in cells.unbind(1):
        _, level = torch.unique(channel, return_inverse=True)
        _, ids = torch.unique(ids * (int(level.max()) + 1) + level, return_inverse=True)
    counts = torch.bincount(ids)
    order = torch.argsort(counts, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device)
    first = torch.full_like(order, cells.shape[0])
    first.scatter_reduce_(0, ids, torch.arange(ids.numel(), device=ids.device), "amin")
    return cells[first[order]], rank[ids], counts[order]


def least_members(rows: int, columns: int, dim: int) -> float:
    """Return how many cells a class needs before a table beats a dense loop over its cells.

    Per query and head: a class costs dim (rows + columns) + 2 rows columns multiplications and
    rows + columns exponentials; a cell costs 2 dim and one. An exponential weighs about 16.
    """
    table = dim * (rows + columns) + 2.0 * rows * columns + 16.0 * (rows + columns)
    return table / (2.0 * dim + 16.0)


def make_plan(mask: Tensor, dim: int, rope: bool) -> Plan:
    """Group the cells of a mask [B, M, Hk, Wk]. Reads values, so it synchronises on a device."""
    batch, channels, rows, columns = mask.shape
    cells = mask.permute(0, 2, 3, 1).reshape(-1, channels)
    values, owner, counts = distinct(cells)
    if rope:
        needed = least_members(rows, columns, dim) * batch
        keep = int((counts[:MAX_CLASSES] >= needed).sum())
    else:
        keep = min(values.shape[0], MAX_CLASSES)  # without positions a class is its count
    owner = torch.where(owner < keep, owner, -1).reshape(batch, rows * columns)
    maker = _rope_class if rope else _flat_class
    made = tuple(maker(owner == c, rows, columns, mask.dtype) for c in range(keep))
    soft, valid = _soft(owner)
    return Plan(values=values[:keep], classes=made, soft=soft, soft_valid=valid, owner=owner)


def _soft(owner: Tensor) -> tuple[Tensor, Tensor]:
    """Return padded indices of the cells without a class, and which of them are real."""
    soft = owner < 0
    longest = int(soft.sum(1).max()) if owner.numel() else 0
    index = torch.argsort(soft.to(torch.int8), dim=1, descending=True, stable=True)[:, :longest]
    return index, soft.gather(1, index)


def _flat_class(member: Tensor, rows: int, columns: int, dtype: torch.dtype) -> MaskClass:
    """Make a class without positions: one cell that counts its members."""
    del rows, columns
    count = member.sum(1).to(dtype)[:, None, None]
    bias = _bias(count[:, 0] > 0, dtype)
    return MaskClass(count, slice(0, 1), slice(0, 1), bias, None)


def _rope_class(member: Tensor, rows: int, columns: int, dtype: torch.dtype) -> MaskClass:
    """Make a class on the grid, cut to the rectangle that it occupies in any row of the batch."""
    cells = member.reshape(-1, rows, columns)
    by_row, by_column = cells.any(2), cells.any(1)
    y, x = _range(by_row.any(0)), _range(by_column.any(0))
    return MaskClass(
        cells[:, y, x].to(dtype), y, x, _bias(by_row[:, y], dtype), _bias(by_column[:, x], dtype)
    )


def _range(occupied: Tensor) -> slice:
    index = occupied.nonzero()
    return slice(int(index[0]), int(index[-1]) + 1)


def _bias(occupied: Tensor, dtype: torch.dtype) -> Tensor | None:
    if bool(occupied.all()):
        return None
    return torch.zeros_like(occupied, dtype=dtype).masked_fill_(~occupied, float("-inf"))
