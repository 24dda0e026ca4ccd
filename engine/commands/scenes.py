"""`focus scenes`: sample pictures of the built-in world with their truth."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from engine.commands import options

if TYPE_CHECKING:
    from PIL import Image

    from engine.data.records import Record

HELP = "write sample pictures of the built-in world with their truth"
EXAMPLES = (
    "focus scenes --out out/scenes --num 14 --seed 1",
    "focus scenes --task editing --split test_unseen --size 256 --num 4",
)
SPLITS = ("train", "val", "test", "test_unseen")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "--num",
        type=options.whole(1, 100_000),
        default=14,
        metavar="N",
        help="samples, going round the tasks (%(default)s)",
    )
    parser.add_argument("--task", metavar="TASK", help="only this task")
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
    """Draw samples; write for each the input, masks, target, a panel and the truth as JSON."""
    from engine.data.records import TASKS
    from engine.data.scenes import sample

    if args.task is not None and args.task not in TASKS:
        raise options.UsageError(f"no task {args.task!r}; there are {', '.join(TASKS)}")
    tasks = (args.task,) if args.task else TASKS
    found = []
    for number in range(args.num):
        task = tasks[number % len(tasks)]
        record = sample(task, args.split, args.seed, number // len(tasks), args.size)
        found.append(write_record(record, args, f"{number:04d}-{task}"))
    report = {
        "command": "scenes",
        "split": args.split,
        "seed": args.seed,
        "size": args.size,
        "samples": found,
    }
    return options.reply(report, [f"{item['panel']}  {item['text']}" for item in found], args.json)


def write_record(record: Record, args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Write the files of one sample and return its truth with their paths."""
    from PIL import Image

    from engine.pictures import write_json, write_mask, write_picture

    def put(suffix: str, picture: Any) -> str:
        return str(write_picture(Image.fromarray(picture), args.out / f"{name}.{suffix}.png"))

    def put_masks(suffix: str, masks: Any) -> list[str]:
        return [
            str(write_mask(mask, args.out / f"{name}.{suffix}-{number}.png"))
            for number, mask in enumerate(masks, 1)
        ]

    truth: dict[str, Any] = {
        "id": record.id,
        "task": record.task,
        "kind": record.kind,
        "text": record.text,
        "answer": record.answer,
        "classes": record.classes,
        "labels": record.labels,
        "region_kinds": record.region_kinds,
        "image": None if record.image is None else put("image", record.image),
        "target": None if record.target is None else put("target", record.target),
        "masks": put_masks("mask", record.masks),
        "regions": put_masks("region", record.regions),
        "panel": str(write_picture(record_panel(record), args.out / f"{name}.png")),
    }
    write_json(truth, args.out / f"{name}.json")
    return truth


def record_panel(record: Record) -> Image.Image:
    """Return everything a sample holds as one captioned picture."""
    from PIL import Image

    from engine.show import overlay, presentable, strip

    panels: list[tuple[str, Image.Image]] = []
    if record.image is not None:
        image = Image.fromarray(record.image)
        panels.append(("input", presentable(image)))
        if record.regions:
            panels.append(
                (f"regions: {', '.join(record.region_kinds)}", overlay(image, record.regions))
            )
        if record.masks:
            panels.append(("masks", overlay(image, record.masks)))
    if record.target is not None:
        panels.append(("target", presentable(Image.fromarray(record.target))))
    words = [record.text, ", ".join(record.classes), record.answer and f"-> {record.answer}"]
    return strip(panels, " ".join(filter(None, [f"{record.task}:", *words])))
