"""`focus train`: carry out a named run, or a sequence of them, going on where it stopped."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from engine.commands import options
from engine.commands.plan import add_machine

if TYPE_CHECKING:
    from engine.run import Run

HELP = "train a run of engine/runs.py, going on from its newest checkpoint"
SEQUENCE = "focus_tiny"
EXAMPLES = (
    "focus train --list",
    "focus train focus_tiny",
    'focus train focus_tiny_stage2 --set steps=20 --set "rates.front.adapter.*=1e-4"',
    "focus train focus_3b_stage3 --dry-run --gpus 64",
)
INTERRUPTED = 130
REQUEUE = 75  # EX_TEMPFAIL: stopped by SIGTERM or SIGUSR1, saved, and worth starting again


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
    parser.add_argument(
        "--profile",
        type=options.whole(1, 10**9),
        metavar="N",
        help="write a torch profiler trace of 3 steps from step N on into OUT/RUN/profile",
    )
    dry = parser.add_argument_group("dry run")
    dry.add_argument(
        "--dry-run",
        action="store_true",
        help="print shapes, parameters and memory per rank, FLOPs and expected time; start nothing",
    )
    add_machine(dry)
    options.add_output(parser, "runs")


def run(args: argparse.Namespace) -> int:
    """Train; each run has its folder OUT/RUN.

    Under a launcher only rank 0 replies. Returns 0 at the end of the run, 1 after a non-finite loss
    that no policy allows, 75 when a signal asked for a restart, 130 after Ctrl-C.
    """
    if args.list:
        return _list(args)
    if args.run is None:
        raise options.UsageError("RUN is missing; `focus train --list` names them")
    if args.dry_run:
        return _dry_run(args)
    from engine.train import NonFiniteLoss, train

    done = []
    for planned in _overridden(args):
        folder = args.out / planned.name
        try:
            outcome = train(planned, folder, resume=not args.fresh, until=args.until)
        except NonFiniteLoss as error:
            print(f"focus train: error: {planned.name}: {error}", file=sys.stderr)
            return 1
        done.append({"run": planned.name, "step": outcome.step, "checkpoint": outcome.checkpoint})
        if outcome.stopped:
            return REQUEUE if outcome.requeue else INTERRUPTED
    if os.environ.get("RANK", "0") != "0":
        return 0
    lines = [f"{item['run']}: {item['step']} steps, {item['checkpoint']}" for item in done]
    return options.reply({"command": "train", "runs": done}, lines, args.json)


def _overridden(args: argparse.Namespace) -> list[Run]:
    """Return the named runs with `--set`, `--seed` and `--profile` applied."""
    from engine.run import override

    assignments = list(args.assignments)
    if args.seed is not None:
        assignments.append(f"seed={args.seed}")
    if args.profile is not None:
        assignments.append(f"profile=({args.profile}, {args.profile + 2})")
    return [override(found, *assignments) for found in find_runs(args.run)]


def _dry_run(args: argparse.Namespace) -> int:
    """Print what each run is and asks for; stage 0 has no plan and is passed over."""
    from engine.dry_run import describe, render
    from parallel.planner import GPUS

    runs = [planned for planned in _overridden(args) if planned.stage != "foundation"]
    if not runs:
        raise options.UsageError(
            f"{args.run}: stage 0 runs on one device; there is nothing to plan"
        )
    reports = [describe(planned, args.gpus, GPUS[args.gpu]) for planned in runs]
    lines = [line for report in reports for line in render(report)]
    return options.reply({"command": "train", "dry_run": reports}, lines, args.json)


def sequences() -> Mapping[str, Sequence[Callable[[], Run]]]:
    """Return the names that stand for several runs, in order."""
    from engine.runs import TINY_SEQUENCE
    from engine.runs_cluster import SEQUENCES

    return {SEQUENCE: TINY_SEQUENCE, **SEQUENCES}


def find_runs(name: str) -> list[Run]:
    """Return the runs of a sequence, or the one run of that name."""
    from engine.runs import RUNS, find_run

    known = sequences()
    if name in known:
        return [make() for make in known[name]]
    if name not in RUNS:
        raise options.UsageError(f"no run {name!r}; there are {', '.join((*known, *RUNS))}")
    return [find_run(name)]


def _list(args: argparse.Namespace) -> int:
    from engine.runs import RUNS

    told = {name: (make.__doc__ or "").strip().partition("\n")[0] for name, make in RUNS.items()}
    known = {name: [make.__name__ for make in makes] for name, makes in sequences().items()}
    lines = [f"{SEQUENCE:<34} all of focus_tiny, in this order:"]
    lines += [f"{name:<34} {text}" for name, text in told.items()]
    lines += [
        f"{name:<34} in order: {', '.join(of)}" for name, of in known.items() if name != SEQUENCE
    ]
    report = {"command": "train", "runs": told, "sequences": known}
    return options.reply(report, lines, args.json)
