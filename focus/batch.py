"""What the model eats: one task-homogeneous micro-batch of sequences, pictures and targets.

The sequence is described position by position, so that one embedding routine serves every task:
`source` says where the embedding of a position comes from, `grid` where a visual token lies in its
picture, `condition` which candidate (class, expression or region) a text position belongs to.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# B batch, T sequence, R regions, P points, N masks, H W picture


class Source(IntEnum):
    """Where the input embedding of a sequence position comes from."""

    TOKEN = 0  # row `input_ids` of the token table
    SEMANTIC = 1  # next row of E_img (eq. 2), projected
    PIXEL = 2  # next row of X_T, the continuous pixel-encoder output, projected
    ADAPTER = 3  # next row of h_Adapter (eq. 4)
    MASK_QUERY = 4  # next learned mask query
    REGION = 5  # next pooled region vector


IGNORE = -100  # label of a position that carries no loss


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """One picture per row at the three resolutions of the encoders, RGB in [0, 1]."""

    vanilla: Tensor  # [B, 3, h, w]
    hierarchical: Tensor  # [B, 3, h, w]
    pixel: Tensor  # [B, 3, h, w]

    def pin_memory(self) -> Pictures:
        """Copy to page-locked memory; torch's DataLoader calls it."""
        return pin(self)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch; every row has the same task."""

    task: str
    input_ids: Tensor  # [B, T] int64, right-padded
    labels: Tensor  # [B, T] int64, shifted: labels[t] is the id that follows t, or IGNORE
    source: Tensor  # [B, T] uint8, `Source`
    grid: Tensor  # [B, T, 3] int16: level (0 semantic, 1 pixel), row, column; -1 where not visual
    condition: Tensor  # [B, T] int16: candidate number whose tokens these are, -1 elsewhere
    lengths: Tensor  # [B] int64
    pictures: Pictures | None = None  # None: the sequences hold no input picture
    region_points: Tensor | None = None  # [B, R, P, 2] x, y in [0, 1] of the letterboxed picture
    num_regions: Tensor | None = None  # [B]
    region_vectors: Tensor | None = None  # [B, R, D] ready vectors instead of points (video)
    masks: Tensor | None = None  # [B, N, H, W] bool, in the frame of pictures.hierarchical
    mask_labels: Tensor | None = None  # [B, N] int64 candidate number of each mask, -1 padding
    mask_objects: Tensor | None = None  # [B, N] int64 object of each mask, one number in all frames
    num_conditions: Tensor | None = None  # [B]
    target: Pictures | None = None  # picture to generate: vanilla and hierarchical give its codes
    edit_mask: Tensor | None = None  # [B, H, W] bool, region that the edit changes
    blank: Tensor | None = None  # [B, T] bool: codes hidden from what follows them, labels stay
    places: Tensor | None = None  # [B, 2] row and first position in packed rows of the trunk

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """Move every tensor; `dtype` converts floating tensors only."""
        return move(self, device, dtype)

    def pin_memory(self) -> Batch:
        """Copy to page-locked memory, so that `to` need not wait; torch's DataLoader calls it."""
        return pin(self)


def move(value: T, device: torch.device | str, dtype: torch.dtype | None = None) -> T:
    """Move every tensor of a (nested) dataclass; `dtype` converts floating tensors only."""
    if isinstance(value, Tensor):
        wanted = dtype if value.is_floating_point() else None
        ready = torch.cuda.is_available() and value.is_pinned()
        return value.to(device, wanted, non_blocking=ready)  # type: ignore[return-value]
    return _each(value, lambda part: move(part, device, dtype))


def pin(value: T) -> T:
    """Copy every tensor of a (nested) dataclass to page-locked memory."""
    if isinstance(value, Tensor):
        return value.pin_memory()  # type: ignore[return-value]
    return typing.cast(T, _each(value, pin))


def _each(value: T, change: Callable[[Any], Any]) -> T:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [item.name for item in dataclasses.fields(value)]
        changed = {name: change(getattr(value, name)) for name in names}
        return typing.cast(T, dataclasses.replace(value, **changed))
    return value
