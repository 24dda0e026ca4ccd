"""Scenes to pixels: analytic signed distances, antialiased, every object in its own box only."""

# H, W picture height and width; h, w height and width of one object's box

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from engine.data.records import Image
from engine.data.scene_model import (
    BACKGROUND_COLOURS,
    COLOURS,
    Background,
    DataError,
    Scene,
    SceneObject,
)

Float = npt.NDArray[np.float32]
Instances = npt.NDArray[np.int32]  # [H, W], 0 background, i + 1 object i

RING_HOLE = 0.52  # inner over outer radius


def _polygon(x: Float, y: Float, normals: list[tuple[float, float]], offset: float) -> Float:
    """Distance to a convex polygon around 0: the largest of its half-plane distances."""
    out = normals[0][0] * x + normals[0][1] * y
    for nx, ny in normals[1:]:
        np.maximum(out, nx * x + ny * y, out=out)
    return out - np.float32(offset)


def _star(x: Float, y: Float) -> Float:
    sector = np.float32(2 * np.pi / 5)
    angle = np.arctan2(x, -y)  # 0 at the upward tip
    angle = np.abs(np.mod(angle + sector / 2, sector) - sector / 2)
    r = np.hypot(x, y)
    px, py = r * np.cos(angle), r * np.sin(angle)
    inner = 0.45
    ix, iy = inner * np.cos(np.pi / 5), inner * np.sin(np.pi / 5)
    ex, ey = ix - 1.0, iy  # edge from the tip (1, 0) to the inner corner
    length = float(np.hypot(ex, ey))
    return np.asarray(((px - 1.0) * ey - py * ex) / length, np.float32)


def _heart(x: Float, y: Float) -> Float:
    """Two round lobes on a right-angled corner; the classic exact distance, scaled to radius 1."""
    scale = np.float32(1.72)
    u = np.abs(x) / scale
    v = (np.float32(0.86) - y) / scale
    lobe = np.hypot(u - 0.25, v - 0.75) - np.float32(np.sqrt(2) / 4)
    fold = 0.5 * np.maximum(u + v, 0)
    near = np.minimum(u * u + (v - 1) ** 2, (u - fold) ** 2 + (v - fold) ** 2)
    side = np.sqrt(near) * np.sign(u - v)
    return np.asarray(np.where(u + v > 1, lobe, side) * scale, np.float32)


def shape_distance(shape: str, x: Float, y: Float) -> Float:
    """Signed distance (negative inside) to `shape` of radius 1 around 0, y downwards.

    Exact at edges, a lower bound elsewhere. Raises DataError for a shape that is not known.
    """
    if shape == "circle":
        return np.asarray(np.hypot(x, y) * np.float32(1 / 0.95) - 1, np.float32)
    if shape == "ring":
        middle, half = (1 + RING_HOLE) / 2, (1 - RING_HOLE) / 2
        return np.asarray(np.abs(np.hypot(x, y) - middle) - half, np.float32)
    if shape == "square":
        return np.asarray(np.maximum(np.abs(x), np.abs(y)) - 0.84, np.float32)
    if shape == "diamond":
        nx, ny = 1 / 0.68, 1.0
        length = float(np.hypot(nx, ny))
        return np.asarray((np.abs(x) * nx + np.abs(y) * ny - 1) / length, np.float32)
    if shape == "triangle":
        c, s = float(np.cos(np.pi / 6)), 0.5
        return _polygon(x, y - 0.22, [(0.0, 1.0), (c, -s), (-c, -s)], 0.55)
    if shape == "cross":
        ax, ay = np.abs(x), np.abs(y)
        long, short = np.maximum(ax, ay), np.minimum(ax, ay)
        return np.asarray(np.maximum(long - 0.95, short - 0.3), np.float32)
    if shape == "star":
        return _star(x, y)
    if shape == "heart":
        return _heart(x, y)
    raise DataError(f"expected a known shape, got {shape!r}; see SHAPES in scene_model")


@lru_cache(maxsize=32)
def _axes(height: int, width: int) -> tuple[Float, Float]:
    half = np.float32(0.5)
    y: Float = (np.arange(height, dtype=np.float32) + half) / np.float32(height)
    x: Float = (np.arange(width, dtype=np.float32) + half) / np.float32(width)
    return y, x


def _wave(t: Float, cells: int, pixels: int) -> Float:
    """Square wave of `cells` periods in [-1, 1] whose edges are about one pixel wide."""
    steep = np.float32(max(1.0, pixels / (2 * np.pi * cells)))
    wave: Float = np.clip(np.sin(2 * np.pi * cells * t, dtype=np.float32) * steep, -1, 1)
    return wave


def _noise(seed: int, cells: int, y: Float, x: Float) -> Float:
    """Smooth value noise in [-1, 1]: a seeded lattice, bilinear between its points."""
    num = 2 * cells
    lattice = np.random.Generator(np.random.PCG64(seed)).uniform(-1, 1, (num + 1, num + 1))

    def weights(t: Float) -> Float:
        at = t * num
        return np.asarray(
            np.clip(1 - np.abs(at[:, None] - np.arange(num + 1, dtype=np.float32)), 0, 1),
            np.float32,
        )

    return np.asarray(weights(y) @ lattice.astype(np.float32) @ weights(x).T, np.float32)


def render_background(background: Background, size: tuple[int, int]) -> Float:
    """Backdrop as float32 [H, W, 3] in 0..255."""
    height, width = size
    y, x = _axes(height, width)
    first = np.array(BACKGROUND_COLOURS[background.first], np.float32)
    canvas = np.empty((height, width, 3), np.float32)
    if background.kind == "plain":
        canvas[:] = first
        return canvas
    if background.kind == "gradient":
        second = np.array(BACKGROUND_COLOURS[background.second], np.float32)
        t = y[:, None] if background.angle else x[:, None]
        ramp = first + t * (second - first)
        canvas[:] = ramp[:, None] if background.angle else ramp[None]
        return canvas
    cells, contrast = background.cells, np.float32(background.contrast)
    if background.kind == "stripes":
        t, pixels = (y, height) if background.angle else (x, width)
        band = first + (contrast * _wave(t, cells, pixels))[:, None]
        canvas[:] = band[:, None] if background.angle else band[None]
    elif background.kind == "checker":
        tone = contrast * _wave(y, cells // 2, height)[:, None] * _wave(x, cells // 2, width)
        np.add(first, tone[..., None], out=canvas)
    elif background.kind == "noise":
        np.add(first, contrast * _noise(background.seed, cells, y, x)[..., None], out=canvas)
    else:
        raise DataError(f"expected a known background kind, got {background.kind!r}")
    return np.clip(canvas, 0, 255, out=canvas)


def _stamp(item: SceneObject, size: tuple[int, int]) -> tuple[slice, slice, Float] | None:
    """Box of an object and its coverage [h, w] there; None when it lies outside the picture."""
    height, width = size
    unit = min(height, width)
    radius = item.radius * unit
    cx, cy = item.x * width - 0.5, item.y * height - 0.5  # in pixel indices
    reach = 1.2 * radius + 1
    top, bottom = max(0, int(cy - reach)), min(height, int(cy + reach) + 2)
    left, right = max(0, int(cx - reach)), min(width, int(cx + reach) + 2)
    if top >= bottom or left >= right:
        return None
    dy = ((np.arange(top, bottom, dtype=np.float32) - np.float32(cy)) / np.float32(radius))[:, None]
    dx = ((np.arange(left, right, dtype=np.float32) - np.float32(cx)) / np.float32(radius))[None]
    c, s = np.float32(np.cos(item.tilt)), np.float32(np.sin(item.tilt))
    distance = shape_distance(item.shape, c * dx + s * dy, c * dy - s * dx)
    cover = np.clip(np.float32(0.5) - distance * np.float32(radius), 0, 1)
    return slice(top, bottom), slice(left, right), cover


def render(scene: Scene, size: tuple[int, int] = (128, 128)) -> tuple[Image, Instances]:
    """Picture and instance map of a scene at `size` = (H, W).

    colour = cover * object + (1 - cover) * what lies behind, cover = clip(1/2 - distance, 0, 1) in
    pixels; a pixel belongs to the nearest object that covers at least half of it.

    Returns: uint8 [H, W, 3] and int32 [H, W] (0 background, i + 1 object i).
    Raises: DataError when a side is under 8 pixels or a name is not known.
    """
    if min(size) < 8:
        raise DataError(f"expected sides of at least 8 pixels, got {size}; ask for a larger size")
    canvas = render_background(scene.background, size)
    instances = np.zeros(size, np.int32)
    for i in sorted(range(len(scene.objects)), key=lambda k: scene.objects[k].depth):
        item = scene.objects[i]
        stamp = _stamp(item, size)
        if stamp is None:
            continue
        rows, columns, cover = stamp
        box = canvas[rows, columns]
        box += cover[..., None] * (np.array(COLOURS[item.colour], np.float32) - box)
        instances[rows, columns][cover >= 0.5] = i + 1
    canvas += 0.5
    return canvas.astype(np.uint8), instances


def full_mask(item: SceneObject, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Footprint of one object as if nothing covered it, bool [H, W]."""
    out = np.zeros(size, np.bool_)
    stamp = _stamp(item, size)
    if stamp is not None:
        out[stamp[0], stamp[1]] = stamp[2] >= 0.5
    return out
