"""Weighted datasets as one endless row of micro-batches, the same for any number of ranks.

Micro-batch g of the whole training belongs to one part, chosen so that every period of 1,000 holds
the parts in exact proportion, and is that part's next one. A rank of R takes g = next + rank,
next + rank + R, ...; the whole state is the number `next`.
"""

# g number of a micro-batch over all ranks, R ranks

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.manifest import Dataset
from engine.data.sampler import Slot, Stream
from engine.data.scene_model import DataError
from engine.data.schema import SHARD_TASKS
from engine.run import derive_seed

PERIOD = 1000
STATE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Part:
    """One task of one dataset: how often it is drawn and how large its micro-batches are."""

    dataset: str
    task: str
    weight: float
    size: int


@dataclass(frozen=True)
class Pick:
    """One micro-batch of the mixture: number `index` of all, drawn from part `part`."""

    index: int
    part: int
    task: str
    slot: Slot


class Mixture:
    """Parts, their datasets, a seed and a position.

    Raises: DataError for weights that are not positive or rarer than one in a period, an unknown
    task, a folder without that task, or buckets too small for one micro-batch.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        seed: int = 0,
        datasets: Mapping[str, Dataset] | None = None,
        keep_short: bool = True,
    ) -> None:
        self.parts = tuple(parts)
        self.seed = seed
        self.datasets = dict(datasets or {})
        self._check()
        for part in self.parts:
            if part.dataset not in self.datasets:
                self.datasets[part.dataset] = Dataset(Path(part.dataset))
        self.streams = [self._stream(n, part, keep_short) for n, part in enumerate(self.parts)]
        self._counts = shares([part.weight for part in self.parts])
        self._keep_short = keep_short
        self._period: tuple[int, np.ndarray] | None = None
        self.next = 0

    def _check(self) -> None:
        if not self.parts:
            raise DataError("at least one part of a mixture expected")
        for part in self.parts:
            if part.task not in SHARD_TASKS or part.size < 1 or not part.weight > 0:
                raise DataError(
                    f"a known task, a size of at least 1 and a positive weight expected, got {part}"
                )

    def _stream(self, number: int, part: Part, keep_short: bool) -> Stream:
        groups = self.datasets[part.dataset].groups(part.task)
        seed = derive_seed(self.seed, "part", number, part.task)
        try:
            return Stream(groups, part.size, seed, "keep" if keep_short else "drop")
        except DataError as error:
            raise DataError(f"{part.dataset}, task {part.task}: {error}") from error

    def pick(self, index: int) -> Pick:
        """Return micro-batch `index` of all, 0, 1, ... without end: a pure function."""
        period, place = divmod(index, PERIOD)
        order = self._order(period)
        part = int(order[place])
        before = period * self._counts[part] + int((order[:place] == part).sum())
        slot = self.streams[part].slot(before)
        return Pick(index, part, self.parts[part].task, slot)

    def _order(self, period: int) -> np.ndarray:
        if self._period is None or self._period[0] != period:
            order = np.repeat(np.arange(len(self.parts)), self._counts)
            rng = np.random.default_rng(derive_seed(self.seed, "period", period))
            self._period = period, rng.permutation(order)
        return self._period[1]

    def picks(self, rank: int = 0, ranks: int = 1) -> Iterator[Pick]:
        """The micro-batches of one rank from `next` on; `next` itself is left alone."""
        if not 0 <= rank < ranks:
            raise DataError(f"a rank below {ranks} expected, got {rank}")
        index = self.next + rank
        while True:
            yield self.pick(index)
            index += ranks

    def advance(self, micro_batches: int) -> None:
        """Note that all ranks together have used up that many micro-batches."""
        self.next += micro_batches

    @property
    def fingerprint(self) -> str:
        """Changes whenever another order of samples could come out."""
        told = [
            (p.task, p.weight, p.size, self.datasets[p.dataset].fingerprint) for p in self.parts
        ]
        text = json.dumps([STATE_VERSION, self.seed, PERIOD, self._keep_short, told])
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"version": STATE_VERSION, "next": self.next, "fingerprint": self.fingerprint}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, with any number of ranks.

        Raises: DataError when data, weights, sizes or seed are not those of the state.
        """
        if state.get("version") != STATE_VERSION or state.get("fingerprint") != self.fingerprint:
            raise DataError(
                f"the state of this mixture ({self.fingerprint}) expected, got "
                f"{state.get('fingerprint')}: shards, weights, sizes or seed are others; resume "
                "with those, or start the data anew"
            )
        self.next = int(state["next"])


def shares(weights: Sequence[float], period: int = PERIOD) -> list[int]:
    """Whole numbers in proportion to the weights that sum to `period` (largest remainder).

    Raises: DataError for a weight that would get none.
    """
    exact = np.asarray(weights, np.float64) / sum(weights) * period
    counts = np.floor(exact).astype(int)
    for number in np.argsort(counts - exact, kind="stable")[: period - int(counts.sum())]:
        counts[number] += 1
    if (counts < 1).any():
        rare = weights[int(counts.argmin())]
        raise DataError(f"weights of at least 1 in {period} of the sum expected, got {rare}")
    return [int(count) for count in counts]


# Table 5: what each stage draws, in millions of samples. Within a line the paper gives no shares;
# the datasets of a line then share its number equally.
TABLE_5: Mapping[str, tuple[tuple[float, str, tuple[str, ...]], ...]] = {
    "tokenizer": ((45.0, "vqa", ("coyo", "emova", "laion")),),
    "diffusion": ((45.0, "vqa", ("coyo", "emova", "laion")),),
    "warmup": ((30.0, "vqa", ("llava", "coyo", "emova_pretrain")),),
    "pretrain": (
        (35.0, "editing", ("ultraedit", "anyedit", "seed_edit")),
        (
            3.0 * 6 / 10,
            "referring",
            ("refcoco", "refcoco_plus", "refcocog", "refclef"),
        ),
        (3.0 * 2 / 10, "class", ("paco_lvis", "partimagenet", "pascal_part")),
        (3.0 * 2 / 10, "video", ("davis2017", "youtube_vis")),
        (5.0, "text", ("magpie", "openorca", "scp_116k", "openhermes", "opc_sft")),
    ),
    "instruct": (
        (3.5, "editing", ("omniedit", "anyedit", "ultraedit", "instructpix2pix")),
        (3.5 * 3 / 4, "vqa", ("emova_sft", "pixmo", "m4_instruct")),
        (3.5 / 4, "text", ("magpie",)),
        (1.0, "reasoning", ("reasonseg", "lisa_plus")),
        (1.0, "video", ("revos", "ref_youtube_vos")),
        (0.5, "interactive", ("coco_interactive",)),
    ),
}


def table_5(stage: str, root: Path, sizes: Mapping[str, int], default: int = 8) -> list[Part]:
    """The parts of a stage for the datasets that exist below `root` (ROOT/NAME/manifest.json).

    Raises: DataError for an unknown stage, or when none of the stage's datasets exists.
    """
    if stage not in TABLE_5:
        raise DataError(f"a stage of {', '.join(TABLE_5)} expected, got {stage!r}")
    parts = [
        Part(
            dataset=str(root / name),
            task=task,
            weight=millions / len(names),
            size=sizes.get(task, default),
        )
        for millions, task, names in TABLE_5[stage]
        for name in names
        if (root / name / "manifest.json").is_file()
    ]
    if not parts:
        names = sorted({name for _, _, line in TABLE_5[stage] for name in line})
        raise DataError(f"{root}: datasets of {', '.join(names)} expected; convert them first")
    return parts
