"""The built-in world's training samples as shards, written once and read from then on.

The default road of every stage that draws records. One shard holds one micro-batch: the samples
FIRST .. FIRST + SIZE - 1 of a task. So only the steps that are done are written, any run of the
same seed and picture size reads what another has written, with any number of ranks, and a resumed
run finds its exact next samples. What comes out is what would have been drawn, to the last pixel.

A shard that is missing, cut or broken is drawn again; past the limit, and where nothing can be
written, samples are drawn and not kept.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from engine.data.guard import BadSample
from engine.data.loader import Loader, Settings
from engine.data.mixture import Part, Pick
from engine.data.pil import Decoder
from engine.data.records import Record, Task
from engine.data.sampler import Slot
from engine.data.scene_model import DataError
from engine.data.scenes import sample
from engine.data.schema import Encoded, encode, parse
from engine.data.shards import ShardReader, ShardWriter, make_row
from engine.data.views import Sizes
from engine.data.world import to_item

FOLDER = "FOCUS_CACHE"  # environment: where, instead of the user's cache folder
LIMIT = "FOCUS_CACHE_GB"  # environment: how much at most; 0 keeps nothing
GB = 4.0
LOOK = 256  # shards written between two looks at how much all processes have written
ENDINGS = (".idx", ".rows.npy", ".tar")  # in the order of publishing: the tar comes last


def cache_folder() -> Path:
    """Folder of everything that FOCUS may write anew: $FOCUS_CACHE or the user's cache folder."""
    told = os.environ.get(FOLDER)
    if told:
        return Path(told)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "focus"


def cache_limit() -> int:
    """Bytes that all cached worlds together may take. Raises: DataError when it is no number."""
    told = os.environ.get(LIMIT, str(GB))
    try:
        return int(float(told) * 1e9)
    except (ValueError, OverflowError) as error:
        raise DataError(f"{LIMIT}: a number of gigabytes expected, got {told!r}") from error


@cache
def world_version() -> str:
    """Changes with every line of code that draws or stores the built-in world."""
    digest = hashlib.blake2b(np.__version__.encode(), digest_size=6)
    here = Path(__file__).parent
    stored = [here / name for name in ("world.py", "schema.py", "layers.py", "shards.py")]
    for path in [*sorted(here.glob("scene*.py")), *stored]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One cached micro-batch, as a loader reads it (`loader.Samples`)."""

    reader: ShardReader
    name: str

    def read(self, number: int) -> Encoded:
        """Read sample `number`, undecoded. Raises `BadSample`."""
        return parse(*self.reader.read(self.name, number))


class Single:
    """The order of one shard: all its samples, once (`loader.Order`)."""

    def __init__(self, shard: Shard, task: str, count: int) -> None:
        self.parts: Sequence[Part] = (Part(dataset="", task=task, weight=1.0, size=count),)
        self.datasets = {"": shard}
        self.seed = 0
        self.next = 0

    def pick(self, index: int) -> Pick:
        """The micro-batch."""
        numbers = np.arange(self.parts[0].size, dtype=np.int64)
        return Pick(
            index, 0, self.parts[0].task, Slot(numbers=numbers, bucket=0, epoch=0, position=0)
        )


class WorldCache:
    """Samples of the training split of one seed at one picture size (height, width)."""

    def __init__(self, seed: int, size: tuple[int, int]) -> None:
        self.seed = seed
        self.size = size
        self.root = cache_folder() / "world"
        self.folder = self.root / world_version() / f"{seed}-{size[0]}x{size[1]}"
        self.settings = Settings(
            frame=size, sizes=Sizes(frame=size, vit=size, pixel=size), crop=False
        )
        self.written = 0  # shards, by this process
        self._free: int | None = None

    def records(self, task: str, first: int, count: int, decoder: Decoder) -> list[Record]:
        """Samples `first` .. `first + count - 1` of a task."""
        name = f"{task}-{first:09d}-{count}"
        kept = self._read(name, task, count, decoder)
        if kept is not None:
            return kept
        drawn = [
            sample(cast(Task, task), "train", self.seed, first + number, self.size)
            for number in range(count)
        ]
        if not self._write(name, drawn):
            return drawn
        return self._read(name, task, count, decoder) or drawn

    def _read(self, name: str, task: str, count: int, decoder: Decoder) -> list[Record] | None:
        """The records of a shard; None when it is not there or not whole."""
        if not (self.folder / f"{name}.tar").is_file():
            return None
        reader = ShardReader(self.folder)
        order = Single(Shard(reader=reader, name=name), task, count)
        try:
            loaded = Loader(order, decoder, self.settings).load(order.pick(0))
        except (BadSample, DataError):
            return None
        finally:
            reader.close()
        return None if loaded.lost else list(loaded.records)

    def _write(self, name: str, drawn: Sequence[Record]) -> bool:
        """Publish a shard; False where there is no room or no right to write.

        Each process writes in a folder of its own and moves the files into place. Two that draw the
        same shard write the same bytes, so whichever comes last changes nothing.
        """
        if not self._room():
            return False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".part-", dir=self.folder) as own:
                writer = ShardWriter(Path(own), name)
                for record in drawn:
                    members, header = encode(to_item(record))
                    writer.add(record.id, members, make_row(record.task, header))
                size = writer.close().bytes
                for ending in ENDINGS:
                    (Path(own) / f"{name}{ending}").replace(self.folder / f"{name}{ending}")
        except OSError as error:
            self._free = 0
            warnings.warn(
                f"{self.folder}: the built-in world is drawn anew at every run, since its samples "
                f"cannot be kept: {error}; set {FOLDER} to a folder with room",
                stacklevel=2,
            )
            return False
        self.written += 1
        assert self._free is not None
        self._free -= size
        return True

    def _room(self) -> bool:
        """Whether another shard may be written; worlds of other versions make room first."""
        if self._free is None or (self._free > 0 and self.written % LOOK == LOOK - 1):
            limit = cache_limit()
            taken = folder_bytes(self.root)
            if taken > limit:
                self._forget_others()
                taken = folder_bytes(self.root)
            self._free = limit - taken
        return self._free > 0

    def _forget_others(self) -> None:
        """Remove what earlier versions of the world have written."""
        for other in self.root.iterdir():
            if other.name != world_version():
                shutil.rmtree(other, ignore_errors=True)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; what vanishes meanwhile counts nothing."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(path, name)).st_size
            except OSError:
                continue
    return total


_caches: dict[Any, WorldCache] = {}  # of this process


def open_cache(seed: int, size: tuple[int, int]) -> WorldCache:
    """The cache of a world; it remembers how much room there is."""
    name = (seed, size, cache_folder(), cache_limit())
    if name not in _caches:
        _caches[name] = WorldCache(seed, size)
    return _caches[name]
