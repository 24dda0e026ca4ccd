"""`focus train`: carry out a named run, or a sequence of them, going on where it stopped."""

from __future__ import annotations

import argparse
import sys

from engine.commands import options

HELP = "train a run of engine/runs.py, going on from its newest checkpoint"
EXAMPLES = (
    "focus train --list",
    "focus train tiny",
    "focus train tiny_tokenizer --set steps=200 --set rates.*=1e-4",
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
    from engine import runs
    from engine.run import override
    from engine.train import NonFiniteLoss, train

    known = {**runs.RUNS, **runs.SEQUENCES}
    if args.run not in known:
        raise options.UsageError(f"no run {args.run!r}; there are {', '.join(known)}")
    names = runs.SEQUENCES.get(args.run, (args.run,))
    assignments = list(args.assignments)
    if args.seed is not None:
        assignments.append(f"seed={args.seed}")
    planned = [override(runs.RUNS[name](), *assignments) for name in names]
    done = []
    for name, planned_run in zip(names, planned, strict=True):
        folder = args.out / name
        try:
            outcome = train(planned_run, folder, resume=not args.fresh, until=args.until)
        except NonFiniteLoss as error:
            print(f"focus train: error: {name}: {error}", file=sys.stderr)
            return 1
        done.append({"run": name, "step": outcome.step, "checkpoint": outcome.checkpoint})
        if outcome.stopped and (args.until is None or outcome.step < args.until):
            print(f"focus train: {name} stopped at step {outcome.step}", file=sys.stderr)
            return 130
    lines = [f"{item['run']}: {item['step']} steps, {item['checkpoint']}" for item in done]
    return options.reply({"command": "train", "runs": done}, lines, args.json)


def _list(args: argparse.Namespace) -> int:
    from engine import runs

    found = {name: _first_line(make.__doc__) for name, make in runs.RUNS.items()}
    lines = [f"{name:<24} {told}" for name, told in found.items()]
    lines += [f"{name:<24} {', '.join(parts)}" for name, parts in runs.SEQUENCES.items()]
    report = {"command": "train", "runs": found, "sequences": dict(runs.SEQUENCES)}
    return options.reply(report, lines, args.json)


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]
