"""`focus data`: bring datasets into shards, check them, look at them, tokenise them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.commands import options

if TYPE_CHECKING:
    from engine.data.convert.driver import Job

HELP = "convert datasets to shards, check them, look at them, tokenise them"
EXAMPLES = (
    "focus data convert --list",
    "focus data convert refcoco /data/refer --out shards/refcoco --workers 8",
    "focus data world focus_tiny_stage3 --out shards/world --samples 2000",
    "focus data validate shards/refcoco --deny",
    "focus data inspect shards/refcoco --out out/refcoco",
    "focus data encode shards/refcoco --model focus-tiny",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    convert = actions.add_parser("convert", help="write a dataset's samples into shards")
    convert.add_argument("format", metavar="FORMAT", nargs="?", help="see --list")
    convert.add_argument("source", metavar="SOURCE", nargs="?", type=Path, help="its folder")
    convert.add_argument("--list", action="store_true", help="list the formats and layouts")
    convert.add_argument("--split", default="", help="of the dataset (its training split)")
    convert.add_argument("--images", type=Path, metavar="DIR", help="folder of the pictures")
    convert.add_argument("--variant", default="", help="a format's own choice")
    convert.add_argument("--name", default="", help="of the dataset (the folder's)")
    convert.add_argument("--licence", default="unknown", help="recorded in the manifest")
    _whole(convert, "--per-shard", 1, 1_000_000, 1000, "source samples per shard")
    _whole(convert, "--workers", 1, 512, 1, "processes")
    _whole(convert, "--classes", 1, 10_000, 40, "candidate names per sample")
    _whole(convert, "--frames", 1, 1000, 16, "frames per clip")
    _whole(convert, "--limit", 0, 10**12, 0, "stop after so many source samples, 0 = all")
    convert.add_argument("--rle", action="store_true", help="masks as RLE, not as PNG maps")
    options.add_output(convert, "shards")
    world = actions.add_parser("world", help="write a run's scenes of the built-in world")
    world.add_argument("run", metavar="RUN", nargs="+", help="runs that draw records")
    _whole(world, "--samples", 0, 10**9, 0, "at most so many of each task, 0 = what the runs draw")
    _whole(world, "--per-shard", 1, 1_000_000, 1000, "samples per shard")
    _whole(world, "--workers", 1, 512, 1, "processes")
    options.add_output(world, "shards/world")
    validate = actions.add_parser("validate", help="decode every sample; name the broken ones")
    validate.add_argument("shards", metavar="SHARDS", type=Path)
    validate.add_argument("--deny", action="store_true", help="leave the broken ones out from now")
    validate.add_argument("--repair", action="store_true", help="write missing rows files anew")
    validate.add_argument("--json", action="store_true", help="print the report as JSON")
    inspect = actions.add_parser("inspect", help="draw a contact sheet and count")
    inspect.add_argument("shards", metavar="SHARDS", type=Path)
    _whole(inspect, "--num", 1, 200, 6, "samples of each task")
    options.add_seed(inspect)
    options.add_output(inspect, "out/inspect")
    encode = actions.add_parser("encode", help="add the token ids of a frozen tokenizer")
    encode.add_argument("shards", metavar="SHARDS", type=Path)
    encode.add_argument("--model", default=options.DEFAULT_MODEL, metavar="NAME")
    encode.add_argument("--loader", choices=("auto", "dali", "pil"), default="auto")
    _whole(encode, "--batch", 1, 1024, 8, "pictures at a time")
    _whole(encode, "--workers", 1, 64, 1, "processes")
    encode.add_argument("--json", action="store_true", help="print the report as JSON")


def _whole(
    parser: argparse.ArgumentParser, name: str, low: int, high: int, default: int, told: str
) -> None:
    parser.add_argument(
        name,
        type=options.whole(low, high),
        default=default,
        metavar="N",
        help=f"{told} (%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Carry the action out."""
    actions = {
        "convert": _convert,
        "world": _world,
        "validate": _validate,
        "inspect": _inspect,
        "encode": _encode,
    }
    return actions[args.action](args)


def _bar(total: int | None, unit: str) -> tuple[Callable[[int], None], Callable[[], None]]:
    """A progress bar on a terminal, nothing elsewhere: (set to, close)."""
    from tqdm import tqdm

    bar = tqdm(total=total, unit=unit, disable=not sys.stderr.isatty())

    def go(done: int) -> None:
        bar.update(done - bar.n)

    return go, bar.close


def _convert(args: argparse.Namespace) -> int:
    from engine.data.convert.driver import Job
    from engine.data.convert.format import Options
    from engine.data.convert.registry import FORMATS

    if args.list:
        told = {name: each.layout for name, each in FORMATS.items()}
        lines = [f"{name:<18} {layout}" for name, layout in told.items()]
        return options.reply({"command": "data convert", "formats": told}, lines, args.json)
    if args.format is None or args.source is None:
        raise options.UsageError("FORMAT and SOURCE are missing; `--list` names the formats")
    job = Job(
        format=args.format,
        source=args.source,
        out=args.out,
        name=args.name,
        licence=args.licence,
        per_shard=args.per_shard,
        workers=args.workers,
        rle=args.rle,
        limit=args.limit,
        options=Options(
            split=args.split,
            images=args.images,
            variant=args.variant,
            classes=args.classes,
            frames=args.frames,
        ),
    )
    return _carry_out(job, args)


def _world(args: argparse.Namespace) -> int:
    from engine.commands.train import find_runs
    from engine.data.convert.driver import Job
    from engine.data.world import join_plans, plan_of

    runs = [run for name in args.run for run in find_runs(name)]
    join_plans([plan_of(run, args.samples or None) for run in runs]).write(args.out)
    job = Job(
        format="world",
        source=args.out,
        out=args.out,
        licence="Apache-2.0",
        per_shard=args.per_shard,
        workers=args.workers,
    )
    return _carry_out(job, args)


def _carry_out(job: Job, args: argparse.Namespace) -> int:
    from engine.data.convert.driver import convert

    go, close = _bar(None, "sample")
    try:
        manifest = convert(job, lambda seen, _: go(seen))
    finally:
        close()
    report = {
        "command": f"data {args.action}",
        "out": args.out,
        "samples": manifest.samples,
        "shards": len(manifest.shards),
        "tasks": dict(manifest.tasks),
        "skipped": dict(manifest.skipped),
    }
    lines = [f"{args.out}: {manifest.samples} samples in {len(manifest.shards)} shards"]
    lines += [f"  {task:<12} {count}" for task, count in manifest.tasks.items()]
    lines += [f"  left out, {why}: {count}" for why, count in manifest.skipped.items()]
    return options.reply(report, lines, args.json)


def _validate(args: argparse.Namespace) -> int:
    from engine.data.validate import repair_rows, validate

    repaired = repair_rows(args.shards) if args.repair else 0
    go, close = _bar(None, "sample")
    try:
        found = validate(args.shards, args.deny, lambda done, _: go(done))
    finally:
        close()
    names = ("shard", "number", "key", "reason", "text")
    report = {
        "command": "data validate",
        "samples": found.samples,
        "repaired": repaired,
        "reasons": found.reasons,
        "shards": found.shards,
        "broken": [dict(zip(names, one, strict=True)) for one in found.broken],
    }
    lines = [f"{args.shards}: {found.samples} samples, {len(found.broken)} broken", *found.shards]
    lines += [f"{s}.tar #{n} {key}: {why}: {text}" for s, n, key, why, text in found.broken]
    options.reply(report, lines, args.json)
    return 0 if found.sound else 1


def _inspect(args: argparse.Namespace) -> int:
    from engine.data.contact import draw_sheet
    from engine.data.manifest import Dataset
    from engine.data.validate import statistics
    from engine.pictures import write_json, write_picture

    dataset = Dataset(args.shards)
    told = statistics(dataset)
    sheet = write_picture(draw_sheet(dataset, args.num, args.seed), args.out / "sheet.png")
    write_json(told, args.out / "statistics.json")
    report: dict[str, Any] = {"command": "data inspect", "sheet": sheet, **told}
    lines = [str(sheet), f"{told['name']}: {told['samples']} samples, licence {told['licence']}"]
    tasks: Any = told["tasks"]
    lines += [
        f"  {task:<12} {own['samples']}, cropped away {own['cropped_away']}, shapes {own['shapes']}"
        for task, own in tasks.items()
    ]
    return options.reply(report, lines, args.json)


def _encode(args: argparse.Namespace) -> int:
    from engine.data.encode import encode_dataset

    go, close = _bar(None, "shard")
    try:
        done = encode_dataset(
            args.shards,
            args.model,
            loader=args.loader,
            batch=args.batch,
            workers=args.workers,
            progress=go,
        )
    finally:
        close()
    report = {"command": "data encode", "shards": args.shards, **done}
    line = f"{args.shards}: codes of {done['samples']} samples, tokenizer {done['fingerprint']}"
    return options.reply(report, [line], args.json)
