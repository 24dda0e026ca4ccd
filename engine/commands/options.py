"""What several commands share: model arguments, region arguments, checked text, the reply."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.pictures import Picture
    from focus import Focus
    from focus.regions import Region

MAX_TEXT = 1000
DEFAULT_MODEL = "focus-tiny"


class UsageError(ValueError):
    """An argument that parses but cannot be meant."""


def add_model(parser: argparse.ArgumentParser, out: str) -> None:
    """Add `--model`, `--out`, `--seed` and `--json`."""
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="NAME", help="shipped name or folder of weights"
    )
    parser.add_argument(
        "--backend",
        default="eager",
        choices=("eager", "onnx", "aoti", "tensorrt"),
        help="what runs the parts of a bundle (%(default)s)",
    )
    add_output(parser, out)
    add_seed(parser)


def add_output(parser: argparse.ArgumentParser, out: str) -> None:
    """Add `--out` and `--json`."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(out),
        metavar="DIR",
        help="folder for results (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def add_seed(parser: argparse.ArgumentParser) -> None:
    """Add `--seed`."""
    parser.add_argument("--seed", type=seed, default=0, metavar="S", help="random seed (0)")


def add_regions(parser: argparse.ArgumentParser, many: bool) -> None:
    """Add `--click`, `--box`, `--scribble` and `--mask`, repeatable when `many`."""
    into: argparse._ArgumentGroup | argparse._MutuallyExclusiveGroup
    into = parser.add_argument_group("regions", "in pixels of the upright picture")
    if not many:
        into = into.add_mutually_exclusive_group()
    for kind, metavar, told in (
        ("click", "X,Y", "a point in the object"),
        ("box", "X0,Y0,X1,Y1", "a box around it"),
        ("scribble", "FILE", "strokes on it: a picture, or JSON [[x, y], ...]"),
        ("mask", "FILE", "its mask: a picture of the same size, white inside"),
    ):
        into.add_argument(
            f"--{kind}",
            dest="regions",
            action="append",
            type=_tagged(kind),
            metavar=metavar,
            help=told,
        )


def _tagged(kind: str) -> Callable[[str], tuple[str, str]]:
    def tag(value: str) -> tuple[str, str]:
        return kind, value

    return tag


def seed(value: str) -> int:
    """Parse a seed: a whole number from 0 to 2**63 - 1."""
    return whole(0, 2**63 - 1)(value)


def whole(low: int, high: int) -> Callable[[str], int]:
    """Return a parser of whole numbers between `low` and `high`."""

    def parse(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"a whole number expected, got {value!r}") from None
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{low} to {high} expected, got {number}")
        return number

    return parse


def check_text(text: str, what: str = "TEXT") -> str:
    """Return `text` stripped; refuse an empty, overlong or undecodable one."""
    text = text.strip()
    if not text:
        raise UsageError(f"{what} is empty; say what you want in words")
    if len(text) > MAX_TEXT:
        raise UsageError(f"{what} has {len(text)} characters; at most {MAX_TEXT} are read")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UsageError(f"{what} is not valid UTF-8")
    return text


def numbers(value: str, count: int, what: str) -> list[float]:
    """Parse "1,2,..." into `count` finite numbers."""
    try:
        found = [float(part) for part in value.split(",")]
    except ValueError:
        found = []
    if len(found) != count or not all(map(math.isfinite, found)):
        raise UsageError(f"--{what}: {count} numbers separated by commas expected, got {value!r}")
    return found


def read_regions(given: Sequence[tuple[str, str]] | None, picture: Picture) -> list[Region]:
    """Turn region arguments into region prompts, checked against the picture."""
    return [_read_region(kind, value, picture) for kind, value in given or ()]


def _read_region(kind: str, value: str, picture: Picture) -> Region:
    from engine.pictures import read_mask
    from focus.regions import Box, Click, MaskRegion, Scribble, region_mask

    region: Region
    if kind == "click":
        region = Click(*numbers(value, 2, kind))
    elif kind == "box":
        region = Box(*numbers(value, 4, kind))
    elif kind == "scribble" and value.lower().endswith(".json"):
        region = Scribble(_read_points(Path(value)))
    else:
        mask = read_mask(value, picture.size, kind)
        return Scribble(mask) if kind == "scribble" else MaskRegion(mask)
    region_mask(region, (picture.image.height, picture.image.width))  # raises if it lies outside
    return region


def _read_points(path: Path) -> list[tuple[float, float]]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        points = [(float(x), float(y)) for x, y in values]
    except OSError:
        raise
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path}: JSON [[x, y], ...] expected: {error}") from error
    return points


def load_model(name: str, backend: str = "eager") -> Focus:
    """Load the model of `--model` onto the engine, or a bundle's parts onto another backend.

    Everything heavy is imported here.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    if backend != "eager":
        from engine.serve import backends

        return backends.load_model(name, backend)
    from engine.serve.engine import Engine

    return Engine.from_pretrained(name)


def stem(text: str) -> str:
    """Return a file name made from a path or a text: at most 48 harmless characters."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:48] or "result"


def region_report(given: Sequence[tuple[str, str]] | None) -> list[dict[str, str]]:
    """Describe the region arguments for the report."""
    return [{"kind": kind, "value": value} for kind, value in given or ()]


def reply(report: Mapping[str, Any], lines: Sequence[str], as_json: bool) -> int:
    """Print the report as JSON or its lines for people; returns exit code 0."""
    if as_json:
        from engine.pictures import dump_json

        print(dump_json(report))
    else:
        print("\n".join(lines))
    return 0
