"""`focus export`: write a model as a bundle of parts for other runtimes."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from engine.commands import options

HELP = "write a model as a bundle: every part as ONNX, AOTInductor package or TensorRT plan"
EXAMPLES = (
    "focus export focus-tiny --out out/bundle",
    "focus export focus-tiny --out out/half --precision fp16",
    "focus export focus-tiny --out out/bundle --backends onnx,aoti",
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
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Export one model; a failure leaves no bundle behind."""
    from engine.export.build import export_bundle

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


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
