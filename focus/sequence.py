"""Sequences: one sample position by position, the writer that builds it, collation and codes.

Names of the arrays are those of `focus.batch.Batch`.
"""

# B batch, T sequence

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from focus.batch import IGNORE, Batch, Source
from focus.buckets import Bucket
from focus.errors import ShapeError
from focus.vocabulary import Vocabulary

Ints = npt.NDArray[np.int64]
ARRAYS: dict[str, int] = {
    "input_ids": 0,
    "labels": IGNORE,
    "source": 0,
    "grid": -1,
    "condition": -1,
}


class CodesLike(Protocol):
    """Discrete codes of pictures: `semantic` [B, hs, ws] and `pixel` [B, hp, wp]."""

    @property
    def semantic(self) -> Tensor:
        """Level 0."""

    @property
    def pixel(self) -> Tensor:
        """Level 1."""


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """One sample; the fields of a row of `Batch`, unpadded."""

    input_ids: Ints  # [T]
    labels: Ints  # [T], shifted: the id that follows, or IGNORE
    source: npt.NDArray[np.uint8]  # [T]
    grid: npt.NDArray[np.int16]  # [T, 3]
    condition: npt.NDArray[np.int16]  # [T]
    num_conditions: int
    num_regions: int

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Piece:
    """A run of positions. `learn` says whether the model is taught to write them."""

    ids: Ints
    source: npt.NDArray[np.uint8]
    grid: npt.NDArray[np.int16]
    learn: bool = False
    condition: int = -1

    @classmethod
    def of(
        cls,
        ids: Iterable[int],
        source: Source = Source.TOKEN,
        *,
        learn: bool = False,
        condition: int = -1,
    ) -> Piece:
        """Return positions without grid cells."""
        numbers = np.fromiter(ids, np.int64)
        return cls(
            numbers,
            np.full(len(numbers), source, np.uint8),
            np.full((len(numbers), 3), -1, np.int16),
            learn,
            condition,
        )


def picture_block(vocabulary: Vocabulary, bucket: Bucket, *, read: bool) -> Piece:
    """Return resolution tags and block of one picture.

    <height> <width> SOI, for each level SOL {row of cells, EOL} EOL_level, EOI. The cells are
    continuous features when the picture is read, discrete codes (0 so far) when it is written.
    """
    tags = (vocabulary.height_id(bucket.size[0]), vocabulary.width_id(bucket.size[1]))
    starts = (vocabulary.semantic_ids.start, vocabulary.pixel_ids.start)
    return _block(
        tuple(vocabulary.structure.values()), tags, starts, bucket, vocabulary.pad_id, read
    )


@lru_cache(maxsize=256)
def _block(
    structure: tuple[int, ...],
    tags: tuple[int, int],
    starts: tuple[int, int],
    bucket: Bucket,
    pad_id: int,
    read: bool,
) -> Piece:
    begin, end, line, *levels = structure
    ids: list[int] = [*tags, begin]
    source = [Source.TOKEN] * 3
    cells = [(-1, -1, -1)] * 3

    def add(index: int, cell: tuple[int, int, int] = (-1, -1, -1)) -> None:
        visual = read and cell[0] >= 0
        ids.append(pad_id if visual else index)
        source.append(Source(Source.SEMANTIC + cell[0]) if visual else Source.TOKEN)
        cells.append(cell)

    for level, (rows, columns) in enumerate(bucket.grids):
        add(levels[2 * level])
        for row in range(rows):
            for column in range(columns):
                add(starts[level], (level, row, column))
            add(line)
        add(levels[2 * level + 1])
    add(end)
    return Piece(
        np.array(ids, np.int64),
        np.array(source, np.uint8),
        np.array(cells, np.int16),
        learn=not read,
    )


def assemble(pieces: Many[Piece], num_regions: int) -> Sequence:
    """Join pieces and shift the labels: position t is taught the id at t + 1."""
    ids = np.concatenate([p.ids for p in pieces])
    learn = np.concatenate([np.full(len(p.ids), p.learn) for p in pieces])
    condition = np.concatenate([np.full(len(p.ids), p.condition, np.int16) for p in pieces])
    labels = np.full(len(ids), IGNORE, np.int64)
    labels[:-1] = np.where(learn[1:], ids[1:], IGNORE)
    return Sequence(
        input_ids=ids,
        labels=labels,
        source=np.concatenate([p.source for p in pieces]),
        grid=np.concatenate([p.grid for p in pieces]),
        condition=condition,
        num_conditions=int(condition.max(initial=-1)) + 1,
        num_regions=num_regions,
    )


def collate(
    sequences: Many[Sequence], *, pad_id: int = 0, length: int | None = None
) -> dict[str, Tensor]:
    """Right-pad sequences to one length and stack them.

    Returns the `Batch` fields input_ids, labels, source, grid, condition, lengths, num_conditions
    and num_regions, so that `Batch(task=..., **collate(rows))` is a batch.

    Raises:
        ShapeError: nothing to collate, or a sequence longer than `length`.
    """
    if not sequences:
        raise ShapeError("at least one sequence to collate expected, got none")
    longest = max(len(s) for s in sequences)
    if length is not None and longest > length:
        raise ShapeError(f"sequences of at most {length} tokens expected, got {longest}")
    total = longest if length is None else length
    stacked: dict[str, Tensor] = {}
    for name, filler in ARRAYS.items():
        rows = [getattr(s, name) for s in sequences]
        filler = pad_id if name == "input_ids" else filler
        out = np.full((len(rows), total, *rows[0].shape[1:]), filler, rows[0].dtype)
        for row, values in zip(out, rows, strict=True):
            row[: len(values)] = values
        stacked[name] = torch.from_numpy(out)
    stacked["lengths"] = torch.tensor([len(s) for s in sequences])
    stacked["num_conditions"] = torch.tensor([s.num_conditions for s in sequences])
    stacked["num_regions"] = torch.tensor([s.num_regions for s in sequences])
    return stacked


def written_codes(batch: Batch) -> Tensor:
    """Return where a batch writes visual tokens, [B, T] bool (input pictures excluded)."""
    return (batch.source == Source.TOKEN) & (batch.grid[..., 0] >= 0)


def fill_codes(batch: Batch, codes: CodesLike, vocabulary: Vocabulary) -> Batch:
    """Return the batch with the codes of its target pictures as ids and labels.

    Only positions that `build` gave a label are taught. Where `blank` is set, the padding id stands
    in place of the code. The input batch is left as it was.

    Raises:
        ShapeError: the code grids do not cover the cells that the sequences write.
    """
    where = written_codes(batch)
    level, row, column = batch.grid.long().clamp(min=0).unbind(-1)
    ids = batch.input_ids.clone()
    order = torch.arange(ids.shape[0], device=ids.device)[:, None].expand_as(ids)
    for number, (grid, start) in enumerate(
        ((codes.semantic, vocabulary.semantic_ids.start), (codes.pixel, vocabulary.pixel_ids.start))
    ):
        here = where & (level == number)
        rows, columns = row[here], column[here]
        _check_cover(number, grid, rows, columns, ids.shape[0])
        ids[here] = grid[order[here], rows, columns].to(ids) + start
    labels = batch.labels.clone()
    taught = where[:, 1:] & (labels[:, :-1] != IGNORE)
    labels[:, :-1] = torch.where(taught, ids[:, 1:], labels[:, :-1])
    if batch.blank is not None:
        ids = ids.masked_fill(batch.blank & where, vocabulary.pad_id)
    return dataclasses.replace(batch, input_ids=ids, labels=labels)


def _check_cover(level: int, grid: Tensor, rows: Tensor, columns: Tensor, batch: int) -> None:
    if not rows.numel():
        return
    needed = (int(rows.max()) + 1, int(columns.max()) + 1)
    if grid.ndim != 3 or grid.shape[0] != batch or tuple(grid.shape[1:]) != needed:
        raise ShapeError(
            f"level {level} codes [{batch}, {needed[0]}, {needed[1]}] expected, "
            f"got {tuple(grid.shape)}; tokenise the target at the bucket given to build()"
        )
