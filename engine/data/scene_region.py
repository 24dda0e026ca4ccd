"""Region prompts as a person would give them: clicks, scribbles, boxes and rough masks."""

# H, W picture

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.data.records import Mask, RegionKind
from engine.data.scene_model import DataError
from focus.config import RegionConfig

_RADII = RegionConfig()


def _window(mask: Mask, margin: int) -> tuple[slice, slice]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (
        slice(max(0, int(rows[0]) - margin), min(mask.shape[0], int(rows[-1]) + 1 + margin)),
        slice(max(0, int(columns[0]) - margin), min(mask.shape[1], int(columns[-1]) + 1 + margin)),
    )


def _shrink(mask: Mask) -> Mask:
    """Erosion by one pixel in the four directions."""
    padded = np.pad(mask, 1)
    out = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.asarray(out, np.bool_)


def _core(mask: Mask) -> Mask:
    """The inner part of a mask: eroded by an eighth of its width, if that leaves anything."""
    steps = max(1, round(0.12 * max(mask.any(0).sum(), mask.any(1).sum())))
    core = mask
    for _ in range(int(steps)):
        smaller = _shrink(core)
        if not smaller.any():
            break
        core = smaller
    return core


def _discs(points: npt.NDArray[np.float64], radius: float, size: tuple[int, int]) -> Mask:
    """Union of discs around points [P, 2] (x, y) in pixels; at least the pixel under each."""
    out = np.zeros(size, np.bool_)
    low = np.maximum(np.floor(points.min(0) - radius), 0).astype(int)
    high = np.ceil(points.max(0) + radius).astype(int) + 1
    y = np.arange(low[1], min(size[0], high[1])) + 0.5
    x = np.arange(low[0], min(size[1], high[0])) + 0.5
    gap = (y[:, None, None] - points[:, 1]) ** 2 + (x[None, :, None] - points[:, 0]) ** 2
    out[low[1] : low[1] + len(y), low[0] : low[0] + len(x)] = (gap <= max(radius, 0.71) ** 2).any(2)
    return out


def _inner_points(
    rng: np.random.Generator, mask: Mask, num: int
) -> npt.NDArray[np.float64]:  # [num, 2]
    rows, columns = np.nonzero(mask)
    chosen = rng.integers(len(rows), size=num)
    return np.stack([columns[chosen], rows[chosen]], axis=-1).astype(np.float64) + 0.5


def _longest_run(inside: npt.NDArray[np.bool_]) -> slice:
    """Where the longest stretch of True lies; empty if there is none."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], inside, [False]]).astype(np.int8)))
    if not len(edges):
        return slice(0, 0)
    starts, stops = edges[::2], edges[1::2]
    best = int((stops - starts).argmax())
    return slice(int(starts[best]), int(stops[best]))


def _scribble(rng: np.random.Generator, mask: Mask) -> npt.NDArray[np.float64]:
    """A wobbly stroke [P, 2] that stays inside a mask: the longest of a few attempts."""
    core, inner = _core(mask), _shrink(mask)
    best = _inner_points(rng, core, 1)
    for start, stop in _inner_points(rng, core, 12).reshape(6, 2, 2):
        length = float(np.hypot(*(stop - start)))
        t = np.linspace(0, 1, max(2, int(2 * length)))[:, None]
        across = (stop - start)[::-1] * (-1, 1)
        wobble = rng.uniform(-0.2, 0.2) * np.sin(np.pi * t) + 0.06 * np.sin(
            2 * np.pi * (rng.uniform(1, 3) * t + rng.random())
        )
        path = start + t * (stop - start) + wobble * across
        columns, rows = path.astype(int).T
        inside = (rows >= 0) & (rows < mask.shape[0]) & (columns >= 0) & (columns < mask.shape[1])
        inside[inside] = inner[rows[inside], columns[inside]]
        kept = path[_longest_run(inside)]
        best = kept if len(kept) > len(best) else best
    return best


def _rough(rng: np.random.Generator, mask: Mask) -> Mask:
    """A mask as one paints it in haste: blurred, shifted a little and cut at a random level."""
    width = max(3, round(0.16 * max(mask.any(0).sum(), mask.any(1).sum()))) | 1
    rows, columns = _window(mask, 2 * int(width))
    soft = mask[rows, columns].astype(np.float32)
    box = np.ones(int(width), np.float32) / width
    for axis in (0, 1):
        soft = np.apply_along_axis(lambda v: np.convolve(v, box, "same"), axis, soft)
    shift = rng.integers(-(width // 3), width // 3 + 1, 2)
    soft = np.roll(soft, tuple(int(s) for s in shift), (0, 1))
    soft += (
        0.25
        * np.kron(
            rng.uniform(-1, 1, (soft.shape[0] // 4 + 1, soft.shape[1] // 4 + 1)), np.ones((4, 4))
        )[: soft.shape[0], : soft.shape[1]].astype(np.float32)
        * (soft > 0.05)
    )
    out = np.zeros_like(mask)
    out[rows, columns] = soft > min(rng.uniform(0.3, 0.6), 0.9 * float(soft.max()))
    return out


def region_prompt(rng: np.random.Generator, mask: Mask, kind: RegionKind) -> Mask:
    """How a user would point at the object `mask` [H, W]: a region [H, W] of the given kind.

    click: a disc well inside. scribble: a wobbly line inside. box: the filled bounding box, each
    edge off by up to 8 %. mask: a coarse, shifted copy. Disc radii are those of `focus.regions`.
    Raises DataError for an empty mask.
    """
    if not mask.any():
        raise DataError("expected an object with visible pixels, got an empty mask; ask another")
    longer = max(mask.shape)
    size = (mask.shape[0], mask.shape[1])
    rows, columns = _window(mask, 1)
    offset = np.array([columns.start, rows.start])
    if kind == "click":
        point = _inner_points(rng, _core(mask[rows, columns]), 1) + offset
        return _discs(point, _RADII.click_radius * longer, size)
    if kind == "scribble":
        path = _scribble(rng, mask[rows, columns]) + offset
        return _discs(path, _RADII.scribble_radius * longer, size)
    if kind == "mask":
        return _rough(rng, mask)
    rows, columns = _window(mask, 0)
    jitter = rng.uniform(-0.08, 0.08, 4) * np.repeat(
        [rows.stop - rows.start, columns.stop - columns.start], 2
    )
    top, bottom = round(rows.start + jitter[0]), round(rows.stop + jitter[1])
    left, right = round(columns.start + jitter[2]), round(columns.stop + jitter[3])
    out = np.zeros_like(mask)
    out[max(0, top) : max(bottom, top + 1), max(0, left) : max(right, left + 1)] = True
    return out
