"""Where the codes of a picture to draw come from: words of the text, or cells of the picture given.

The target of a pointer (see `reading.py`) that stands where a semantic code is about to be written:
next-token cross-entropy alone teaches to continue what is drawn already, long before it teaches to
look a cell up in the text.
"""

# B batch, T sequence, C cells of the semantic grid, D LLM width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.data.records import Record
from engine.data.scene_tasks import plan_of
from focus.batch import Batch, Source
from focus.prompts import DRAWING
from focus.sequence import written_codes
from focus.vocabulary import Vocabulary


def spans(ids: Sequence[int], phrase: Sequence[int]) -> list[int]:
    """Return the positions of every place where a phrase stands in a row of ids."""
    size = len(phrase)
    starts = [i for i in range(len(ids) - size + 1) if ids[i : i + size] == phrase]
    return [start + k for start in starts for k in range(size)]


@dataclass(frozen=True, kw_only=True)
class Origins:
    """Where the cells of drawings come from.

    shares: [B, C, T], how far each position tells what each cell shows. weight: [B, C]; each phrase
    counts alike, and all the cells that are kept as one phrase: most cells are mere backdrop.
    """

    shares: Tensor
    weight: Tensor


def origins(
    batch: Batch, records: Sequence[Record], vocabulary: Vocabulary, grid: tuple[int, int]
) -> Origins | None:
    """Return where the cells of a batch's drawings come from; None when the task draws nothing."""
    if batch.task not in DRAWING:
        return None
    shares = torch.zeros(len(records), grid[0] * grid[1], batch.input_ids.shape[1])
    weight = torch.zeros(shares.shape[:2])
    cells = batch.grid[..., 1].long() * grid[1] + batch.grid[..., 2].long()
    for row, record in enumerate(records):
        plan = plan_of(record.id, grid)
        ids = batch.input_ids[row].tolist()
        for words, share in plan.told:
            for position in spans(ids, vocabulary.encode(words)):
                shares[row, :, position] = torch.from_numpy(share).maximum(shares[row, :, position])
        given = (batch.source[row] == Source.SEMANTIC).nonzero()[:, 0]
        own = cells[row, given]
        shares[row, own, given] = torch.from_numpy(plan.kept)[own]
        parts = torch.from_numpy(np.stack([plan.kept, *(share for _, share in plan.told)]))
        weight[row] = (parts / parts.sum(1, keepdim=True).clamp(min=1e-6)).sum(0)
    return Origins(shares=shares, weight=weight)


def before_drawing(batch: Batch) -> Tensor:
    """Return which positions [B, T] bool come before the picture that is being written."""
    steps = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    return (written_codes(batch).cumsum(1) == 0) & (steps < batch.lengths[:, None])


def about_to_draw(batch: Batch) -> Tensor:
    """Return which positions [B, T] bool a semantic code follows."""
    following = F.pad(written_codes(batch) & (batch.grid[..., 0] == 0), (0, 1))
    return following[:, 1:]
