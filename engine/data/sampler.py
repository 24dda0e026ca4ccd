"""Which samples come next: a pure function of seed and position, with nothing to remember.

A shuffle is a permutation computed in place (a Feistel network walked until it lands inside), so
any position of any epoch costs the same and resuming takes no time. A stream hands out batches
of one task whose samples share a bucket; every usable sample comes once an epoch.
"""

# N samples, B samples of a micro-batch

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from engine.data.scene_model import DataError
from engine.run import derive_seed

Numbers = npt.NDArray[np.int64]
ROUNDS = 4
_WORD = 0xFFFFFFFFFFFFFFFF


def shuffle(positions: Numbers, count: int, seed: int) -> Numbers:
    """Map positions of 0 .. count - 1 through the permutation that `seed` names."""
    if count < 2:
        return positions.copy()
    half = max(1, (int(count - 1).bit_length() + 1) // 2)
    keys = [derive_seed("shuffle", seed, number) for number in range(ROUNDS)]
    found = positions.astype(np.uint64)
    outside = np.ones(len(found), np.bool_)
    while outside.any():
        found[outside] = _feistel(found[outside], half, keys)
        outside = found >= count
    return found.astype(np.int64)


def _feistel(values: npt.NDArray[np.uint64], half: int, keys: list[int]) -> npt.NDArray[np.uint64]:
    low = np.uint64((1 << half) - 1)
    left, right = values >> np.uint64(half), values & low
    for key in keys:
        left, right = right, left ^ (_mix(right + np.uint64(key & _WORD)) & low)
    return (left << np.uint64(half)) | right


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class Slot:
    """One micro-batch: its samples' numbers, their bucket, and where in the stream it stands."""

    numbers: Numbers
    bucket: int
    epoch: int
    position: int


class Stream:
    """Endless micro-batches of one task of one dataset, by position.

    `groups` are the numbers of the usable samples by bucket. An epoch holds every full micro-batch
    of every bucket in one shuffled order; `last` says what becomes of the rest of a bucket: left
    out this epoch (another rest the next), or handed out as a short micro-batch.
    Raises: DataError when not one micro-batch can be filled.
    """

    def __init__(
        self,
        groups: Mapping[int, npt.NDArray[np.integer]],
        size: int,
        seed: int,
        last: Literal["drop", "keep"] = "drop",
    ) -> None:
        self.buckets = sorted(groups)
        self.groups = [groups[bucket] for bucket in self.buckets]
        self.size = size
        self.seed = seed
        full = [len(g) // size if last == "drop" else -(-len(g) // size) for g in self.groups]
        self._first = np.cumsum([0, *full])
        if not self.per_epoch:
            most = max(map(len, self.groups), default=0)
            raise DataError(
                f"at least one bucket with {size} samples expected, the largest has {most}; "
                "use smaller micro-batches or more data"
            )

    @property
    def per_epoch(self) -> int:
        """Micro-batches of one epoch."""
        return int(self._first[-1])

    @property
    def left_out(self) -> int:
        """Samples that an epoch leaves out because they fill no micro-batch."""
        full = np.diff(self._first)
        return sum(
            max(0, len(g) - int(n) * self.size) for g, n in zip(self.groups, full, strict=True)
        )

    def slot(self, position: int) -> Slot:
        """Return micro-batch number `position` (0, 1, ... without end)."""
        epoch, place = divmod(position, self.per_epoch)
        seed = derive_seed(self.seed, epoch)
        order = int(shuffle(np.array([place]), self.per_epoch, seed)[0])
        number = int(np.searchsorted(self._first, order, "right")) - 1
        group = self.groups[number]
        start = (order - int(self._first[number])) * self.size
        places = np.arange(start, min(start + self.size, len(group)))
        chosen = group[shuffle(places, len(group), derive_seed(seed, self.buckets[number]))]
        return Slot(chosen.astype(np.int64), self.buckets[number], epoch, position)
