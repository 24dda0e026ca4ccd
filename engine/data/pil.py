"""Pictures decoded by PIL: the fastest way on a CPU, and the oracle of DALI's tests.

Most of the time of a picture goes into resampling. PyTorch's vectorised uint8 filter does what
Pillow's does (within two levels of 255) in a quarter of the time, so it is used for every copy.
"""

# N pictures, H W frame, h w another copy

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from engine.data.guard import BadSample, Header, decode_map, decode_picture
from engine.data.records import Image
from engine.data.scene_model import DataError
from engine.data.views import Size, View

Pixels = npt.NDArray[np.uint8]  # [h, w, 3]
Levels = npt.NDArray[np.uint16]  # [H, W]
WHITE = 255


@dataclass(frozen=True)
class Work:
    """One picture to decode, how, and the index map that goes with it (PNG bytes).

    header: what `check_picture` said of the picture, where that was asked before.
    """

    picture: bytes
    view: View
    map: bytes | None = None
    map_bits: int = 8
    header: Header | None = None


@dataclass(frozen=True)
class Copies:
    """A decoded picture at its three sizes, and its map in the frame."""

    frame: Pixels  # [H, W, 3], letterboxed, white around
    vit: Pixels
    pixel: Pixels
    map: Levels | None


class Decoder(Protocol):
    """What both loaders offer."""

    def decode(self, works: Sequence[Work]) -> list[Copies | BadSample]:
        """Decode pictures in order; a broken one becomes its `BadSample`."""
        ...

    def close(self) -> None:
        """Free what the decoder holds."""
        ...


class PilDecoder:
    """So many pictures at a time, in this process; decoding and resampling hold no lock."""

    def __init__(self, threads: int = 1) -> None:
        self._pool = ThreadPoolExecutor(threads, "pictures") if threads > 1 else None

    def decode(self, works: Sequence[Work]) -> list[Copies | BadSample]:
        """See `Decoder`."""
        return list(map(_try, works) if self._pool is None else self._pool.map(_try, works))

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()


def _try(work: Work) -> Copies | BadSample:
    try:
        return copies(work)
    except BadSample as error:
        return error


def copies(work: Work) -> Copies:
    """Decode one picture once and cut every copy from it. Raises `BadSample`."""
    view = work.view
    image = decode_picture(work.picture, work.header)
    check_box(view, (image.shape[0], image.shape[1]))
    top, left, bottom, right = view.box
    part = recolour(image[top:bottom, left:right], view.brightness, view.contrast)
    part = np.require(part, requirements=["C", "W"])  # as torch wants it, once for all copies
    frame = np.full((*view.sizes.frame, 3), WHITE, np.uint8)
    _paste(frame, view, resize(part, view.content, view.flip))
    levels = None
    if work.map is not None:
        found = decode_map(work.map)
        if found.shape != image.shape[:2]:
            raise BadSample("wrong_size", f"a map of {image.shape[:2]} expected, got {found.shape}")
        levels = np.zeros(view.sizes.frame, np.uint16)
        _paste(levels, view, nearest(found, view, view.content))
    return Copies(
        frame=frame,
        vit=resize(part, view.sizes.vit, view.flip),
        pixel=resize(part, view.sizes.pixel, view.flip),
        map=levels,
    )


def check_box(view: View, size: Size) -> None:
    """Raise BadSample("wrong_size") when a view was planned for a larger picture."""
    if view.box[2] > size[0] or view.box[3] > size[1]:
        raise BadSample("wrong_size", f"a picture around {view.box} expected, got {size}")


def _paste(into: npt.NDArray[np.generic], view: View, part: npt.NDArray[np.generic]) -> None:
    top, left = view.offset
    into[top : top + view.content[0], left : left + view.content[1]] = part


def recolour(image: Image, brightness: float, contrast: float) -> Image:
    """v -> brightness (128 + contrast (v - 128)), rounded, in [0, 255]."""
    if brightness == contrast == 1:
        return image
    levels = np.float32(brightness) * (128 + np.float32(contrast) * (np.arange(256) - 128))
    table = np.rint(levels).clip(0, 255).astype(np.uint8)
    recoloured: Image = table[image]
    return recoloured


def resize(image: Image, size: Size, flip: bool = False) -> Pixels:
    """Resample [H, W, 3] bicubically (a = -0.5) with antialiasing; mirror it if asked."""
    if image.shape[:2] != size:
        whole = torch.frombuffer(np.ascontiguousarray(image), dtype=torch.uint8)
        channels = whole.view(1, *image.shape).permute(0, 3, 1, 2)
        small = F.interpolate(channels, size, mode="bicubic", antialias=True)
        image = small[0].permute(1, 2, 0).contiguous().numpy()
    return image[:, ::-1] if flip else image


def nearest(found: npt.NDArray[np.uint16], view: View, size: Size) -> Levels:
    """The same for an index map, taking the pixel under the centre of each new one."""
    top, left, bottom, right = view.box
    ends = (right, left) if view.flip else (left, right)
    rows, columns = _centres(top, bottom, size[0]), _centres(*ends, size[1])
    taken: Levels = found.take(rows, 0).take(columns, 1)
    return taken


def _centres(start: int, end: int, count: int) -> npt.NDArray[np.int64]:
    """Source pixels under the centres of `count` new ones, in fp32 as DALI reckons."""
    scale = np.float32(end - start) / np.float32(count)
    origin = np.float32(start) + np.float32(0.5) * scale
    found = np.floor(np.arange(count, dtype=np.float32) * scale + origin).astype(np.int64)
    inside: npt.NDArray[np.int64] = found.clip(min(start, end), max(start, end) - 1)
    return inside


def open_decoder(name: str, threads: int = 2, device: int | None = None) -> Decoder:
    """Return the decoder "dali", "pil", or "auto": DALI where it is installed and a GPU decodes.

    Raises: DataError when DALI is asked for by name and missing.
    """
    if name not in ("auto", "dali", "pil"):
        raise DataError(f"a loader of auto, dali, pil expected, got {name!r}")
    if name == "dali" or (name == "auto" and device is not None):
        from engine.data.dali import DaliDecoder, dali_problem

        problem = dali_problem()
        if problem is None:
            return DaliDecoder(threads=threads, device=device)
        if name == "dali":
            raise DataError(f"DALI cannot be used: {problem}; install it, or choose loader=pil")
    return PilDecoder(threads)
