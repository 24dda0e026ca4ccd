"""The grammar of a written picture: a finite state machine per row, and a parser.

    <height_H> <width_W> SOI  SOL0 {cells, EOL} EOL0  SOL1 {cells, EOL} EOL1  EOI <|im_end|>

Once the size is known only the cells are free, so a state is a position in the bucket's plan; runs
of forced tokens need neither a vocabulary head nor sampling. Rows are independent: a batch may mix
sizes and positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from torch import Tensor

from focus.buckets import BUCKETS, Bucket
from focus.sequence import Ints, picture_block
from focus.vocabulary import Vocabulary

Cell = tuple[int, int, int]  # level, row, column
NOWHERE: Cell = (-1, -1, -1)


class GrammarError(ValueError):
    """A token that cannot stand where it was put."""


@dataclass(frozen=True)
class Choice:
    """What may come next. `level` is -1 for a resolution tag; `only` narrows `ids` down."""

    ids: slice
    level: int
    only: tuple[int, ...] = ()

    def allows(self, token: int) -> bool:
        """Tell whether a token may come next."""
        return token in self.only if self.only else self.ids.start <= token < self.ids.stop


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A picture as codes; -1 where none is written yet."""

    bucket: Bucket
    semantic: Ints  # [hs, ws]
    pixel: Ints  # [hp, wp]


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Cells to copy instead of writing them (beyond the paper: a quicker edit of a small region).

    semantic, pixel: codes of the source picture; keep_semantic, keep_pixel: True = copy.
    """

    semantic: Ints
    pixel: Ints
    keep_semantic: npt.NDArray[np.bool_]
    keep_pixel: npt.NDArray[np.bool_]


class RowGrammar:
    """State of one row that writes a picture.

    bucket: the size to write; None lets the model choose the tags among `buckets`.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        bucket: Bucket | None = None,
        *,
        buckets: Sequence[Bucket] = BUCKETS,
        keep: Keep | None = None,
    ) -> None:
        if keep is not None and bucket is None:
            raise GrammarError("keep needs a bucket: whose cells would be copied?")
        self.vocabulary = vocabulary
        self.bucket = bucket
        self.tokens: list[int] = []
        self._buckets = tuple(buckets)
        self._keep = keep
        self._ids: list[int] = []  # the plan: a token where it is forced, -1 where it is free
        self._cells: list[Cell] = []
        if bucket is not None:
            self._plan(bucket)

    @property
    def step(self) -> int:
        """Number of tokens written."""
        return len(self.tokens)

    @property
    def total(self) -> int:
        """Tokens of the whole row, <|im_end|> included; 0 while the size is unknown."""
        return len(self._ids)

    @property
    def done(self) -> bool:
        """Whether the row is complete."""
        return bool(self._ids) and self.step == len(self._ids)

    @property
    def cell(self) -> Cell:
        """The cell that the next token lies in."""
        return self._cells[self.step] if self.step < len(self._cells) else NOWHERE

    def next(self) -> int | Choice:
        """Return the forced next token, or what may be chosen."""
        if self.done:
            raise GrammarError("the picture is complete; nothing can follow <|im_end|>")
        if not self._ids:
            return self._next_tag()
        forced = self._ids[self.step]
        if forced >= 0:
            return forced
        level = self._cells[self.step][0]
        return Choice(self.vocabulary.level_ids[level], level)

    def push(self, token: int) -> None:
        """Write a token.

        Raises:
            GrammarError: it is not what `next` allows.
        """
        expected = self.next()
        legal = expected.allows(token) if isinstance(expected, Choice) else expected == token
        if not legal:
            raise GrammarError(
                f"token {self.step}: {self._describe(expected)} expected, "
                f"got {self.vocabulary.token(token)} (id {token})"
            )
        self.tokens.append(int(token))
        if not self._ids and self.step == 2:
            self.bucket = next(b for b in self._buckets if self._tags(b) == tuple(self.tokens))
            self._plan(self.bucket)

    def take_forced(self) -> list[tuple[int, Cell]]:
        """Write all forced tokens up to the next free one; return them with their cells."""
        taken: list[tuple[int, Cell]] = []
        while not self.done:
            token = self.next()
            if isinstance(token, Choice):
                break
            taken.append((token, self.cell))
            self.push(token)
        return taken

    def drawing(self) -> Drawing:
        """Return the codes written so far."""
        if self.bucket is None:
            raise GrammarError("the size of the picture is not known yet")
        grids = [np.full(grid, -1, np.int64) for grid in self.bucket.grids]
        for token, (level, row, column) in zip(self.tokens, self._cells, strict=False):
            if level >= 0:
                grids[level][row, column] = token - self.vocabulary.level_ids[level].start
        return Drawing(bucket=self.bucket, semantic=grids[0], pixel=grids[1])

    def _plan(self, bucket: Bucket) -> None:
        block = picture_block(self.vocabulary, bucket, read=False)
        cells: list[Cell] = [(c[0], c[1], c[2]) for c in block.grid.tolist()]
        self._cells = [*cells, NOWHERE]
        visual = block.grid[:, 0] >= 0
        self._ids = [*np.where(visual, -1, block.ids).tolist(), self.vocabulary.eos_id]
        if self._keep is not None:
            self._force(self._keep, bucket)

    def _force(self, keep: Keep, bucket: Bucket) -> None:
        levels = ((keep.semantic, keep.keep_semantic), (keep.pixel, keep.keep_pixel))
        for level, (pair, grid) in enumerate(zip(levels, bucket.grids, strict=True)):
            if any(array.shape != grid for array in pair):
                shapes = tuple(array.shape for array in pair)
                raise GrammarError(f"level {level} of keep: arrays {grid} expected, got {shapes}")
        for index, (level, row, column) in enumerate(self._cells):
            if level >= 0 and levels[level][1][row, column]:
                ids = self.vocabulary.level_ids[level]
                token = ids.start + int(levels[level][0][row, column])
                if not ids.start <= token < ids.stop:
                    raise GrammarError(f"level {level} of keep: no such code {token - ids.start}")
                self._ids[index] = token

    def _next_tag(self) -> int | Choice:
        fitting = [
            tags for b in self._buckets if (tags := self._tags(b))[: self.step] == (*self.tokens,)
        ]
        only = tuple(sorted({tags[self.step] for tags in fitting}))
        return only[0] if len(only) == 1 else Choice(slice(only[0], only[-1] + 1), -1, only)

    def _tags(self, bucket: Bucket) -> tuple[int, int]:
        height, width = bucket.size
        return self.vocabulary.height_id(height), self.vocabulary.width_id(width)

    def _describe(self, expected: int | Choice) -> str:
        if isinstance(expected, int):
            return self.vocabulary.token(expected)
        if expected.only:
            return "one of " + " ".join(self.vocabulary.token(i) for i in expected.only)
        return f"a level {expected.level} code"


def parse(
    ids: Iterable[int], vocabulary: Vocabulary, buckets: Sequence[Bucket] = BUCKETS
) -> Drawing:
    """Read a written picture back, from its tags to <end_of_image> (or <|im_end|>).

    Raises:
        GrammarError: a token that breaks the grammar, or an incomplete picture.
    """
    row = RowGrammar(vocabulary, buckets=buckets)
    for token in ids:
        row.push(token)
    if not row.total or row.step < row.total - 1:
        raise GrammarError(
            f"{row.total - 1 if row.total else 'more'} tokens up to <end_of_image> expected, "
            f"got {row.step}"
        )
    return row.drawing()


def keep_outside(edit: Tensor, source: Drawing, margin: int = 0) -> Keep:
    """Keep every cell of the source that the edit mask does not touch.

    edit: [H, W] bool in the frame of the source picture. margin: cells around the mask that are
    written anew as well.
    """
    if edit.ndim != 2:
        raise GrammarError(f"an edit mask [H, W] expected, got {tuple(edit.shape)}")
    kept = []
    for grid in source.bucket.grids:
        touched = F.adaptive_max_pool2d(edit[None].float().cpu(), grid)
        if margin:
            touched = F.max_pool2d(touched, 2 * margin + 1, stride=1, padding=margin)
        kept.append((touched[0] == 0).numpy().astype(np.bool_))
    return Keep(
        semantic=source.semantic, pixel=source.pixel, keep_semantic=kept[0], keep_pixel=kept[1]
    )
