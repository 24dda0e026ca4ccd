"""Losses that belong to the language model: next token, and expected code (facts of stage 3)."""

# B batch, T sequence, V vocabulary, d code width

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from focus.batch import IGNORE

CHUNK = 4096  # positions whose logits exist at once: 283 k logits of a long batch never do


class Table(Protocol):
    """A token table whose rows no process holds alone; it computes its own cross-entropy."""

    def loss(self, hidden: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """See `language_loss`."""


class Rows(Protocol):
    """Some rows of such a table."""

    def code_loss(self, hidden: Tensor, index: Tensor, codes: Tensor) -> Tensor:
        """See `expected_code_loss`, at temperature 1."""


def language_loss(
    hidden: Tensor,
    labels: Tensor,
    table: Tensor | Table,
    weight: Tensor | None = None,
    without: Tensor | None = None,
) -> Tensor:
    """Mean next-token cross-entropy over labelled positions.

    hidden [B, T, D], labels [B, T] already shifted (IGNORE carries no loss), table [V, D].
    weight [B, T] scales positions; the mean is over the weights. Zero when nothing is labelled.
    without [B, T] an id that the softmax of a position leaves out, -1 for none; not with a table
    whose rows no process holds alone.
    Logits are computed for labelled positions only, `CHUNK` at a time, in fp32.
    """
    if not isinstance(table, Tensor):
        if without is not None:
            raise ValueError("a split table computes every logit; pass no `without`")
        return table.loss(hidden, labels, weight)
    where = labels != IGNORE
    states, targets = hidden[where], labels[where]
    if targets.numel() == 0:
        return hidden.sum() * 0.0
    scale = (
        torch.ones_like(targets, dtype=torch.float32) if weight is None else weight[where].float()
    )
    absent = torch.full_like(targets, -1) if without is None else without[where]
    total = hidden.new_zeros((), dtype=torch.float32)
    for state, target, part, left_out in zip(
        *(torch.split(x, CHUNK) for x in (states, targets, scale, absent)), strict=True
    ):
        logits = F.linear(state, table).float()
        if without is not None:
            rows = (left_out >= 0).nonzero()[:, 0]
            logits = logits.index_put((rows, left_out[rows]), logits.new_tensor(-torch.inf))
        loss = F.cross_entropy(logits, target, reduction="none")
        total = total + (loss * part).sum()
    return total / scale.sum().clamp(min=1e-6)


def expected_code_loss(
    hidden: Tensor, index: Tensor, table: Tensor | Rows, codes: Tensor, temperature: float = 1.0
) -> Tensor:
    """MSE between the expected code under the predicted distribution and the true code.

    sum_k p_k c_k against c_index, where p is the softmax over one level's visual tokens: our
    reading of "visual reconstruction losses using precomputed features" (paper, appendix B).
    hidden [n, D] states that predict visual tokens of one level, index [n], table [V_level, D],
    codes [V_level, d].
    """
    if not isinstance(table, Tensor):
        if temperature != 1.0:
            raise ValueError(f"a split table knows temperature 1 only, got {temperature}")
        return table.code_loss(hidden, index, codes)
    if index.numel() == 0:
        return hidden.sum() * 0.0
    total = hidden.new_zeros((), dtype=torch.float32)
    for state, target in zip(torch.split(hidden, CHUNK), torch.split(index, CHUNK), strict=True):
        p = F.softmax(F.linear(state, table).float() / temperature, dim=-1)
        total = total + (p @ codes.float() - codes[target].float()).square().mean(-1).sum()
    return total / index.numel()
