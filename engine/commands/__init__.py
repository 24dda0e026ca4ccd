"""The commands of `focus`, one file each, in the order in which `focus --help` lists them.

A command is a module with `HELP` (one line), `EXAMPLES`, `add_arguments(parser)` and `run(args)`,
which returns the exit code. Its heavy imports stand inside `run`, so that `focus --help` is quick.
To add a command: a file here and its name in `NAMES`.
"""

from __future__ import annotations

import argparse
import importlib
import keyword
from collections.abc import Sequence
from typing import Protocol, cast

NAMES = (
    "demo",
    "train",
    "evaluate",
    "segment",
    "edit",
    "generate",
    "chat",
    "scenes",
    "publish",
    "import",
    "track",
    "info",
    "export",
    "verify",
    "data",
    "plan",
    "doctor",
    "export-checkpoint",
)


class Command(Protocol):
    """What a module of this package offers."""

    HELP: str
    EXAMPLES: Sequence[str]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments of the command."""

    def run(self, args: argparse.Namespace) -> int:
        """Carry the command out and return the exit code."""


def load(name: str) -> Command:
    """Import one command."""
    module = f"{name}_" if keyword.iskeyword(name) else name.replace("-", "_")
    return cast(Command, importlib.import_module(f"engine.commands.{module}"))
