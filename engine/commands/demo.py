"""`focus demo`: every task on unseen scenes, a page to look at and a report."""

from __future__ import annotations

import argparse

from engine.commands import options

HELP = "run every task on unseen scenes, measure, train a few steps, write a page"
EXAMPLES = ("focus demo", "focus demo --out out/demo --seed 7 --no-train")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("--no-train", action="store_true", help="leave the training steps out")
    parser.add_argument(
        "--num",
        type=options.whole(1, 10_000),
        default=20,
        metavar="N",
        help="samples of each task to measure (%(default)s)",
    )
    options.add_model(parser, "out/demo")


def run(args: argparse.Namespace) -> int:
    """Run the demo and print where the page lies."""
    from engine.demo import run_demo

    report = run_demo(
        options.load_model(args.model, args.backend),
        model_name=args.model,
        out=args.out,
        seed=args.seed,
        num=args.num,
        train=not args.no_train,
    )
    return options.reply(report, [f"{args.out / 'index.html'}"], args.json)
