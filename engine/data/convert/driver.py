"""Carry a conversion out: several processes, any number of interruptions, one manifest."""

from __future__ import annotations

import json
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.convert.format import Lazy, Options
from engine.data.convert.registry import find_format
from engine.data.guard import BadSample
from engine.data.manifest import MANIFEST, Manifest, count_tasks
from engine.data.scene_model import DataError
from engine.data.schema import encode
from engine.data.shards import ShardInfo, ShardWriter, make_row, write_atomic

JOB = "job.json"
DONE = "done"  # folder of one JSON per finished shard
Progress = Callable[[int, int], None]  # source samples done, shards done


@dataclass(frozen=True, kw_only=True)
class Job:
    """One conversion; a folder holds one job, and only the same job goes on in it.

    source: the dataset's folder. licence: recorded as given. per_shard: source samples per shard.
    workers: processes; the shards do not depend on it. rle: masks as RLE instead of maps.
    limit: stop after that many source samples (0 = all).
    """

    format: str
    source: Path
    out: Path
    name: str = ""
    licence: str = "unknown"
    options: Options = field(default_factory=Options)
    per_shard: int = 1000
    workers: int = 1
    rle: bool = False
    limit: int = 0

    def identity(self) -> dict[str, Any]:
        """What must be equal for a conversion to go on."""
        told = asdict(self)
        for free in ("out", "workers", "name", "licence"):
            told.pop(free)
        return json.loads(json.dumps(told, default=str))  # type: ignore[no-any-return]


def convert(job: Job, progress: Progress | None = None) -> Manifest:
    """Write `job.out`: shards, indices and the manifest. Finished shards are not written again.

    Samples that cannot be used are named with their reason in skipped.jsonl and counted in the
    manifest. Raises: DataError for an unknown format or layout, another job's folder, or no sample.
    """
    find_format(job.format)
    job.out.mkdir(parents=True, exist_ok=True)
    _claim(job)
    if job.workers > 1:
        context = multiprocessing.get_context("fork")
        with context.Pool(job.workers) as pool:
            pending = [pool.apply_async(_work, (job, rank)) for rank in range(job.workers)]
            for one in pending:
                while not one.ready():
                    one.wait(0.5)
                    _report(job, progress)
                one.get()
    else:
        _work(job, 0, progress)
    _report(job, progress)
    return _finish(job)


def _claim(job: Job) -> None:
    path = job.out / JOB
    if path.exists():
        earlier = json.loads(path.read_text())
        if earlier != job.identity():
            changed = [k for k, v in job.identity().items() if earlier.get(k) != v]
            raise DataError(
                f"{job.out} holds another conversion (other {', '.join(changed)}); choose another "
                "folder or remove it"
            )
    elif (job.out / MANIFEST).exists():
        raise DataError(f"{job.out} holds a dataset; choose another folder")
    else:
        write_atomic(path, json.dumps(job.identity()).encode())
    (job.out / DONE).mkdir(exist_ok=True)


def _report(job: Job, progress: Progress | None) -> None:
    if progress is not None:
        done = list((job.out / DONE).glob("*.json"))
        progress(sum(json.loads(path.read_text())["seen"] for path in done), len(done))


def _work(job: Job, rank: int, progress: Progress | None = None) -> None:
    """Write the shards whose number is `rank` modulo the number of workers."""
    samples = find_format(job.format).convert(job.source, job.options)
    numbered = enumerate(islice(samples, job.limit or None))
    for number, group in groupby(numbered, key=lambda pair: pair[0] // job.per_shard):
        name = f"{number:05d}"
        done = job.out / DONE / f"{name}.json"
        if number % job.workers != rank or done.exists():
            continue
        told = _write_shard(job, name, (lazy for _, lazy in group))
        write_atomic(done, json.dumps(told).encode())
        _report(job, progress)


def _write_shard(job: Job, name: str, group: Iterator[Lazy]) -> dict[str, Any]:
    """Write one shard; return its record: its info and what was left out of it."""
    writer = ShardWriter(job.out, name)
    skipped = []
    seen = 0
    try:
        for lazy in group:
            seen += 1
            try:
                item = lazy.make()
                members, header = encode(item, rle=job.rle)
                writer.add(item.key, members, make_row(item.task, header))
            except DataError as error:
                reason = error.reason if isinstance(error, BadSample) else "bad_schema"
                skipped.append({"name": lazy.name, "reason": reason, "text": str(error)})
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                text = f"{type(error).__name__}: {error}"
                skipped.append({"name": lazy.name, "reason": "bad_schema", "text": text})
    except BaseException:
        writer.abandon()
        raise
    if not len(writer):
        writer.abandon()
        return {"seen": seen, "shard": None, "skipped": skipped}
    return {"seen": seen, "shard": asdict(writer.close()), "skipped": skipped}


def _finish(job: Job) -> Manifest:
    """Write skipped.jsonl and, last, the manifest."""
    told = [json.loads(p.read_text()) for p in sorted((job.out / DONE).glob("*.json"))]
    shards = tuple(ShardInfo(**one["shard"]) for one in told if one["shard"])
    skipped = [line for one in told for line in one["skipped"]]
    lines = "".join(json.dumps(line) + "\n" for line in skipped)
    write_atomic(job.out / "skipped.jsonl", lines.encode())
    if not shards:
        first = f"; the first: {skipped[0]}" if skipped else ""
        raise DataError(f"{job.source}: no usable sample of {job.format}{first}")
    rows = (np.load(job.out / f"{s.name}.rows.npy", allow_pickle=False) for s in shards)
    version = "source"
    with suppress(metadata.PackageNotFoundError):
        version = metadata.version("focus-vl")
    manifest = Manifest(
        name=job.name or job.out.name,
        format=job.format,
        source=job.source.name,
        licence=job.licence,
        shards=shards,
        tasks=count_tasks(rows),
        skipped=dict(sorted(Counter(line["reason"] for line in skipped).items())),
        version=version,
    )
    manifest.write(job.out)
    return manifest
