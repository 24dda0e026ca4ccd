"""Loading pictures: ours (PIL, DALI) against torch's DataLoader and webdataset, on the same shards.

    python -m bench data [--json FILE] [--samples 400] [--rounds 5] [--memory 50000]

Every loader does the same work: decode a picture once, crop it to its bucket, resample it to the
768 x 768 frame, to the bucket's pixel copy and to its ViT copy, sample its mask map into the frame.
That the copies are equal is checked before anything is timed. Loaders run in turns in one process
tree; what is printed is the median over the rounds of the CPU time of all processes (user and
system) and of the wall clock. The peers are PIL as a careful user writes it; ours also checks every
sample, reads by position and builds records.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow

from engine.data.loader import Loader, Settings
from engine.data.manifest import Dataset, Manifest
from engine.data.mixture import Mixture, Part
from engine.data.pil import open_decoder
from engine.data.schema import Item, encode
from engine.data.shards import ShardWriter, bucket_number, make_row
from engine.data.views import Sizes, bucket_sizes, make_view

FRAME = (768, 768)
BATCH = 16
WORKERS = 2
LEAST = 5 * BATCH  # samples of a round: a batch for start-up and one for each worker, twice
SAME = 1.0  # levels of 255, on average, by which two loaders' copies may differ
SIZES = ((640, 480), (480, 640), (768, 1024), (600, 800), (960, 640), (512, 512), (700, 1240))
# Samples a second that an 8-GPU node asks for, at the batch of Table 6 and a step every second.
NODE_BATCH = {"tokenizer": 256, "diffusion": 128, "warmup": 512, "pretrain": 128, "instruct": 256}


def write_shards(folder: Path, samples: int, seed: int = 0, shrink: int = 1) -> None:
    """Photographs in all but subject: smooth shapes under noise, JPEG 90, a mask each."""
    rng = np.random.default_rng(seed)
    infos = []
    for shard in range(4):
        writer = ShardWriter(folder, f"{shard:05d}")
        for number in range(samples // 4):
            height, width = SIZES[int(rng.integers(len(SIZES)))]
            size = height // shrink, width // shrink
            rough = 1 + size[0] // 24, 1 + size[1] // 24, 3
            coarse = rng.integers(0, 255, rough, dtype=np.uint8)
            image = np.asarray(
                Pillow.fromarray(coarse).resize(size[::-1], Pillow.Resampling.BICUBIC)
            )
            noisy = np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
            buffer = io.BytesIO()
            Pillow.fromarray(noisy).save(buffer, "JPEG", quality=90)
            mask = np.zeros(size, np.bool_)
            y, x = rng.integers(0, size[0] // 2), rng.integers(0, size[1] // 2)
            mask[y : y + size[0] // 3, x : x + size[1] // 3] = True
            item = Item(
                key=f"{shard}-{number}",
                task="class",
                classes=("thing",),
                image=buffer.getvalue(),
                masks=(mask,),
                labels=(0,),
            )
            members, header = encode(item)
            writer.add(item.key, members, make_row("class", header))
        infos.append(writer.close())
    Manifest(name="bench", format="bench", source="-", licence="-", shards=tuple(infos)).write(
        folder
    )


def by_pil(data: bytes, mask: bytes) -> tuple[Any, ...] | None:
    """What a careful peer does to one sample with PIL alone; None past the crop rule.

    One decode, three resamplings of the crop, the frame letterboxed in white, the mask into it.
    """
    opened = Pillow.open(io.BytesIO(data))
    number = bucket_number(opened.height, opened.width)
    if number < 0:
        return None
    view = make_view((opened.height, opened.width), bucket_sizes(number, FRAME))
    top, left, bottom, right = view.box
    box, corner = (left, top, right, bottom), view.offset[::-1]
    picture = opened if opened.mode == "RGB" else opened.convert("RGB")

    def cut(size: tuple[int, int]) -> Pillow.Image:
        return picture.resize(size[::-1], Pillow.Resampling.BICUBIC, box)

    frame = Pillow.new("RGB", FRAME[::-1], "white")
    frame.paste(cut(view.content), corner)
    levels = Pillow.new("L", FRAME[::-1])
    found = Pillow.open(io.BytesIO(mask))
    levels.paste(found.resize(view.content[::-1], Pillow.Resampling.NEAREST, box), corner)
    copies = (frame, cut(view.sizes.vit), cut(view.sizes.pixel))
    return *map(np.asarray, copies), np.asarray(levels) == 1


def check_equal(folder: Path, names: list[str], count: int = 8) -> dict[str, float]:
    """Mean difference, in levels of 255, of every decoder's copies from the peers'.

    Raises: RuntimeError when the work is not the same.
    """
    mixed = Mixture([Part(dataset=str(folder), task="class", weight=1, size=count)])
    dataset = mixed.datasets[str(folder)]
    found: dict[str, float] = {}
    for name in names:
        loaded = Loader(mixed, open_decoder(name, 1), Settings(frame=FRAME)).load(mixed.pick(0))
        apart = []
        for number, record, copies in zip(
            loaded.pick.slot.numbers.tolist(), loaded.records, loaded.pictures, strict=True
        ):
            encoded = dataset.read(number)
            theirs = by_pil(encoded.need(""), encoded.members["map.png"])
            assert theirs is not None and copies is not None
            for mine, other in zip((copies.frame, copies.vit, copies.pixel), theirs, strict=False):
                apart.append(float(np.abs(mine.astype(int) - other).mean()))
            apart.append(255 * float((record.masks[0] != theirs[3]).mean()))
        found[name] = max(apart)
        if found[name] > SAME:
            raise RuntimeError(f"{name}: copies within {SAME} levels expected, got {found[name]}")
    return found


def ours(folder: Path, decoder: str, count: int, frame: tuple[int, int] = FRAME) -> Iterator[int]:
    """Our loader: reading in a thread, decoding in two others."""
    mixed = Mixture([Part(dataset=str(folder), task="class", weight=1, size=BATCH)])
    sizes = None if frame == FRAME else Sizes(frame=frame, vit=frame, pixel=frame)
    settings = Settings(frame=frame, sizes=sizes)
    loader = Loader(mixed, open_decoder(decoder, WORKERS), settings)
    seen = 0
    for loaded in loader.run():
        seen += len(loaded.records)
        yield len(loaded.records)
        if seen >= count:
            return


class Rows:
    """A torch dataset: sample `n` of our shards, decoded with PIL."""

    def __init__(self, folder: Path) -> None:
        self.dataset = Dataset(folder)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> tuple[Any, ...] | None:
        encoded = self.dataset.read(number)
        return by_pil(encoded.need(""), encoded.members["map.png"])


def keep(rows: list[Any]) -> list[Any]:
    """Collate by leaving samples as they are (their shapes differ)."""
    return [row for row in rows if row is not None]


def torch_loader(folder: Path, count: int) -> Iterator[int]:
    """torch's DataLoader with two workers and PIL."""
    from torch.utils.data import DataLoader

    rows: Any = Rows(folder)
    loader = DataLoader(rows, BATCH, shuffle=True, num_workers=WORKERS, collate_fn=keep)
    yield from (len(batch) for batch in loader)


def web_loader(folder: Path, count: int) -> Iterator[int]:
    """webdataset with two workers and PIL."""
    from torch.utils.data import DataLoader

    def decode(sample: dict[str, Any]) -> tuple[Any, ...] | None:
        return by_pil(sample["jpg"], sample["map.png"])

    webdataset: Any = importlib.import_module("webdataset")
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    source = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(100).map(decode)
    loader = DataLoader(source, BATCH, num_workers=WORKERS, collate_fn=keep)
    yield from (len(batch) for batch in loader)


LOADERS: dict[str, tuple[bool, Callable[[Path, int], Iterator[int]], tuple[str, ...]]] = {
    "focus + PIL": (False, lambda f, n: ours(f, "pil", n), ()),
    "focus + DALI": (False, lambda f, n: ours(f, "dali", n), ("nvidia.dali",)),
    "torch DataLoader + PIL": (True, torch_loader, ()),
    "webdataset + PIL": (True, web_loader, ("webdataset",)),
}


def measure(folder: Path, name: str, samples: int) -> tuple[float, float]:
    """Run one loader in a process of its own: (CPU ms per sample, samples per second)."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            stream = LOADERS[name][1](folder, samples)
            next(stream)  # start-up: workers, the pipeline
            began, used, count, seconds, spent = time.perf_counter(), cpu_seconds(), 0, 0.0, 0.0
            for size in stream:
                count += size
                seconds, spent = time.perf_counter() - began, cpu_seconds() - used
            os.write(write, json.dumps([count, seconds, spent]).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    if not told or status:
        raise RuntimeError(f"{name} ended with status {status}")
    count, seconds, spent = json.loads(told)
    return 1000 * spent / count, count / seconds


def cpu_seconds() -> float:
    """User and system time of this process and of its children, living or ended."""
    import psutil

    own = psutil.Process()
    living = sum(sum(child.cpu_times()[:2]) for child in own.children(recursive=True))
    return float(sum(own.cpu_times()[:4]) + living)


def available(name: str) -> bool:
    """Whether a loader's packages are installed."""
    return all(
        importlib.util.find_spec(part.split(".")[0]) and importlib.util.find_spec(part)
        for part in LOADERS[name][2]
    )


def compare(folder: Path, samples: int, rounds: int) -> list[dict[str, Any]]:
    """Interleave the loaders; medians over the rounds."""
    names = [name for name in LOADERS if available(name)]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found[name].append(measure(folder, name, samples))
    return [
        {
            "loader": name,
            "is_peer": LOADERS[name][0],
            "cpu_ms_per_sample": round(statistics.median(cpu for cpu, _ in runs), 2),
            "samples_per_s": round(statistics.median(rate for _, rate in runs), 2),
        }
        for name, runs in found.items()
    ]


def memory(count: int) -> tuple[float, float]:
    """Resident MiB after the first tenth and at the end of `count` samples through our loader.

    The pictures are an eighth as wide as the others, so that many samples take minutes, not hours.
    """
    import psutil

    process = psutil.Process()
    with tempfile.TemporaryDirectory() as scratch:
        write_shards(Path(scratch), 400, shrink=8)
        stream = ours(Path(scratch), "auto", count, (64, 64))
        return _watch(stream, count, process)


def _watch(stream: Iterator[int], count: int, process: Any) -> tuple[float, float]:
    seen, early = 0, 0.0
    for size in stream:
        seen += size
        if not early and seen >= count / 10:
            early = process.memory_info().rss / 2**20
    return early, process.memory_info().rss / 2**20


def resume_seconds(folder: Path) -> float:
    """Longest time from a saved state to the first micro-batch's numbers, anywhere."""
    longest = 0.0
    for position in (0, 10**3, 10**6, 10**9):
        began = time.perf_counter()
        mixed = Mixture([Part(dataset=str(folder), task="class", weight=1, size=BATCH)])
        mixed.load_state({**mixed.state(), "next": position})
        next(mixed.picks())
        longest = max(longest, time.perf_counter() - began)
    return longest


def report(rows: list[dict[str, Any]]) -> list[str]:
    """The table, what it means for a node, and the ratio to the best peer."""
    lines = [f"{'loader':<26}{'CPU ms/sample':>15}{'samples/s':>12}"]
    lines += [
        f"{r['loader']:<26}{r['cpu_ms_per_sample']:>15.2f}{r['samples_per_s']:>12.1f}" for r in rows
    ]
    mine = min((r["cpu_ms_per_sample"] for r in rows if not r["is_peer"]), default=None)
    peer = min((r["cpu_ms_per_sample"] for r in rows if r["is_peer"]), default=None)
    if mine and peer:
        lines.append(f"CPU time of the best peer over ours: {peer / mine:.2f} (goal 1.4)")
    if mine:
        lines.append(f"per core {1000 / mine:.0f} samples/s; 8 GPUs at one step a second need:")
        for stage, batch in NODE_BATCH.items():
            lines.append(f"  {stage:<10} {batch} samples/s = {batch * mine / 1000:.1f} cores")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench data", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--shards", type=Path, metavar="DIR", help="shards to read (drawn anew)")
    parser.add_argument("--samples", type=int, default=400, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument(
        "--memory", type=int, default=0, metavar="N", help="samples to watch RSS over"
    )
    args = parser.parse_args(argv)
    if args.samples < LEAST:
        parser.error(f"--samples: at least {LEAST} expected, got {args.samples}; a loader's first "
                     "batch is not timed")  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.shards or Path(scratch)
        if args.shards is None:
            write_shards(folder, args.samples)
        decoders = ["pil"] + ["dali"] * available("focus + DALI")
        apart = check_equal(folder, decoders)
        rows = compare(folder, args.samples, args.rounds)
        told = ", ".join(f"{name} {value:.2f}" for name, value in apart.items())
        lines = [f"largest mean difference from the peers' copies, of 255: {told}"]
        lines += [*report(rows), f"resume: {resume_seconds(folder) * 1000:.1f} ms at any position"]
        if args.memory:
            early, late = memory(args.memory)
            lines.append(f"memory over {args.memory} samples: {early:.0f} -> {late:.0f} MiB")
    print("\n".join(lines))
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
