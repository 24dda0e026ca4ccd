"""The `focus` command: reads arguments, runs one command, turns every error into one line.

Exit codes: 0 done, 1 the run itself failed (a non-finite loss, an internal error), 2 something the
user can put right (a file, a text, an argument, a full disk), 130 interrupted. `FOCUS_DEBUG=1`
shows the traceback behind the line.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NoReturn, TextIO

from engine.commands import NAMES, load

DESCRIPTION = "FOCUS: segment what you name or point at, edit what you segmented."
MAX_LINE = 400
FLOORS = ("kernels", "focus", "parallel", "engine", "bench")


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message} (try `{self.prog} --help`)\n")


def version() -> str:
    """Version of the installed distribution, or "source" in a checkout that was not installed."""
    try:
        return metadata.version("focus-vl")
    except metadata.PackageNotFoundError:
        return "source"


def build_parser() -> Parser:
    """Return the parser with every command; imports nothing heavy."""
    parser = Parser(prog="focus", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"focus {version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in NAMES:
        command = load(name)
        sub = commands.add_parser(
            name,
            help=command.HELP,
            description=command.HELP[0].upper() + command.HELP[1:] + ".",
            epilog="examples:\n" + "\n".join(f"  {line}" for line in command.EXAMPLES),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    args = build_parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = note
            return load(args.command).run(args)
    except KeyboardInterrupt:
        print("focus: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as in `focus info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return report(args.command, error)


def note(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show a warning of ours as one line; those of libraries are not for users."""
    house = Path(__file__).resolve().parents[1]
    if any(Path(filename).is_relative_to(house / floor) for floor in FLOORS):
        print(f"note: {message}", file=sys.stderr)


def report(command: str, error: Exception) -> int:
    """Print one line about `error`; return 2 if the user can put it right, else 1."""
    if os.environ.get("FOCUS_DEBUG") == "1":
        traceback.print_exception(error)
    theirs = isinstance(error, (ValueError, OSError))
    print(f"focus {command}: error: {one_line(error, internal=not theirs)}", file=sys.stderr)
    return 2 if theirs else 1


def one_line(error: Exception, internal: bool) -> str:
    """Describe an error in one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if len(text) > MAX_LINE:
        text = text[: MAX_LINE - 1] + "…"
    if internal:
        text = f"{type(error).__name__}: {text} (FOCUS_DEBUG=1 shows where)"
    return text


if __name__ == "__main__":
    sys.exit(main())
