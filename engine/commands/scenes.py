"""`focus scenes`: sample pictures of the built-in world with their truth."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.commands import options

if TYPE_CHECKING:
    from engine.data.records import Image, Mask, Record

HELP = "write sample pictures of the built-in world with their truth"
EXAMPLES = (
    "focus scenes --out out/scenes --num 4 --seed 1",
    "focus scenes --split test_unseen --size 256",
)
SPLITS = ("train", "val", "test", "test_unseen")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "--num",
        type=options.whole(1, 100_000),
        default=4,
        metavar="N",
        help="samples of each task (%(default)s)",
    )
    parser.add_argument("--split", choices=SPLITS, default="val", help="which scenes (%(default)s)")
    parser.add_argument(
        "--size",
        type=options.whole(32, 2048),
        default=128,
        metavar="PIXELS",
        help="side of the pictures (%(default)s)",
    )
    options.add_seed(parser)
    options.add_output(parser, "out/scenes")


def run(args: argparse.Namespace) -> int:
    """Write a sheet of each task to look at, and every sample's files in a folder of its task."""
    from engine.data.records import TASKS
    from engine.data.scenes import sample, write_samples

    sheets = write_samples(args.out, args.num, args.seed, args.size, args.split)
    samples = []
    for task in TASKS:
        for number in range(args.num):
            record = sample(task, args.split, args.seed, number, args.size)
            samples.append(write_record(record, args.out / task, f"{number:04d}"))
    report = {
        "command": "scenes",
        "split": args.split,
        "seed": args.seed,
        "size": args.size,
        "sheets": sheets,
        "samples": samples,
    }
    return options.reply(report, [str(path) for path in sheets], args.json)


def write_record(record: Record, folder: Path, name: str) -> dict[str, Any]:
    """Write input, masks, regions, target and truth of one sample; return the truth."""
    from PIL import Image as Pillow

    from engine.pictures import write_json, write_mask, write_picture

    def put(what: str, picture: Image | None) -> Path | None:
        if picture is None:
            return None
        return write_picture(Pillow.fromarray(picture), folder / f"{name}.{what}.png")

    def put_all(what: str, masks: Sequence[Mask]) -> list[Path]:
        paths = [folder / f"{name}.{what}-{number}.png" for number in range(1, len(masks) + 1)]
        return [write_mask(mask, path) for mask, path in zip(masks, paths, strict=True)]

    truth = {
        "id": record.id,
        "task": record.task,
        "kind": record.kind,
        "text": record.text,
        "answer": record.answer,
        "classes": record.classes,
        "labels": record.labels,
        "region_kinds": record.region_kinds,
        "image": put("image", record.image),
        "target": put("target", record.target),
        "masks": put_all("mask", record.masks),
        "regions": put_all("region", record.regions),
    }
    write_json(truth, folder / f"{name}.json")
    return truth
