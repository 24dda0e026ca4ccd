"""COCO's run-length masks and polygons, decoded as its own mask library does."""

# H W picture; runs go down the columns (Fortran order), starting with a run of zeros

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.data.records import Mask
from engine.data.scene_model import DataError

FINE = 5  # polygons are drawn on a grid this many times finer
MAX_PIXELS = 1 << 28


def decode_rle(rle: Mapping[str, Any]) -> Mask:
    """Decode {"size": [H, W], "counts": runs | compressed text} to bool [H, W].

    Raises: DataError when the runs do not fill the picture.
    """
    try:
        height, width = (int(side) for side in rle["size"])
        counts = rle["counts"]
        if isinstance(counts, (str, bytes)):
            counts = _unpack(counts if isinstance(counts, bytes) else counts.encode("ascii"))
        runs = np.asarray(counts, np.int64)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"an RLE mask with size and counts expected: {error!r}") from error
    total = height * width
    if min(height, width) < 0 or total > MAX_PIXELS or runs.ndim != 1 or (runs < 0).any():
        raise DataError(f"an RLE mask of a sane size expected, got size {height} x {width}")
    if int(runs.sum()) != total:
        raise DataError(f"{total} pixels of runs expected, got {int(runs.sum())}; the RLE is cut")
    values = np.arange(len(runs)) % 2 == 1
    return np.asarray(np.repeat(values, runs).reshape(width, height).T)


def encode_rle(mask: Mask) -> dict[str, Any]:
    """Encode bool [H, W] as {"size": [H, W], "counts": compressed text}."""
    flat = mask.T.reshape(-1).astype(np.int8)
    edges = np.flatnonzero(np.diff(flat)) + 1
    bounds = np.concatenate([[0], edges, [flat.size]])
    runs = np.diff(bounds).tolist()
    if flat.size and flat[0]:
        runs.insert(0, 0)
    return {"size": [int(side) for side in mask.shape], "counts": _pack(runs)}


def _unpack(text: bytes) -> list[int]:
    """Read base-32 digits (lowest first, bit 5 = more follow), deltas to the run before last."""
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        digit = letter - 48
        if not 0 <= digit < 64:
            raise ValueError(f"letter {letter} in counts")
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("counts end inside a number")
    return runs


def _pack(runs: Sequence[int]) -> str:
    letters = bytearray()
    for number, run in enumerate(runs):
        value = run - (runs[number - 2] if number > 2 else 0)
        more = True
        while more:
            digit = value & 31
            value >>= 5
            more = value != (-1 if digit & 16 else 0)
            letters.append(48 + digit + (32 if more else 0))
    return letters.decode("ascii")


def draw_polygon(polygon: Sequence[float], height: int, width: int) -> Mask:
    """Fill one polygon x0, y0, x1, y1, ... as COCO does: even-odd, boundary on a 5x grid.

    Each boundary point where the fine column changes toggles the parity from its pixel on.
    """
    points = np.asarray(polygon, np.float64)
    if points.ndim != 1 or points.size < 6 or points.size % 2 or not np.isfinite(points).all():
        raise DataError("a polygon of at least three finite points x, y expected")
    fine = (points.reshape(-1, 2) * FINE + 0.5).astype(np.int64)
    if np.abs(fine).max() > FINE * 100_000:
        raise DataError("a polygon near the picture expected, got coordinates beyond 100,000")
    u, v = _walk(fine)
    changed = np.flatnonzero(u[1:] != u[:-1]) + 1
    x = np.where(u[changed] < u[changed - 1], u[changed], u[changed] - 1)
    x = (x + 0.5) / FINE - 0.5
    y = (np.minimum(v[changed], v[changed - 1]) + 0.5) / FINE - 0.5
    inside = (np.floor(x) == x) & (x >= 0) & (x <= width - 1)
    y = np.ceil(np.clip(y, 0, height))[inside].astype(np.int64)
    toggles = np.bincount(x[inside].astype(np.int64) * height + y, minlength=height * width + 1)[
        : height * width
    ]
    return np.asarray((np.cumsum(toggles) % 2 == 1).reshape(width, height).T)


def _walk(points: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Every fine grid point on the closed outline, in order: columns u and rows v."""
    us, vs = [], []
    for start, end in zip(points, np.roll(points, -1, 0), strict=True):
        (xs, ys), (xe, ye) = start.tolist(), end.tolist()
        dx, dy = abs(xe - xs), abs(ye - ys)
        flip = (dx >= dy and xs > xe) or (dx < dy and ys > ye)
        if flip:
            xs, xe, ys, ye = xe, xs, ye, ys
        steps = np.arange(max(dx, dy) + 1)
        if flip:
            steps = steps[::-1]
        if dx >= dy:
            slope = (ye - ys) / dx if dx else 0.0
            us.append(steps + xs)
            vs.append((ys + slope * steps + 0.5).astype(np.int64))
        else:
            us.append((xs + (xe - xs) / dy * steps + 0.5).astype(np.int64))
            vs.append(steps + ys)
    return np.concatenate(us), np.concatenate(vs)


def decode_segmentation(segmentation: Any, height: int, width: int) -> Mask:
    """Decode COCO's `segmentation`: a list of polygons (united) or an RLE.

    Raises: DataError for anything else, or an RLE of another size.
    """
    if isinstance(segmentation, Mapping):
        mask = decode_rle(segmentation)
        if mask.shape != (height, width):
            raise DataError(f"a mask of {height} x {width} expected, got {mask.shape}")
        return mask
    if not isinstance(segmentation, Sequence) or isinstance(segmentation, (str, bytes)):
        raise DataError(f"polygons or an RLE expected, got {type(segmentation).__name__}")
    mask = np.zeros((height, width), np.bool_)
    for polygon in segmentation:
        if len(polygon) >= 6:
            mask |= draw_polygon(polygon, height, width)
    return mask
