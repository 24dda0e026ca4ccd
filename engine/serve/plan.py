"""A picture's grammar as arrays: which tokens are forced is known before the first is drawn."""

# P tokens of the picture

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from focus.buckets import Bucket
from focus.grammar import NOWHERE, Cell, Choice, Keep, RowGrammar
from focus.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Tokens of one picture, from its tags to <|im_end|>.

    tokens: [P], the first id of its level where a token is free. cells, following: [P, 3], where a
    token lies and where its successor does. free: positions to draw, ascending. levels: of each.
    """

    bucket: Bucket
    tokens: Tensor
    cells: Tensor
    following: Tensor
    free: tuple[int, ...]
    levels: tuple[int, ...]

    @property
    def lead(self) -> slice:
        """The forced tokens before anything is drawn."""
        return slice(0, self.free[0] if self.free else len(self.tokens))

    def chunk(self, number: int) -> slice:
        """Return the `number`-th free token and the forced ones behind it; empty past the end."""
        if number >= len(self.free) - 1:
            return slice(0, 0)  # what follows the last free token is never read
        return slice(self.free[number], self.free[number + 1])


def make_plan(vocabulary: Vocabulary, bucket: Bucket, keep: Keep | None = None) -> Plan:
    """Walk the grammar of one picture. Raises `GrammarError` if `keep` does not fit."""
    row = RowGrammar(vocabulary, bucket, keep=keep)
    tokens: list[int] = []
    cells: list[Cell] = []
    free: list[int] = []
    levels: list[int] = []
    while not row.done:
        allowed = row.next()
        if isinstance(allowed, Choice):
            free.append(row.step)
            levels.append(allowed.level)
            allowed = allowed.ids.start
        tokens.append(allowed)
        cells.append(row.cell)
        row.push(allowed)
    return Plan(
        bucket=bucket,
        tokens=torch.tensor(tokens),
        cells=torch.tensor(cells),
        following=torch.tensor([*cells[1:], NOWHERE]),
        free=tuple(free),
        levels=tuple(levels),
    )
