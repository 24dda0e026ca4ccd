"""Where a sequence begins to answer."""

# B batch

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from focus.batch import IGNORE, Batch


def answer_starts(batch: Batch, num: int) -> Tensor:
    """Positions [B, num] whose next token is the first of an answer; -1 where there are fewer."""
    labelled = batch.labels != IGNORE
    first = labelled & ~F.pad(labelled, (1, 0))[:, :-1]
    number = first.cumsum(1) - 1
    found = torch.full((len(first), num), -1, dtype=torch.int64, device=first.device)
    row, place = first.nonzero(as_tuple=True)
    kept = number[row, place] < num
    found[row[kept], number[row, place][kept]] = place[kept]
    return found
