"""`focus publish`: turn a trained run into a model directory with its card."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.commands import options

if TYPE_CHECKING:
    from engine.publish import Trained

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
    from engine.pictures import write_bytes
    from engine.publish import CARD, card, publish

    figures = [_figures(path) for path in args.figures]
    trained = [_trained(folder) for folder in args.trained]
    if figures:
        card(figures, trained, 0)  # what is wrong with it is found before a model is replaced
    model = publish(args.run, args.out)
    parameters = sum(parameter.numel() for parameter in model.model.parameters())
    if figures:
        write_bytes(card(figures, trained, parameters).encode(), args.out / CARD)
    report = {"command": "publish", "run": args.run, "model": args.out, "parameters": parameters}
    return options.reply(report, [f"{args.out}: {parameters:,} parameters"], args.json)


def _figures(path: Path) -> dict[str, Any]:
    """Read one report, which says of what split, seed and number its figures are."""
    from engine.publish import MEASURES, read_figures

    try:
        values: Any = read_figures([path])[0]
    except ValueError as error:
        raise options.UsageError(
            f"{path}: a report of `focus evaluate` expected: {error}"
        ) from error
    lacking = [key for key in ("split", "seed", "num") if _find(values, key) is None]
    if lacking:
        raise options.UsageError(
            f"{path}: a report of `focus evaluate --json` expected, but it has no "
            f"{', '.join(lacking)}; measure again"
        )
    for key, _ in MEASURES:
        value = _find(values, key)
        if value is not None and not isinstance(value, (int, float)):
            raise options.UsageError(f"{path}: a number expected for {key}, got {value!r}")
    return dict(values)


def _find(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _trained(folder: Path) -> Trained:
    from engine.publish import read_trained

    try:
        return read_trained(folder)
    except (KeyError, TypeError, AttributeError) as error:
        raise options.UsageError(
            f"{folder}: its newest checkpoint does not say how it was trained ({error}); give the "
            "folder of a run"
        ) from error
