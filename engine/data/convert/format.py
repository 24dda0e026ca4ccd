"""What a converter is, and the few ways in which converters read files.

A converter is a function (root, options) -> iterator of `Lazy`: a source sample's name and a
function that reads it. Going past a sample costs next to nothing, so that a conversion resumes and
is shared among processes by skipping. To add a dataset: a function here beside and a line in
`registry.FORMATS`.
"""

from __future__ import annotations

import io
import json
import pickle
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow

from engine.data.guard import BadSample, decode_map
from engine.data.scene_model import DataError
from engine.data.schema import Item

__all__ = ["BadSample", "DataError", "Format", "Item", "Lazy", "Options", "decode_map"]

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to convert.

    split: of the dataset, by its own name ("" = the format's usual training split). images: folder
    of pictures when it lies elsewhere. variant: a format's own choice (its help says which).
    classes: candidate names per sample of class segmentation. frames: per clip.
    """

    split: str = ""
    images: Path | None = None
    variant: str = ""
    classes: int = 40
    frames: int = 16


@dataclass(frozen=True)
class Lazy:
    """One source sample, not yet read."""

    name: str
    make: Callable[[], Item]


@dataclass(frozen=True, kw_only=True)
class Format:
    """A dataset format: what it is called, what it looks like on disk, how it is read."""

    name: str
    layout: str
    convert: Callable[[Path, Options], Iterator[Lazy]]


class _Plain(pickle.Unpickler):
    """Reads lists, dicts, strings and numbers; refuses every class and function."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise DataError(f"a pickle of plain values expected, got {module}.{name}; do not trust it")


def read_pickle(path: Path) -> Any:
    """Read a pickle of plain values. Raises: DataError for anything that would run code."""
    try:
        with path.open("rb") as file:
            return _Plain(file, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: a pickle of plain values expected: {error}") from error


def read_json(path: Path) -> Any:
    """Read JSON, as UTF-8 or, as some annotations are, cp1252. Raises: DataError."""
    raw = path.read_bytes()
    try:
        try:
            return json.loads(raw.decode("utf-8-sig"))
        except UnicodeDecodeError:
            return json.loads(raw.decode("cp1252"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: JSON expected: {error}") from error


def find(root: Path, *candidates: str) -> Path:
    """Return the first of several places that exists. Raises: DataError that names them all."""
    for candidate in candidates:
        if (root / candidate).exists():
            return root / candidate
    raise DataError(f"{root}: one of {', '.join(candidates)} expected; see the format's layout")


def read_bytes(folder: Path, name: str) -> bytes:
    """Read a picture below `folder`. Raises: BadSample when it is missing or lies outside."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise BadSample("bad_schema", f"a path inside {folder} expected, got {name!r}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadSample("missing_member", f"{path}: {error.strerror}") from error


def read_ids(data: bytes) -> Ids:
    """Decode an index picture as its numbers: palette indices, grey levels, never colours."""
    try:
        with Pillow.open(io.BytesIO(data)) as opened:
            if opened.mode not in ("P", "L", "I;16", "I", "1"):
                raise BadSample("bad_mask", f"an index picture expected, got mode {opened.mode}")
            return np.asarray(opened).astype(np.int64)
    except BadSample:
        raise
    except Exception as error:
        raise BadSample("undecodable", f"{type(error).__name__}: {error}") from error


def pick_classes(names: Sequence[str], present: Sequence[str], most: int, key: str) -> list[str]:
    """The present names and others up to `most`, in an order that depends on the key only."""
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    unique = list(dict.fromkeys(present))
    others = [name for name in dict.fromkeys(names) if name not in set(unique)]
    spare = max(0, min(len(others), most - len(unique)))
    chosen = unique + [others[i] for i in rng.permutation(len(others))[:spare]]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def join_names(names: Sequence[str]) -> str:
    """The names a segmentation answer says: each once, in order of first appearance."""
    return ", ".join(dict.fromkeys(names))
