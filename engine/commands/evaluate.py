"""`focus evaluate`: measure a model against exact ground truth."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine.commands import options

HELP = "measure a model on scenes with exact ground truth"
EXAMPLES = (
    "focus evaluate focus-tiny --split test --seed 0 --num 100",
    "focus evaluate focus-tiny --split test_unseen --tasks referring,vqa --json figures.json",
)
SPLITS = ("train", "val", "test", "test_unseen")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default=options.DEFAULT_MODEL,
        help="shipped name or folder of weights (%(default)s)",
    )
    parser.add_argument(
        "--split", choices=SPLITS, default="test", help="which scenes (%(default)s)"
    )
    parser.add_argument(
        "--num",
        type=options.whole(1, 1_000_000),
        default=100,
        metavar="N",
        help="samples of each task (%(default)s)",
    )
    parser.add_argument("--tasks", metavar="A,B", help="only these tasks")
    options.add_seed(parser)
    parser.add_argument("--json", metavar="FILE", help="write the figures there; - prints them")


def run(args: argparse.Namespace) -> int:
    """Evaluate; print a table and write the figures as JSON, or print the JSON."""
    from engine.evaluate.tasks import MEASURES, evaluate
    from engine.pictures import dump_json, write_json

    tasks = tuple(filter(None, (args.tasks or "").split(","))) or None
    unknown = sorted(set(tasks or ()) - set(MEASURES))
    if unknown:
        raise options.UsageError(f"no task {', '.join(unknown)}; there are {', '.join(MEASURES)}")
    model = options.load_model(args.model)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    figures = evaluate(model, split=args.split, seed=args.seed, num=args.num, tasks=tasks, say=say)
    report = {
        "command": "evaluate",
        "model": args.model,
        "split": args.split,
        "seed": args.seed,
        "num": args.num,
        **figures,
    }
    if args.json == "-":
        print(dump_json(report))
        return 0
    print("\n".join(table(figures)), flush=True)  # first: hours of work, and the file may fail
    if args.json:
        write_json(report, Path(args.json))
    return 0


def table(figures: dict[str, object], prefix: str = "") -> list[str]:
    """Lay nested figures out as lines "a.b   0.123"."""
    lines = []
    for name, value in figures.items():
        if isinstance(value, dict):
            lines += table(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            lines.append(f"{prefix + name:<32} {value:8.3f}")
        else:
            lines.append(f"{prefix + name:<32} {value!s:>8}")
    return lines
