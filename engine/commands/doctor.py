"""`focus doctor`: which optional parts are here, what each is used for, what stands in for it."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from engine.commands import options

HELP = "list the optional parts of training: present or not, used for what, replaced by what"
EXAMPLES = ("focus doctor", "focus doctor --json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Look at every part."""
    from parallel.doctor import examine, render

    parts = examine()
    report = {
        "command": "doctor",
        "parts": [{**asdict(part), "usable": part.usable} for part in parts],
    }
    return options.reply(report, render(parts).splitlines(), args.json)
