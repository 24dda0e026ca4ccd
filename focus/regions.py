"""Region prompts: clicks, scribbles, boxes and masks become binary masks, then one vector each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn

from focus.config import SCALES, HierarchicalConfig, RegionConfig

# B batch, R regions, P points, C channels, h w grid of a feature map, H W picture

Bitmap = npt.NDArray[np.bool_]
NUM_FREQUENCIES = 8  # octaves of the Fourier position


class RegionError(ValueError):
    """A region prompt that does not fit its picture."""


@dataclass(frozen=True)
class Click:
    """A point, in pixels of the picture (x to the right, y down)."""

    x: float
    y: float


@dataclass(frozen=True)
class Box:
    """A rectangle, in pixels of the picture: 0 <= x0 < x1 <= width, likewise y."""

    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True, eq=False)
class Scribble:
    """A stroke: points (x, y) in drawing order, or the drawn pixels as a mask [H, W]."""

    stroke: Sequence[tuple[float, float]] | npt.NDArray[np.generic]


@dataclass(frozen=True, eq=False)
class MaskRegion:
    """A region painted pixel by pixel, [H, W], nonzero inside."""

    mask: npt.NDArray[np.generic]


Region = Click | Box | Scribble | MaskRegion


def region_mask(
    region: Region, size: tuple[int, int], config: RegionConfig | None = None
) -> Bitmap:
    """Draw a region prompt as a binary mask [H, W] of a picture of `size` (H, W).

    Clicks become discs, strokes are thickened; radii are shares of the longer side. Boxes are
    filled and masks taken as they are. Raises `RegionError` for what lies outside the picture, has
    another size than the picture, or is empty.
    """
    config = config or RegionConfig()
    longer = max(size)
    if isinstance(region, Click):
        _check_inside(np.array([[region.x, region.y]]), size, "click")
        return _draw([(region.x, region.y)], size, config.click_radius * longer)
    if isinstance(region, Box):
        return _fill(region, size)
    if isinstance(region, MaskRegion):
        return _check_mask(region.mask, size, "mask")
    radius = config.scribble_radius * longer
    stroke = region.stroke
    if isinstance(stroke, np.ndarray) and not (stroke.ndim == 2 and stroke.shape[1] == 2):
        return _thicken(_check_mask(stroke, size, "scribble"), radius)
    points = np.asarray(stroke, np.float64).reshape(-1, 2)
    if not len(points):
        raise RegionError("a scribble of at least one point expected, got none")
    _check_inside(points, size, "scribble")
    return _draw([(float(x), float(y)) for x, y in points], size, radius)


def _check_inside(points: npt.NDArray[np.float64], size: tuple[int, int], what: str) -> None:
    height, width = size
    inside = (points >= 0) & (points < (width, height)) & np.isfinite(points)
    if not inside.all():
        x, y = points[~inside.all(axis=1)][0]
        raise RegionError(
            f"{what}: a point inside the picture expected (x below {width}, y below {height}, "
            f"none negative), got ({x:g}, {y:g})"
        )


def _check_mask(mask: npt.NDArray[np.generic], size: tuple[int, int], what: str) -> Bitmap:
    if mask.shape != size:
        raise RegionError(
            f"{what}: a mask of the picture's size {size} (height, width) expected, got "
            f"{mask.shape}; draw it on the picture at its own size"
        )
    drawn = mask.astype(np.bool_)
    if not drawn.any():
        raise RegionError(f"{what}: at least one marked pixel expected, got an empty mask")
    return drawn


def _fill(box: Box, size: tuple[int, int]) -> Bitmap:
    height, width = size
    if not (0 <= box.x0 < box.x1 <= width and 0 <= box.y0 < box.y1 <= height):
        raise RegionError(
            f"box: 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height} expected, got "
            f"({box.x0:g}, {box.y0:g}, {box.x1:g}, {box.y1:g})"
        )
    mask: Bitmap = np.zeros(size, np.bool_)
    rows = slice(math.floor(box.y0), math.ceil(box.y1))
    mask[rows, math.floor(box.x0) : math.ceil(box.x1)] = True
    return mask


def _draw(points: Sequence[tuple[float, float]], size: tuple[int, int], radius: float) -> Bitmap:
    """Draw a polyline of discs; one point is one disc."""
    thin: Bitmap = np.zeros(size, np.bool_)
    path = [np.asarray(points[:1], np.float64)]
    for start, end in itertools.pairwise(points):
        steps = max(1, math.ceil(2 * math.dist(start, end)))
        path.append(np.linspace(start, end, steps + 1)[1:])
    x, y = np.concatenate(path).astype(np.int64).T
    thin[y, x] = True
    return _thicken(thin, radius)


def _thicken(mask: Bitmap, radius: float) -> Bitmap:
    """Grow a mask by a disc: all pixels at most `radius` away from it."""
    return np.asarray(distance_transform_edt(~mask) <= radius)


def sample_points(mask: Bitmap, num: int, seed: int | None = None) -> npt.NDArray[np.float32]:
    """Draw `num` pixel centres of a mask [H, W] as [P, 2] (x, y) in [0, 1].

    With a seed: uniformly, without repetition unless the mask has fewer pixels. Without: evenly
    spaced in reading order, the same every time (evaluation). Raises `RegionError` if it is empty.
    """
    pixels = np.flatnonzero(mask)
    if not len(pixels):
        raise RegionError("a region with at least one pixel expected, got an empty mask")
    if seed is None:
        chosen = pixels[((np.arange(num) + 0.5) * len(pixels) / num).astype(np.int64)]
    else:
        chosen = np.random.default_rng(seed).choice(pixels, num, replace=len(pixels) < num)
    rows, columns = np.divmod(chosen, mask.shape[1])
    x, y = (columns + 0.5) / mask.shape[1], (rows + 0.5) / mask.shape[0]
    return np.stack([x, y], axis=-1).astype(np.float32)


class RegionPooler(nn.Module):
    """One vector per region, to stand at its <region> token.

        v_r = mean_p E_img(p)  [+ W_h mean_p f_s(p)]  [+ W_p mean_p fourier(p)],   p in region r

    E_img is the projected picture feature, f_s one hierarchical scale (E_img alone is as coarse as
    28 pixels). Both optional projections start at zero. Sampling is bilinear between cell centres
    (align_corners False: a token stands for its cell).
    """

    def __init__(
        self, config: RegionConfig, hierarchical: HierarchicalConfig, llm_dim: int
    ) -> None:
        super().__init__()
        self.config = config
        self.fine: nn.Linear | None = None
        self.position: nn.Linear | None = None
        if config.hierarchical_scale is not None:
            self.fine = nn.Linear(hierarchical.dim_of(config.hierarchical_scale), llm_dim)
        if config.position:
            self.position = nn.Linear(4 * NUM_FREQUENCIES, llm_dim)
        for layer in (self.fine, self.position):
            if layer is not None:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, image_map: Tensor, features: Sequence[Tensor], points: Tensor) -> Tensor:
        """Pool image_map [B, llm_dim, h, w] and res2..res5 at points [B, R, P, 2]: [B, R, llm_dim].

        Differentiable in both maps.
        """
        pooled = pool_at(image_map, points)
        if self.fine is not None and self.config.hierarchical_scale is not None:
            scale = features[SCALES.index(self.config.hierarchical_scale)]
            pooled = pooled + self.fine(pool_at(scale, points))
        if self.position is not None:
            encoded = fourier(points).mean(dim=2).to(pooled.dtype)
            pooled = pooled + self.position(encoded)
        return pooled


def pool_at(feature: Tensor, points: Tensor) -> Tensor:
    """Mean of a map [B, C, h, w] over points [B, R, P, 2] in [0, 1]: [B, R, C].

    Sampled in at least fp32: half precision would move the points by whole cells.
    """
    wide = torch.promote_types(feature.dtype, torch.float32)
    grid = (2.0 * points - 1.0).to(wide)
    sampled = F.grid_sample(
        feature.to(wide), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return sampled.mean(dim=-1).transpose(1, 2).to(feature.dtype)


def fourier(points: Tensor) -> Tensor:
    """Sines and cosines of 2^k pi times x and y, k = 0..7: [..., 2] -> [..., 32]."""
    octave = torch.arange(NUM_FREQUENCIES, device=points.device, dtype=points.dtype)
    angle = (points[..., None] * (torch.pi * torch.exp2(octave))).flatten(-2)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
