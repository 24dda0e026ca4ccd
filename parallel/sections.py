"""What crosses the seams front | trunk | heads in training, on one process or on many."""

# B batch, T sequence, D LLM width, V vocabulary rows, n positions, d code width

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from focus.batch import Batch
from focus.losses import expected_code_loss, language_loss


class LanguageHead(Protocol):
    """Losses over the vocabulary; the table may be split over tensor-parallel ranks."""

    def loss(self, hidden: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """See `focus.losses.language_loss`: hidden [B, T, D], labels [B, T] -> scalar."""
        ...

    def code_loss(self, hidden: Tensor, index: Tensor, ids: slice, codes: Tensor) -> Tensor:
        """See `focus.losses.expected_code_loss`: `ids` are the rows of one level's tokens."""
        ...


@dataclass(frozen=True)
class TableHead:
    """A whole table [V, D] on one process."""

    table: Tensor

    def loss(self, hidden: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean next-token cross-entropy."""
        return language_loss(hidden, labels, self.table, weight)

    def code_loss(self, hidden: Tensor, index: Tensor, ids: slice, codes: Tensor) -> Tensor:
        """MSE between the expected and the true code of one level."""
        return expected_code_loss(hidden, index, self.table[ids], codes)


@dataclass(frozen=True, kw_only=True)
class Handover:
    """What the heads get from the sections before them."""

    batch: Batch
    hidden: Tensor  # [B, T, D] final-normed states
    maps: Sequence[Tensor] | None  # res2..res5 of the batch's pictures
    language: LanguageHead
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # what `prepare` computed


class Work(Protocol):
    """What a step does with its micro-batches, supplied by the floor above.

    An engine that splits the model calls `prepare` and `head_losses` on the ranks that hold the
    front and the heads; one that does not calls `losses`.
    """

    def seed(self, micro: int, section: str) -> None:
        """Seed the random state for one section ("front" or "heads") of one micro-batch."""
        ...

    def losses(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        """Return the weighted terms of one micro-batch."""
        ...

    def prepare(self, front: Any, batch: Any) -> tuple[Batch, dict[str, Tensor]]:
        """Return the batch and extra tensors that need the front but no gradient."""
        ...

    def head_losses(self, heads: Any, state: Handover) -> Mapping[str, Tensor]:
        """Return the weighted terms of one micro-batch from what reached the heads."""
        ...
