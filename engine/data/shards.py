"""WebDataset shards: written whole or not at all, read by position, never scanned.

NNNNN.tar       the samples, as webdataset and DALI read them
NNNNN.idx       where each member lies, in DALI's text form (v1.2): ext offset size name ...
NNNNN.rows.npy  one row per sample: task, bucket, size; what a sampler must know beforehand
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.data.guard import BadSample, Header
from engine.data.scene_model import DataError
from engine.data.schema import SHARD_TASKS
from focus.buckets import BUCKETS, Bucket, match_bucket

BLOCK = 512
INDEX_VERSION = "v1.2"
ROW = np.dtype([("task", "u1"), ("bucket", "i1"), ("height", "u2"), ("width", "u2")])
Rows = npt.NDArray[np.void]  # of ROW
NO_PICTURE, CROPPED_AWAY = -1, -2
RATIO_BUCKETS: tuple[Bucket, ...] = BUCKETS[1:]  # the eleven shapes; the first is the small square
MAX_CROP = 0.2


def crop_share(height: int, width: int, bucket: Bucket) -> float:
    """Share of a picture that a centred crop to the bucket's shape cuts away."""
    ratio = (width / height) / (bucket.size[1] / bucket.size[0])
    return 1 - min(ratio, 1 / ratio)


def bucket_number(height: int, width: int) -> int:
    """Number of the nearest of the eleven shapes, or `CROPPED_AWAY` past the crop rule."""
    bucket = match_bucket(height, width, RATIO_BUCKETS)
    if crop_share(height, width, bucket) > MAX_CROP:
        return CROPPED_AWAY
    return RATIO_BUCKETS.index(bucket)


def make_row(task: str, header: Header | None) -> tuple[int, int, int, int]:
    """The `ROW` of a sample."""
    if header is None:
        return SHARD_TASKS.index(task), NO_PICTURE, 0, 0
    number = bucket_number(header.height, header.width)
    return SHARD_TASKS.index(task), number, header.height, header.width


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """What the manifest knows of one shard."""

    name: str
    samples: int
    bytes: int
    sha256: str


class ShardWriter:
    """Writes one shard; a reader sees nothing before `close`, and all of it after."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        folder.mkdir(parents=True, exist_ok=True)
        self._partial = folder / f".{name}.tar.partial"
        self._file = self._partial.open("wb")
        self._digest = hashlib.sha256()
        self._at = 0
        self._lines: list[str] = []
        self._rows: list[tuple[int, int, int, int]] = []
        self._keys: set[str] = set()

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self, key: str, members: Sequence[tuple[str, bytes]], row: tuple[int, int, int, int]
    ) -> None:
        """Append one sample. Raises: DataError for a key that the shard already holds."""
        if key in self._keys:
            raise DataError(f"{self.name}: unique keys expected, got {key!r} twice")
        self._keys.add(key)
        line = []
        for ending, data in members:
            info = tarfile.TarInfo(f"{key}.{ending}")
            info.size = len(data)
            self._put(info.tobuf(tarfile.USTAR_FORMAT))
            line.append(f"{ending} {self._at} {len(data)} {info.name}")
            self._put(data + bytes(-len(data) % BLOCK))
        self._lines.append(" ".join(line))
        self._rows.append(row)

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._at += len(data)

    def close(self) -> ShardInfo:
        """Finish the tar and publish it, index first and tar last."""
        self._put(bytes(2 * BLOCK))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = "\n".join([f"{INDEX_VERSION} {len(self._lines)}", *self._lines]) + "\n"
        write_atomic(self.folder / f"{self.name}.idx", index.encode())
        save_rows(self.folder / f"{self.name}.rows.npy", np.array(self._rows, ROW))
        self._partial.replace(self.folder / f"{self.name}.tar")
        return ShardInfo(
            name=self.name,
            samples=len(self._rows),
            bytes=self._at,
            sha256=self._digest.hexdigest(),
        )

    def abandon(self) -> None:
        """Give up: leave nothing behind."""
        self._file.close()
        self._partial.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file that is either the old one or the whole new one."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def save_rows(path: Path, rows: Rows) -> None:
    """Write the rows of a shard atomically."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        np.save(file, rows, allow_pickle=False)
    partial.replace(path)


@dataclass(frozen=True)
class Place:
    """Where one member lies."""

    ending: str
    offset: int
    size: int
    name: str


def read_index(path: Path) -> list[tuple[Place, ...]]:
    """Read an index file. Raises: DataError when it is not one."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        version, count = lines[0].split()
        if version not in ("v1.1", INDEX_VERSION) or int(count) != len(lines) - 1:
            raise ValueError(f"{lines[0]!r} above {len(lines) - 1} lines")
        return [_read_line(line.split(), version) for line in lines[1:]]
    except (ValueError, IndexError) as error:
        raise DataError(
            f"{path}: an index ({INDEX_VERSION} N, then N lines) expected: {error}"
        ) from error


def _read_line(words: list[str], version: str) -> tuple[Place, ...]:
    width = 4 if version == INDEX_VERSION else 3
    if len(words) % width or not words:
        raise ValueError(f"{len(words)} words in a line")
    found = []
    for at in range(0, len(words), width):
        name = words[at + 3] if width == 4 else ""
        found.append(Place(words[at], int(words[at + 1]), int(words[at + 2]), name))
    return tuple(found)


class ShardReader:
    """Reads samples of the shards of one folder by (shard, number); keeps a few files open."""

    def __init__(self, folder: Path, keep: int = 64) -> None:
        self.folder = folder
        self.keep = keep
        self._open: OrderedDict[str, tuple[int, list[tuple[Place, ...]]]] = OrderedDict()

    def read(self, shard: str, number: int) -> tuple[str, dict[str, bytes]]:
        """Return a sample's key and its members by ending.

        Raises: BadSample for a shard that is gone or cut, or an index that does not fit it.
        """
        file, index = self._shard(shard)
        if number >= len(index):
            raise BadSample("stale_index", f"{shard} has {len(index)} samples, not {number + 1}")
        places = index[number]
        key = places[0].name.partition(".")[0]
        members = {}
        for place in places:
            members[place.ending] = self._member(file, shard, place, key)
        return key, members

    def _member(self, file: int, shard: str, place: Place, key: str) -> bytes:
        try:
            data = os.pread(file, BLOCK + place.size, place.offset - BLOCK)
        except OSError as error:
            raise BadSample("shard_missing", f"{shard}: {error.strerror}", key) from error
        if len(data) < BLOCK + place.size:
            raise BadSample("shard_truncated", f"{shard} ends inside {place.name}", key)
        if place.name and data[:100].rstrip(b"\0").decode("utf-8", "replace") != place.name[:100]:
            raise BadSample("stale_index", f"{shard}: {place.name} is not where it should be", key)
        return data[BLOCK:]

    def _shard(self, shard: str) -> tuple[int, list[tuple[Place, ...]]]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        try:
            index = read_index(self.folder / f"{shard}.idx")
            file = os.open(self.folder / f"{shard}.tar", os.O_RDONLY)
        except OSError as error:
            raise BadSample("shard_missing", f"{shard}: {error.strerror}") from error
        except DataError as error:
            raise BadSample("stale_index", str(error)) from error
        self._open[shard] = (file, index)
        if len(self._open) > self.keep:
            os.close(self._open.popitem(last=False)[1][0])
        return self._open[shard]

    def close(self) -> None:
        """Close every file."""
        while self._open:
            os.close(self._open.popitem()[1][0])

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "keep": self.keep, "_open": OrderedDict()}
