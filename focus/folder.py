"""Folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


def beside(path: Path, what: str) -> Path:
    """Return a name next to `path` that nothing of anybody's has."""
    return path.with_name(f".{path.name[:64]}.{uuid4().hex[:12]}.{what}")


@contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """Give a new folder to write into; it takes the place of `folder` when the block ends well.

    What `folder` held is lost then: whoever calls has looked. After an error nothing has changed.
    Raises `OSError`.
    """
    temporary = beside(folder, "tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        replace_directory(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_directory(temporary: Path, directory: Path) -> None:
    """Put a finished directory in the place of another, which stays whole until the end."""
    previous = beside(directory, "old")
    if directory.exists():
        os.rename(directory, previous)
    try:
        os.rename(temporary, directory)
    except BaseException:
        if previous.exists():
            os.rename(previous, directory)
        raise
    shutil.rmtree(previous, ignore_errors=True)
