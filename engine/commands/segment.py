"""`focus segment`: masks of what a text names or regions point at."""

from __future__ import annotations

import argparse
import time
from typing import Any

from engine.commands import options

HELP = "find what a text names, or what clicks, boxes, scribbles and masks point at"
EXAMPLES = (
    'focus segment photo.png "the red circle left of the star"',
    "focus segment photo.png --click 40,60 --box 80,20,120,70",
    'focus segment photo.png "red circle, blue star, background" --task class',
)
TASKS = ("referring", "reasoning", "class", "interactive")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("image", metavar="IMAGE", help="a picture file of any size")
    parser.add_argument(
        "text", metavar="TEXT", nargs="?", help="what to find; class: names, by commas"
    )
    parser.add_argument(
        "--task", choices=TASKS, help="referring, or interactive if regions are given"
    )
    options.add_regions(parser, many=True)
    options.add_model(parser, "out/segment")


def run(args: argparse.Namespace) -> int:
    """Segment one picture; write overlay, masks and report."""
    from engine.pictures import read_picture, write_json, write_mask, write_picture

    task, text = _task_and_text(args)
    picture = read_picture(args.image)
    regions = options.read_regions(args.regions, picture)
    model = options.load_model(args.model, args.backend)
    start = time.perf_counter()
    result = model.segment(
        picture.image, text=text, regions=regions or None, task=task, seed=args.seed
    )
    seconds = time.perf_counter() - start

    from engine.show import overlay

    name = options.stem(picture.path.stem)
    captions = [
        f"{name} {score:.2f}" for name, score in zip(result.names, result.scores, strict=True)
    ]
    panel = write_picture(
        overlay(picture.image, result.masks, captions), args.out / f"{name}.overlay.png"
    )
    objects: list[dict[str, Any]] = []
    for number, (mask, label, score) in enumerate(
        zip(result.masks, result.names, result.scores, strict=True), 1
    ):
        path = write_mask(mask, args.out / f"{name}.mask-{number}.png")
        share = float(mask.mean())
        objects.append({"name": label, "score": float(score), "share": share, "mask": path})
    report = {
        "command": "segment",
        "model": args.model,
        "image": picture.path,
        "size": picture.size,
        "notes": picture.notes,
        "task": task,
        "text": text,
        "regions": options.region_report(args.regions),
        "seed": args.seed,
        "answer": result.text,
        "objects": objects,
        "overlay": panel,
        "seconds": round(seconds, 3),
    }
    path = write_json(report, args.out / f"{name}.json")
    return options.reply({**report, "report": path}, _lines(report), args.json)


def _task_and_text(args: argparse.Namespace) -> tuple[str, str | None]:
    task = args.task or ("interactive" if args.regions and args.text is None else "referring")
    if task == "interactive" and not args.regions:
        raise options.UsageError(
            "interactive segmentation needs --click, --box, --scribble or --mask"
        )
    if args.regions and (task != "interactive" or args.text is not None):
        raise options.UsageError(
            "TEXT or regions expected, got both; `focus edit` takes both, a segmentation does not"
        )
    if task != "interactive" and args.text is None:
        raise options.UsageError("TEXT is missing; give a text, or regions such as --click 40,60")
    return task, None if args.text is None else options.check_text(args.text)


def _lines(report: dict[str, Any]) -> list[str]:
    lines = [f"note: {note}" for note in report["notes"]]
    lines += [
        f"{item['name']}: score {item['score']:.2f}, {100 * item['share']:.1f} % of the picture, "
        f"{item['mask']}"
        for item in report["objects"]
    ] or ["nothing found"]
    return [*lines, f"{report['overlay']} ({report['seconds']:.2f} s)"]
