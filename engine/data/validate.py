"""Every sample of a dataset decoded once: what is broken is named, counted and denied."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.data.guard import BadSample, check_picture, decode_picture
from engine.data.manifest import BAD, MANIFEST, Dataset, Manifest
from engine.data.schema import SHARD_TASKS, decode, parse
from engine.data.shards import (
    RATIO_BUCKETS,
    ROW,
    ShardInfo,
    ShardReader,
    make_row,
    read_index,
    save_rows,
    write_atomic,
)

Progress = Callable[[int, int], None]  # samples done, of how many


@dataclass(kw_only=True)
class Report:
    """What validation found. broken: (shard, number, key, reason, text)."""

    samples: int = 0
    broken: list[tuple[str, int, str, str, str]] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)  # remarks about whole shards

    @property
    def reasons(self) -> dict[str, int]:
        """Broken samples by reason."""
        return dict(sorted(Counter(reason for *_, reason, _ in self.broken).items()))

    @property
    def sound(self) -> bool:
        """Whether nothing at all was found."""
        return not self.broken and not self.shards


def validate(folder: Path, deny: bool = False, progress: Progress | None = None) -> Report:
    """Decode every sample of a dataset; with `deny`, write bad.json so that loaders leave them out.

    Raises: DataError when the folder holds no dataset.
    """
    manifest = Manifest.read(folder)
    report = Report()
    for shard in manifest.shards:
        _check_file(folder, shard, report)
        reader = ShardReader(folder)
        keys: set[str] = set()
        for number in range(shard.samples):
            report.samples += 1
            try:
                _check_sample(reader, shard.name, number, keys)
            except BadSample as error:
                report.broken.append((shard.name, number, error.key, error.reason, error.text))
            if progress is not None:
                progress(report.samples, manifest.samples)
        reader.close()
    for partial in sorted(folder.glob(".*.partial")):
        report.shards.append(f"{partial.name}: half written; it is ignored and may be removed")
    if deny:
        told: dict[str, dict[str, str]] = {}
        for name, number, _, reason, _ in report.broken:
            told.setdefault(name, {})[str(number)] = reason
        write_atomic(folder / BAD, json.dumps(told, indent=1).encode())
    return report


def _check_file(folder: Path, shard: ShardInfo, report: Report) -> None:
    digest = hashlib.sha256()
    try:
        with (folder / f"{shard.name}.tar").open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
            size = file.tell()
    except OSError as error:
        report.shards.append(f"{shard.name}.tar: {error.strerror}")
        return
    if size != shard.bytes:
        report.shards.append(f"{shard.name}.tar: {shard.bytes} bytes expected, got {size}")
    elif digest.hexdigest() != shard.sha256:
        report.shards.append(f"{shard.name}.tar: its SHA-256 is not the manifest's")


def _check_sample(reader: ShardReader, shard: str, number: int, keys: set[str]) -> None:
    key, members = reader.read(shard, number)
    if key in keys:
        raise BadSample("bad_schema", "a second sample of this key", key)
    keys.add(key)
    item = decode(parse(key, members))
    for data in (item.image, item.target, *item.frames):
        if data is not None:
            try:
                decode_picture(data)
            except BadSample as error:
                raise error.named(key) from error


def repair_rows(folder: Path) -> int:
    """Write missing rows files anew from the shards; return how many."""
    repaired = 0
    told = json.loads((folder / MANIFEST).read_text())
    for shard in told["shards"]:
        path = folder / f"{shard['name']}.rows.npy"
        if path.exists():
            continue
        reader = ShardReader(folder)
        rows = []
        for number in range(len(read_index(folder / f"{shard['name']}.idx"))):
            try:
                item = decode(parse(*reader.read(shard["name"], number)))
                data = item.picture
                rows.append(make_row(item.task, None if data is None else check_picture(data)))
            except BadSample:
                rows.append((255, -3, 0, 0))  # of no task: never drawn
        save_rows(path, np.array(rows, ROW))
        repaired += 1
    return repaired


def statistics(dataset: Dataset) -> dict[str, object]:
    """Counts of a dataset by task and shape, sizes, and what the crop rule leaves out."""
    rows, tasks = dataset.rows, {}
    for number, task in enumerate(SHARD_TASKS):
        own = rows[rows["task"] == number]
        if not len(own):
            continue
        shapes = {
            "x".join(map(str, bucket.size)): int((own["bucket"] == place).sum())
            for place, bucket in enumerate(RATIO_BUCKETS)
        }
        pictured = own[own["height"] > 0]
        tasks[task] = {
            "samples": len(own),
            "shapes": {name: count for name, count in shapes.items() if count},
            "cropped_away": dataset.cropped_away(task),
            "mean_size": [round(float(pictured[n].mean())) for n in ("height", "width")]
            if len(pictured)
            else None,
        }
    return {
        "name": dataset.manifest.name,
        "format": dataset.manifest.format,
        "source": dataset.manifest.source,
        "licence": dataset.manifest.licence,
        "samples": len(dataset),
        "denied": len(dataset.denied),
        "shards": len(dataset.manifest.shards),
        "bytes": sum(shard.bytes for shard in dataset.manifest.shards),
        "skipped": dict(dataset.manifest.skipped),
        "tasks": tasks,
    }
