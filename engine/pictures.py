"""Pictures, masks and reports into files; reading them is `focus.pictures`.

Writing is atomic: a reader sees the old file or the whole new one.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from focus.pictures import Mask, Picture, PictureError, read_frames, read_mask, read_picture

__all__ = [
    "Mask",
    "Picture",
    "PictureError",
    "dump_json",
    "read_frames",
    "read_mask",
    "read_picture",
    "write_bytes",
    "write_json",
    "write_mask",
    "write_picture",
]


def write_picture(image: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write a PNG atomically, making its folder; returns the path."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return write_bytes(buffer.getvalue(), path)


def write_mask(mask: Mask, path: str | os.PathLike[str]) -> Path:
    """Write a bool [H, W] mask as a black and white PNG, atomically."""
    return write_picture(Image.fromarray(mask.astype(np.uint8) * 255), path)


def write_json(values: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write JSON with two-space indentation, atomically."""
    return write_bytes((dump_json(values) + "\n").encode(), path)


def dump_json(values: Mapping[str, Any]) -> str:
    """Return indented JSON; paths become strings, numpy scalars numbers; NaN is refused."""
    return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False, default=_plain)


def write_bytes(content: bytes, path: str | os.PathLike[str]) -> Path:
    """Write a file so that it is there whole or not at all.

    Raises:
        PictureError: the folder cannot be made, is not writable, or the disk is full.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:64]}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        reason = error.strerror or str(error)
        raise PictureError(f"{path}: cannot be written: {reason}") from error
    return path


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"not JSON: {type(value).__name__}")
