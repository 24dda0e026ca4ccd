"""`focus publish`: turn a trained run into a model directory with its card."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.commands import options

HELP = "turn a trained run into a model directory that `--model` takes"
EXAMPLES = (
    "focus publish runs/focus_tiny_stage4 --out out/focus-tiny",
    "focus publish runs/focus_tiny_stage4 --out out/focus-tiny --figures out/test.json "
    "--trained runs/focus_tiny_stage3 runs/focus_tiny_stage4",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("run", metavar="RUN", help="a run's folder, a checkpoint or a weights file")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    parser.add_argument(
        "--figures",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="reports of `focus evaluate --json` for the model card",
    )
    parser.add_argument(
        "--trained",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders of the runs behind the weights, in order, for the model card",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Write weights, vocabulary, decoding defaults and, with figures, the card."""
    from engine.publish import CARD, card, publish, read_figures, read_trained

    figures = read_figures(args.figures)
    trained = [read_trained(folder) for folder in args.trained]
    model = publish(args.run, args.out)
    parameters = sum(parameter.numel() for parameter in model.model.parameters())
    if figures:
        text = card(figures, trained, parameters)
        (args.out / CARD).write_text(text)
    report = {"command": "publish", "run": args.run, "model": args.out, "parameters": parameters}
    return options.reply(report, [f"{args.out}: {parameters:,} parameters"], args.json)
