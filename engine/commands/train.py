"""`focus train`: carry out a named run, or a sequence of them, going on where it stopped."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from engine.commands import options

if TYPE_CHECKING:
    from engine.run import Run

HELP = "train a run of engine/runs.py, going on from its newest checkpoint"
SEQUENCE = "focus_tiny"
EXAMPLES = (
    "focus train --list",
    "focus train focus_tiny",
    'focus train focus_tiny_stage2 --set steps=20 --set "rates.front.adapter.*=1e-4"',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("run", metavar="RUN", nargs="?", help="a run, or a sequence of runs")
    parser.add_argument("--list", action="store_true", help="list the runs and sequences")
    parser.add_argument(
        "--set",
        dest="assignments",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="override a field of the run, repeatable",
    )
    parser.add_argument(
        "--until", type=options.whole(1, 10**9), metavar="N", help="stop after N steps in all"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="refuse to go on from an earlier training"
    )
    parser.add_argument(
        "--seed", type=options.seed, metavar="S", help="random seed (the run's own)"
    )
    options.add_output(parser, "runs")


def run(args: argparse.Namespace) -> int:
    """Train; each run has its folder OUT/RUN."""
    if args.list:
        return _list(args)
    if args.run is None:
        raise options.UsageError("RUN is missing; `focus train --list` names them")
    from engine.run import override
    from engine.train import NonFiniteLoss, train

    assignments = list(args.assignments)
    if args.seed is not None:
        assignments.append(f"seed={args.seed}")
    done = []
    for planned in [override(found, *assignments) for found in find_runs(args.run)]:
        folder = args.out / planned.name
        try:
            outcome = train(planned, folder, resume=not args.fresh, until=args.until)
        except NonFiniteLoss as error:
            print(f"focus train: error: {planned.name}: {error}", file=sys.stderr)
            return 1
        done.append({"run": planned.name, "step": outcome.step, "checkpoint": outcome.checkpoint})
        if outcome.stopped:
            return 130
    lines = [f"{item['run']}: {item['step']} steps, {item['checkpoint']}" for item in done]
    return options.reply({"command": "train", "runs": done}, lines, args.json)


def find_runs(name: str) -> list[Run]:
    """Return the runs of a sequence, or the one run of that name."""
    from engine.runs import RUNS, TINY_SEQUENCE, find_run

    if name == SEQUENCE:
        return [make() for make in TINY_SEQUENCE]
    if name not in RUNS:
        known = ", ".join((SEQUENCE, *RUNS))
        raise options.UsageError(f"no run {name!r}; there are {known}")
    return [find_run(name)]


def _list(args: argparse.Namespace) -> int:
    from engine.runs import RUNS, TINY_SEQUENCE

    told = {name: (make.__doc__ or "").strip().partition("\n")[0] for name, make in RUNS.items()}
    sequence = [make.__name__ for make in TINY_SEQUENCE]
    lines = [f"{SEQUENCE:<28} all of focus_tiny, in this order:"]
    lines += [f"{name:<28} {text}" for name, text in told.items()]
    report = {"command": "train", "runs": told, "sequences": {SEQUENCE: sequence}}
    return options.reply(report, lines, args.json)
