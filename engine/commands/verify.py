"""`focus verify`: prove that a bundle is whole and gives what its model gives."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from engine.commands import options

if TYPE_CHECKING:
    from engine.export.verify import Check

HELP = "prove that a bundle is whole and every part gives what the model gives"
EXAMPLES = ("focus verify out/bundle", "focus verify out/bundle --backends onnx --parts unet")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder made by focus export")
    parser.add_argument("--backends", metavar="A,B", help="which to run (all that it holds)")
    parser.add_argument("--parts", metavar="A,B", help="some parts only")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Verify one bundle; exit code 1 when a part differs."""
    from engine.export.verify import verify

    def split(text: str | None) -> list[str] | None:
        return [name.strip() for name in text.split(",") if name.strip()] if text else None

    checks = verify(
        args.bundle,
        backends=split(args.backends),
        only=split(args.parts),
        say=lambda check: None if args.json else print(line(check), flush=True),
    )
    failed = [check for check in checks if not check.passed]
    report = {
        "command": "verify",
        "bundle": args.bundle,
        "checks": [{**vars(check), "passed": check.passed} for check in checks],
        "failed": len(failed),
    }
    options.reply(report, [f"{len(checks) - len(failed)} of {len(checks)} checks pass"], args.json)
    return 1 if failed or not checks else 0


def line(check: Check) -> str:
    """Describe one check."""
    sizes = " ".join(f"{name}={size}" for name, size in check.sizes.items())
    told = "" if check.moved is None else f"; moved inputs move it by {check.moved:.0e}"
    mark = "ok  " if check.passed else "FAIL"
    return (
        f"{mark} {check.part:16s} {check.backend:8s} {sizes:44s} {check.output:16s} "
        f"error {check.error:.1e} (limit {check.limit:.0e}"
        f"{told})"
    )
