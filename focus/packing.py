"""Several sequences in one row of the trunk, so that no work is spent on padding.

Only the trunk sees packed rows, with masks that keep every document to itself; embeddings before it
and heads after it keep one sequence per row, so every task can be packed.
"""

# B sequences, T their padded length, R packed rows, L their length, D width

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from focus.errors import ShapeError


class Trunk(Protocol):
    """What `run_packed` needs of a trunk."""

    def __call__(self, embeddings: Tensor, *, segments: Tensor) -> Tensor:
        """Map [R, L, D] to [R, L, D]; tokens see earlier tokens of their own segment."""
        ...


def plan_rows(lengths: Sequence[int], row: int) -> Tensor:
    """Return the row and the first position of each sequence, [B, 2] int64.

    The longest sequences are placed first, each into the first row with room (first fit
    decreasing: at most 11/9 of the fewest rows, plus one).
    Raises: ShapeError when a sequence is longer than a row.
    """
    if lengths and max(lengths) > row:
        raise ShapeError(
            f"packed rows of at least {max(lengths)} tokens expected, got {row}; set pack higher"
        )
    used: list[int] = []
    places = [(0, 0)] * len(lengths)
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        fitting = (r for r, taken in enumerate(used) if taken + lengths[number] <= row)
        chosen = next(fitting, len(used))
        if chosen == len(used):
            used.append(0)
        places[number] = chosen, used[chosen]
        used[chosen] += lengths[number]
    return torch.tensor(places, dtype=torch.int64).reshape(-1, 2)


def run_packed(trunk: Trunk, embeddings: Tensor, places: Tensor, lengths: Tensor) -> Tensor:
    """Run [B, T, D] through the trunk in packed rows; zeros at padding positions.

    places: [B, 2] of `plan_rows`. Equals one sequence per row, to rounding; gradients flow.
    """
    batch, num = embeddings.shape[:2]
    order = torch.arange(num, device=embeddings.device)
    valid = order < lengths[:, None]
    row = places[:, :1].expand(batch, num)[valid]
    column = (places[:, 1:] + order)[valid]
    size = int(places[:, 0].max()) + 1, int((places[:, 1] + lengths).max())
    packed = embeddings.new_zeros(*size, embeddings.shape[2])
    packed = packed.index_put((row, column), embeddings[valid])
    numbers = torch.arange(batch, device=embeddings.device)[:, None].expand(batch, num)
    segments = torch.full(size, -1, dtype=torch.int64, device=embeddings.device)
    segments[row, column] = numbers[valid]
    hidden = trunk(packed, segments=segments)
    spread = hidden.new_zeros(batch, num, hidden.shape[2])
    return spread.index_put((numbers[valid], order.expand(batch, num)[valid]), hidden[row, column])
