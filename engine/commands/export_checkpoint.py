"""`focus export-checkpoint`: a cluster's checkpoint to one safetensors file, and back."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.commands import options

HELP = "turn a sharded checkpoint into single-device safetensors, or such a file into shards"
EXAMPLES = (
    "focus export-checkpoint runs/focus_3b_stage3_512 --out out/model.safetensors",
    "focus export-checkpoint out/model.safetensors --back focus_3b_stage4 --out runs",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "source", metavar="SOURCE", type=Path, help="a run folder, a checkpoint, or (--back) a file"
    )
    parser.add_argument(
        "--step", type=options.whole(0, 10**12), metavar="N", help="of a run folder (the newest)"
    )
    parser.add_argument(
        "--back",
        metavar="RUN",
        help="write SOURCE as the step 0 of this run in OUT/RUN, for any layout to go on from",
    )
    parser.add_argument(
        "--set",
        dest="assignments",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="override a field of the run of --back, repeatable",
    )
    options.add_output(parser, "out/model.safetensors")


def run(args: argparse.Namespace) -> int:
    """Convert in one process, on the CPU or one GPU."""
    from engine.clusterfile import from_shards, to_shards

    if args.back is not None:
        from engine.run import override
        from engine.runs import find_run

        planned = override(find_run(args.back), *args.assignments)
        written = to_shards(planned, args.source, args.out / planned.name)
    else:
        written = from_shards(args.source, args.out, args.step)
    report = {"command": "export-checkpoint", "source": args.source, "written": written}
    return options.reply(report, [f"{args.source}: written to {written}"], args.json)
