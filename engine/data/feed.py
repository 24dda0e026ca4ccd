"""The records of a run from shards: the run's schedule names the tasks, a mixture the samples.

Every (task, size) of the schedule has its own endless row of micro-batches (`Mixture`); which of
them a rank takes at a step is a pure function of the run. A checkpoint keeps how many of each row
all ranks together had drawn (`extra["drawn"]`, set by the training loop's ledger), so a training
goes on in the same order with any number of ranks.
"""

from __future__ import annotations

import os
import typing
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing import parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.data.guard import BadSample
from engine.data.loader import Loaded, Loader, Settings
from engine.data.manifest import MANIFEST, Dataset, Tally
from engine.data.mixture import TABLE_5, Mixture, Part, table_5
from engine.data.pil import Decoder, open_decoder
from engine.data.records import Record
from engine.data.scene_model import DataError
from engine.data.views import Augment, Sizes
from engine.run import Run, derive_seed
from focus.presets import CONFIGS

if TYPE_CHECKING:
    from engine.stages.stage import Micro

START = "drawn"  # key of run.extra: what `positions` returned for the step to go on from
# Values of run.extra["shards"] that are no folder: the built-in world, read from its cache (the
# default), or drawn anew at every step.
CACHE, LIVE = "cache", (None, "none", "live")
SPARES = 8  # other micro-batches to try where nothing of one can be read


@dataclass
class Drawn:
    """What this process read since somebody last asked: samples, and the ones left out."""

    good: int = 0
    bad: list[BadSample] = field(default_factory=list)
    replaced: int = 0  # micro-batches of which nothing was left

    def add(self, other: Drawn) -> None:
        """Count another's samples too."""
        self.good += other.good
        self.bad += other.bad
        self.replaced += other.replaced

    def __bool__(self) -> bool:
        return bool(self.good or self.bad or self.replaced)


class _Listener(Tally):
    """Hands every count on to `drawn`; the limits are the training loop's."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = Drawn()

    def count(self, number: int = 1) -> None:
        """Samples came through."""
        self.drawn.good += number

    def refuse(self, error: BadSample) -> None:
        """A sample was left out."""
        self.drawn.bad.append(error)


class Feed:
    """Reads the micro-batches of one run from the shards of one folder.

    `folder` holds a dataset, or one dataset in each of its folders; those that Table 5 names for
    the run's stage then weigh as there, others by their samples.
    Raises: DataError for a folder without datasets.
    """

    def __init__(self, run: Run, folder: Path) -> None:
        self.run = run
        self.datasets = {str(path): Dataset(path) for path in find_datasets(folder)}
        self.seed = int(run.extra.get("data_seed", run.seed))
        self.settings = settings_of(run)
        self.listener = _Listener()
        self._loaders: dict[tuple[str, int, int, bool], Loader] = {}

    def mixture(self, task: str, size: int, spare: int = 0, short: bool = False) -> Mixture:
        """The row of micro-batches of one task and size, `short` ones among them if asked.

        Raises: DataError without samples, or without enough for one micro-batch.
        """
        seed = derive_seed(self.seed, "spare", spare) if spare else self.seed
        parts = self._parts(task, size)
        if not parts:
            raise DataError(
                f"{', '.join(self.datasets)}: samples of task {task!r} expected, got none; convert "
                "a dataset that has them, or take the task out of micro_batches"
            )
        return Mixture(parts, derive_seed(seed, task, size), self.datasets, keep_short=short)

    def _parts(self, task: str, size: int) -> list[Part]:
        holding = {f: d.manifest.tasks.get(task, 0) for f, d in self.datasets.items()}
        holding = {folder: count for folder, count in holding.items() if count}
        weights = {folder: float(count) for folder, count in holding.items()}
        roots = {Path(folder).parent for folder in holding}
        if len(roots) == 1 and self.run.stage in TABLE_5:
            try:
                known = table_5(self.run.stage, roots.pop(), {}, size)
            except DataError:
                known = []
            told = {p.dataset: p.weight for p in known if p.task == task and p.dataset in holding}
            weights = told or weights
        return [Part(dataset=f, task=task, weight=w, size=size) for f, w in weights.items()]

    def records(self, run: Run, step: int, micro: Micro) -> list[Record]:
        """The records of one micro-batch; broken samples are left out and counted.

        A micro-batch of which nothing is left is replaced by one of another order, and counted.
        Raises: DataError when nothing readable is found.
        """
        index = index_of(run, step, micro)
        # What a stage measures before training may ask for more than a small dataset holds.
        short = (micro.task, micro.size) not in run.micro_batches
        for spare in range(SPARES + 1):
            loader = self._loader(micro.task, micro.size, spare, short)
            loaded: Loaded = loader.load(loader.mixture.pick(index))
            if loaded.records:
                return list(loaded.records)
            self.listener.drawn.replaced += 1
        lost = Counter(one.reason for one in self.listener.drawn.bad)
        last = f"; the last: {self.listener.drawn.bad[-1]}" if lost else ""
        raise DataError(
            f"a readable sample of task {micro.task!r} expected, got {SPARES + 1} micro-batches "
            f"without one: {dict(lost)}{last}. Run `focus data validate`"
        )

    def _loader(self, task: str, size: int, spare: int, short: bool) -> Loader:
        name = (task, size, spare, short)
        if name not in self._loaders:
            mixture = self.mixture(*name)
            pairs = float(self.run.extra.get("track_weight", 0.0)) > 0
            self._loaders[name] = Loader(
                mixture, decoder_of(self.run), self.settings, self.listener, pairs=pairs
            )
        self._loaders[name].decoder = decoder_of(self.run)
        return self._loaders[name]

    def fingerprint(self, run: Run) -> str:
        """Changes whenever another order of samples could come out."""
        rows = [self.mixture(t, s).fingerprint for t, s in sorted(set(run.micro_batches))]
        return f"{derive_seed(*rows, self.settings):016x}"

    def take(self) -> Drawn:
        """What was read since the last call."""
        drawn, self.listener.drawn = self.listener.drawn, Drawn()
        return drawn


def find_datasets(folder: Path) -> list[Path]:
    """The dataset at `folder`, or those in its folders. Raises: DataError without any."""
    if (folder / MANIFEST).is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    if not found:
        raise DataError(
            f"{folder}: a dataset, or folders of datasets, expected; `focus data world RUN --out "
            f"{folder}` writes a run's own scenes there, `focus data convert` other datasets"
        )
    return found


def settings_of(run: Run) -> Settings:
    """Whole pictures in the frame of the run's model; its other copies are derived from it."""
    frame = CONFIGS[run.model]().hierarchical.image_size
    asked: Mapping[str, Any] = run.extra.get("augment", {})
    try:
        augment = Augment(**asked)
    except TypeError as error:
        raise DataError(f"extra.augment: flip, brightness, contrast, shift: {error}") from error
    sizes = Sizes(frame=frame, vit=frame, pixel=frame)
    return Settings(frame=frame, sizes=sizes, crop=False, augment=augment)


def turns_before(run: Run, task: str, size: int, step: int, number: int = 0) -> int:
    """How many micro-batches of a task and size one rank has had before `number` of `step`."""
    hits = [pair == (task, size) for pair in run.micro_batches]
    per_step = int(run.extra.get("tasks_per_step", len(hits)))
    rounds, rest = divmod(step * per_step + number, len(hits))
    return rounds * sum(hits) + sum(hits[:rest])


def index_of(run: Run, step: int, micro: Micro) -> int:
    """Number of a micro-batch in its task's row, over all ranks there ever were."""
    start = run.extra.get(START, {})
    own = turns_before(run, micro.task, micro.size, step, micro.number)
    own -= turns_before(run, micro.task, micro.size, start.get("step", 0))
    before = int(start.get("before", {}).get(f"{micro.task}/{micro.size}", 0))
    return before + own * micro.ranks + micro.rank


def positions(run: Run, step: int, ranks: int) -> dict[str, Any]:
    """How many micro-batches of each row are drawn before `step`, the last of them by `ranks`."""
    start = run.extra.get(START, {})
    before = {}
    for task, size in sorted(set(run.micro_batches)):
        name = f"{task}/{size}"
        own = turns_before(run, task, size, step)
        own -= turns_before(run, task, size, start.get("step", 0))
        before[name] = int(start.get("before", {}).get(name, 0)) + own * ranks
    return {"step": step, "before": before}


_decoders: dict[tuple[int, str, int], Decoder] = {}


def decoder_of(run: Run) -> Decoder:
    """This process's decoder: threads do not survive a fork, and the parent opens none."""
    name = str(run.extra.get("loader", "auto"))
    if name == "auto" and run.workers and parent_process() is None:
        name = "pil"
    key = os.getpid(), name, int(run.extra.get("decode_threads", 1))
    if key not in _decoders:
        _decoders[key] = open_decoder(*key[1:])
    return _decoders[key]


_feeds: dict[tuple[str, str], Feed] = {}  # of this process


def open_feed(run: Run) -> Feed | None:
    """The feed of a run that reads a folder of shards, None for the built-in world."""
    folder = run.extra.get("shards", CACHE)
    if folder in (CACHE, *LIVE):
        return None
    plain = {k: v for k, v in run.extra.items() if k not in (START, "tasks_per_step")}
    name = (str(folder), repr((run.name, run.seed, run.model, run.stage, run.workers, plain)))
    if name not in _feeds:
        _feeds[name] = Feed(run, Path(typing.cast(str, folder)))
    return _feeds[name]


def take_drawn(run: Run) -> Drawn:
    """What the run's feed read in this process since the last call; nothing without shards."""
    feed = open_feed(run)
    return Drawn() if feed is None else feed.take()
