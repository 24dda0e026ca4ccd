"""`focus plan`: which layouts a run may have on some GPUs, and what a model says of each."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from engine.commands import options

HELP = "rank the parallel layouts of a run on some GPUs by a model of memory and time"
EXAMPLES = (
    "focus plan focus_3b_stage3 --gpus 64 --gpu h100",
    "focus plan focus_300m_stage4 --gpus 8 --gpu a100 --json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("run", metavar="RUN", help="a run, or a sequence of runs")
    add_machine(parser)
    parser.add_argument(
        "--batch", type=options.whole(1, 10**6), metavar="N", help="samples per step (the run's)"
    )
    parser.add_argument(
        "--limit", type=options.whole(1, 1000), default=8, metavar="N", help="rows (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def add_machine(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add `--gpus` and `--gpu`."""
    parser.add_argument(
        "--gpus", type=options.whole(1, 100_000), default=8, metavar="N", help="(%(default)s)"
    )
    parser.add_argument(
        "--gpu",
        choices=("a100", "h100", "h200", "b200"),
        default="h100",
        help="kind (%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the best layouts of every run of the name."""
    from engine.commands.train import find_runs

    reports, lines = [], []
    for planned in find_runs(args.run):
        if planned.stage == "foundation":
            continue
        report, told = _plan(planned, args)
        reports.append(report)
        lines += told
    if not reports:
        raise options.UsageError(f"{args.run}: stage 0 runs on one GPU; there is nothing to plan")
    return options.reply({"command": "plan", "runs": reports}, lines, args.json)


def _plan(planned: Any, args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    from engine.workload import STAGE1, batch_of, workload_of
    from parallel.planner import GPUS, data_demand, plan, refusals, render

    gpu = GPUS[args.gpu]
    work = workload_of(planned)
    batch = args.batch or batch_of(planned, args.gpus)
    whole = planned.stage in STAGE1
    plans = plan(work, gpu, args.gpus, batch, precision=planned.precision, whole=whole)
    best = plans[0]
    demand = data_demand(best, gpu, args.gpus)
    days = planned.steps * best.step / 86_400
    refused = refusals(work, gpu, args.gpus) if not whole else []
    lines = [
        f"{planned.name} on {args.gpus} x {gpu.name}, {batch} samples per step"
        + ("; this stage is not split" if whole else ""),
        *render(plans, limit=args.limit).splitlines(),
        f"best: {days:.1f} days; data: {demand.samples_per_s:.0f} samples/s and "
        f"{demand.cores:.0f} CPU cores per machine of {gpu.per_node}",
        *(f"refused: {text}" for text in refused),
        "",
    ]
    report = {
        "run": planned.name,
        "gpus": args.gpus,
        "gpu": gpu.name,
        "batch": batch,
        "kind": "model, not measured",
        "plans": [{"name": p.name, **asdict(p)} for p in plans[: args.limit]],
        "days": days,
        "data": asdict(demand),
        "refused": refused,
    }
    return report, lines
