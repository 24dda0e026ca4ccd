"""Vocabulary losses with the table split over tensor-parallel ranks.

Whole rows of logits never exist: each rank multiplies by its own rows of the table, and only for
labelled positions, `CHUNK` of them at a time.
"""

# n positions, D width, V vocabulary rows in all, v rows on this rank, d code width

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from focus.batch import IGNORE
from parallel import cpu

cpu.install()

from megatron.core import parallel_state  # noqa: E402  (after cpu.install)
from megatron.core.tensor_parallel import (  # noqa: E402
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)

CHUNK = 4096


@dataclass(frozen=True)
class SplitHead:
    """The rows [v, D] of the table that this tensor-parallel rank holds."""

    table: Tensor

    def loss(self, hidden: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean next-token cross-entropy, as `focus.losses.language_loss`."""
        where = labels != IGNORE
        states, targets = hidden[where], labels[where]
        if targets.numel() == 0:
            return hidden.sum() * 0.0
        scale = torch.ones_like(targets, dtype=torch.float32)
        if weight is not None:
            scale = weight[where].float()
        total = hidden.new_zeros((), dtype=torch.float32)
        for state, target, part in zip(
            *(torch.split(x, CHUNK) for x in (states, targets, scale)), strict=True
        ):
            logits = self._logits(state, self.table).float()
            loss = vocab_parallel_cross_entropy(logits[:, None], target[:, None])[:, 0]
            total = total + (loss * part).sum()
        return total / scale.sum().clamp(min=1e-6)

    def code_loss(self, hidden: Tensor, index: Tensor, ids: slice, codes: Tensor) -> Tensor:
        """Expected-code loss, as `focus.losses.expected_code_loss`, over the rows `ids`."""
        if index.numel() == 0:
            return hidden.sum() * 0.0
        first = parallel_state.get_tensor_model_parallel_rank() * self.table.shape[0]
        low = min(max(ids.start - first, 0), self.table.shape[0])
        high = min(max(ids.stop - first, 0), self.table.shape[0])
        own_codes = codes[low + first - ids.start : high + first - ids.start].float()
        total = hidden.new_zeros((), dtype=torch.float32)
        for state, target in zip(
            torch.split(hidden, CHUNK), torch.split(index, CHUNK), strict=True
        ):
            logits = self._logits(state, self.table[low:high]).float()
            expected = _split_softmax(logits) @ own_codes
            expected = reduce_from_tensor_model_parallel_region(expected)
            total = total + (expected - codes[target].float()).square().mean(-1).sum()
        return total / index.numel()

    def _logits(self, state: Tensor, rows: Tensor) -> Tensor:
        shared: Tensor = copy_to_tensor_model_parallel_region(state)
        return shared @ rows.T.to(state.dtype)


def _split_softmax(logits: Tensor) -> Tensor:
    """Softmax over columns that are spread over the tensor-parallel ranks: [n, v] -> [n, v]."""
    group = parallel_state.get_tensor_model_parallel_group()
    with torch.no_grad():
        top = logits.new_full((logits.shape[0],), -torch.inf)
        if logits.shape[1]:
            top = logits.amax(-1)
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    exponential = (logits - top[:, None]).exp()
    total = _SumOverRanks.apply(exponential.sum(-1), group)  # type: ignore[no-untyped-call]
    normed: Tensor = exponential / total[:, None]
    return normed


class _SumOverRanks(torch.autograd.Function):
    """Sum over a group; every rank uses the sum differently, so gradients are summed too."""

    @staticmethod
    def forward(ctx: object, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        dist.all_reduce(total, group=ctx.group)  # type: ignore[attr-defined]
        return total, None
