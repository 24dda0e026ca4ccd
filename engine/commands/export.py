"""`focus export`: write a model as a bundle of parts for other runtimes."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from engine.commands import options

if TYPE_CHECKING:
    from focus.config import FocusConfig

HELP = "write a model as a bundle: every part as ONNX, AOTInductor package or TensorRT plan"
EXAMPLES = (
    "focus export focus-tiny --out out/bundle",
    "focus export focus-tiny --out out/half --precision fp16",
    "focus export focus-tiny --out out/bundle --backends onnx,aoti",
    "focus export focus_3b --graphs-only --parts unet,llm_decode --out out/graphs",
    "focus export focus_3b_shallow --untrained --out out/shallow",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("model", metavar="MODEL", help="shipped name or folder of weights")
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="folder to write")
    parser.add_argument(
        "--backends", default="onnx", metavar="A,B", help="onnx, aoti, tensorrt (%(default)s)"
    )
    parser.add_argument("--precision", default="fp32", choices=("fp32", "fp16", "bf16"))
    parser.add_argument("--parts", metavar="A,B", help="some parts only (for a quick look)")
    parser.add_argument(
        "--untrained", action="store_true", help="MODEL is the name of a config: random weights"
    )
    parser.add_argument(
        "--graphs-only",
        action="store_true",
        help="MODEL is the name of a config: ONNX graphs without weights",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Export one model; a failure leaves no bundle behind."""
    from engine.export.build import Source, export_bundle

    if args.graphs_only:
        return _run_graphs(args)
    focus: Source
    if args.untrained:
        from engine.export.untrained import Untrained

        focus = Untrained(_config(args.model))
    else:
        focus = options.load_model(args.model)
    start = time.perf_counter()
    out = export_bundle(
        focus,
        args.out,
        backends=_names(args.backends),
        precision=args.precision,
        source=Path(args.model).name,
        only=_names(args.parts) if args.parts else None,
        say=lambda line: print(line, flush=True) if not args.json else None,
    )
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in out.iterdir())
    report = {
        "command": "export",
        "model": args.model,
        "bundle": out,
        "precision": args.precision,
        "bytes": size,
        "seconds": round(seconds, 1),
    }
    return options.reply(report, [f"{out}: {size / 1e6:.1f} MB ({seconds:.0f} s)"], args.json)


def _run_graphs(args: argparse.Namespace) -> int:
    from engine.export.graphs import Graph, export_graphs

    def say(graph: Graph) -> None:
        if not args.json:
            print(
                f"{graph.part}: {graph.nodes} nodes, {graph.weights / 1e6:.1f} M weights, "
                f"{graph.seconds:.0f} s, peak {graph.peak_mb:.0f} MB",
                flush=True,
            )

    only = _names(args.parts) if args.parts else None
    graphs = export_graphs(_config(args.model), args.out, only=only, say=say)
    report = {
        "command": "export",
        "config": args.model,
        "graphs": [vars(graph) for graph in graphs],
        "out": args.out,
    }
    return options.reply(report, [f"{args.out}: {len(graphs)} graphs, no weights"], args.json)


def _config(name: str) -> FocusConfig:
    """Return a config by its name; raises `UsageError`."""
    from focus.presets import CONFIGS

    if name not in CONFIGS:
        raise options.UsageError(
            f"MODEL: the name of a config ({', '.join(CONFIGS)}) expected, got {name!r}"
        )
    return CONFIGS[name]()


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
