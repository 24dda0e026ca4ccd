"""A dataset: its manifest, which of its samples may be used, and reading them by number."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.data.guard import BadSample
from engine.data.scene_model import DataError
from engine.data.schema import SCHEMA, SHARD_TASKS, Encoded, parse
from engine.data.shards import ROW, Rows, ShardInfo, ShardReader, write_atomic

MANIFEST = "manifest.json"
BAD = "bad.json"  # samples that validation found broken: {"NNNNN": {"number": "reason"}}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a dataset says of itself.

    tasks: samples of each task. skipped: source samples left out while converting, by reason.
    licence, source: as the person who converted it gave them. codes: fingerprint of the tokenizer
    whose codes lie beside the shards, by name of their file ending.
    """

    name: str
    format: str
    source: str
    licence: str
    shards: tuple[ShardInfo, ...]
    tasks: Mapping[str, int] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    schema: int = SCHEMA
    version: str = ""
    codes: Mapping[str, str] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.samples for shard in self.shards)

    def write(self, folder: Path) -> None:
        """Write manifest.json atomically."""
        told = {**dataclasses.asdict(self), "samples": self.samples}
        write_atomic(folder / MANIFEST, (json.dumps(told, indent=1) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read manifest.json. Raises: DataError when it is not one of this schema."""
        path = folder / MANIFEST
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            if told.get("schema") != SCHEMA:
                raise ValueError(f"schema {SCHEMA} expected, got {told.get('schema')!r}")
            told.pop("samples", None)
            told["shards"] = tuple(ShardInfo(**shard) for shard in told["shards"])
            return cls(**told)
        except FileNotFoundError as error:
            raise DataError(
                f"{folder}: a folder with {MANIFEST} expected; `focus data convert` writes one"
            ) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path}: a dataset manifest expected: {error}") from error


class Dataset:
    """The samples of one folder of shards, by number 0 .. len - 1 in the order of its shards.

    Samples that validation named broken are in `denied`; missing or cut shards are found while
    reading and cost their samples only.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        self.reader = ShardReader(self.folder)
        self._first = np.cumsum([0, *(shard.samples for shard in self.manifest.shards)])
        self.rows = self._read_rows()
        self.denied = self._read_denied()
        self._usable: dict[tuple[int, int], npt.NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def fingerprint(self) -> str:
        """Changes whenever another order of samples could come out: shards, sizes, deny list."""
        told = [(shard.name, shard.samples, shard.sha256) for shard in self.manifest.shards]
        text = json.dumps([SCHEMA, told, self.denied.tolist()])
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()

    def _read_rows(self) -> Rows:
        found = []
        for shard in self.manifest.shards:
            path = self.folder / f"{shard.name}.rows.npy"
            try:
                rows = np.load(path, allow_pickle=False)
                if rows.dtype != ROW or len(rows) != shard.samples:
                    raise ValueError(f"{shard.samples} rows expected, got {len(rows)}")
            except (OSError, ValueError, EOFError) as error:
                raise DataError(
                    f"{path}: the rows of the shard expected: {error}; "
                    "`focus data validate --repair` writes them anew"
                ) from error
            found.append(rows)
        return np.concatenate(found) if found else np.zeros(0, ROW)

    def _read_denied(self) -> npt.NDArray[np.int64]:
        path = self.folder / BAD
        if not path.exists():
            return np.zeros(0, np.int64)
        told = json.loads(path.read_text())
        first = {s.name: int(f) for s, f in zip(self.manifest.shards, self._first, strict=False)}
        return np.array(
            sorted(
                first[name] + int(n) for name, bad in told.items() for n in bad if name in first
            ),
            np.int64,
        )

    def place(self, number: int) -> tuple[str, int]:
        """The shard of a sample and its number there."""
        shard = int(np.searchsorted(self._first, number, "right")) - 1
        return self.manifest.shards[shard].name, number - int(self._first[shard])

    def read(self, number: int) -> Encoded:
        """Read sample `number`, undecoded. Raises `BadSample`."""
        shard, own = self.place(number)
        key, members = self.reader.read(shard, own)
        return parse(key, members)

    def usable(self, task: int, bucket: int) -> npt.NDArray[np.int64]:
        """Numbers of the samples of a task and bucket that are not denied."""
        if (task, bucket) not in self._usable:
            fits = (self.rows["task"] == task) & (self.rows["bucket"] == bucket)
            fits[self.denied] = False
            self._usable[task, bucket] = np.flatnonzero(fits)
        return self._usable[task, bucket]

    def groups(self, task: str) -> dict[int, npt.NDArray[np.int64]]:
        """The task's usable samples by bucket; those past the crop rule are not among them."""
        number = SHARD_TASKS.index(task)
        own = self.rows[self.rows["task"] == number]["bucket"]
        return {int(b): self.usable(number, int(b)) for b in np.unique(own) if b > -2}

    def cropped_away(self, task: str) -> int:
        """How many of the task's samples the crop rule leaves out."""
        return int(
            ((self.rows["task"] == SHARD_TASKS.index(task)) & (self.rows["bucket"] == -2)).sum()
        )


class Tally:
    """Counts what came through and what was left out, by reason; stops when that is too much.

    Raises: DataError once more than `share` of at least `least` samples, or `row` samples in a
    row, were bad.
    """

    def __init__(
        self, share: float = 0.1, least: int = 200, row: int = 100, log: Path | None = None
    ) -> None:
        self.share, self.least, self.row, self.log = share, least, row, log
        self.good = 0
        self.bad: Counter[str] = Counter()
        self._run = 0
        self._last: BadSample | None = None

    def count(self, number: int = 1) -> None:
        """Samples came through."""
        self.good += number
        self._run = 0 if number else self._run

    def refuse(self, error: BadSample) -> None:
        """A sample was left out."""
        self.bad[error.reason] += 1
        self._run += 1
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as file:
                line = {"key": error.key, "reason": error.reason, "text": error.text}
                file.write(json.dumps(line) + "\n")
        self._last = error
        self.check()

    def add(self, good: int, bad: Sequence[BadSample]) -> None:
        """Count what came through elsewhere, without looking at the limits."""
        self.count(good)
        self.bad.update(error.reason for error in bad)
        self._run += 0 if good else len(bad)
        self._last = bad[-1] if bad else self._last

    def check(self) -> None:
        """Raise DataError when too many samples were bad."""
        total = self.bad.total()
        if self._run >= self.row or (
            total + self.good >= self.least and total > self.share * (total + self.good)
        ):
            raise DataError(
                f"at most {self.share:.0%} bad samples expected, got {total} of "
                f"{total + self.good} ({self._run} in a row): {dict(self.bad.most_common())}; the "
                f"last: {self._last}. Run `focus data validate`, or raise the limit"
            )

    def facts(self) -> dict[str, float]:
        """Numbers for logs and TensorBoard."""
        return {"data/good": float(self.good)} | {
            f"data/bad_{reason}": float(count) for reason, count in sorted(self.bad.items())
        }


def count_tasks(rows: Iterable[Rows]) -> dict[str, int]:
    """Samples of each task."""
    counts: Counter[str] = Counter()
    for one in rows:
        numbers, found = np.unique(one["task"], return_counts=True)
        counts.update({SHARD_TASKS[int(n)]: int(c) for n, c in zip(numbers, found, strict=True)})
    return dict(sorted(counts.items()))


def read_bad(folder: Path) -> dict[str, Any]:
    """The deny list of a folder: {shard: {number: reason}}."""
    path = folder / BAD
    return json.loads(path.read_text()) if path.exists() else {}
