"""Pictures of any size to the encoders' frame and back: letterboxing, masks, points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

# H W source picture, h w frame (or any grid laid over the frame)

Pixels = npt.NDArray[np.uint8]
Bitmap = npt.NDArray[np.bool_]
WHITE = 255


class GeometryError(ValueError):
    """A picture, mask or point that does not fit its frame."""


@dataclass(frozen=True, kw_only=True)
class Letterbox:
    """How a picture was fitted into a frame; every pair is (height, width) in pixels.

    source: size of the picture. frame: size it was fitted into. content: size of the picture inside
    the frame. offset: (top, left) of the content.
    """

    source: tuple[int, int]
    frame: tuple[int, int]
    content: tuple[int, int]
    offset: tuple[int, int]

    @classmethod
    def fit(cls, source: tuple[int, int], frame: tuple[int, int]) -> Letterbox:
        """Scale `source` to the largest size inside `frame`, aspect kept, and centre it."""
        if min(*source, *frame) < 1:
            raise GeometryError(f"sizes of at least 1 x 1 expected, got {source} and {frame}")
        scale = min(frame[0] / source[0], frame[1] / source[1])
        height, width = (
            min(max(round(s * scale), 1), f) for s, f in zip(source, frame, strict=True)
        )
        offset = ((frame[0] - height) // 2, (frame[1] - width) // 2)
        return cls(source=source, frame=frame, content=(height, width), offset=offset)

    @overload
    def mask_back(self, mask: Tensor) -> Tensor: ...
    @overload
    def mask_back(self, mask: Bitmap) -> Bitmap: ...
    def mask_back(self, mask: Tensor | Bitmap) -> Tensor | Bitmap:
        """Resample masks from any grid laid over the frame to the source picture.

        A tensor [..., h, w] of logits or probabilities comes back as [..., H, W] float, bilinear
        and differentiable. A bool array [h, w] comes back as bool [H, W] (half covered is in).
        """
        if isinstance(mask, np.ndarray):
            return (self.mask_back(torch.from_numpy(mask).float()) > 0.5).numpy()
        if not mask.numel():
            return mask.float().new_zeros(*mask.shape[:-2], *self.source)
        flat = mask.float().reshape(1, -1, *mask.shape[-2:])
        rows, columns = (
            self._positions(axis, mask.device) for axis in (0, 1)
        )  # in [0, 1] of the frame
        grid = torch.stack(
            [
                columns[None, :].expand(len(rows), -1),
                rows[:, None].expand(-1, len(columns)),
            ],
            dim=-1,
        )
        grid = (2.0 * grid - 1.0)[None]
        back = F.grid_sample(
            flat, grid, mode="bilinear", padding_mode="border", align_corners=False
        )
        return back.reshape(*mask.shape[:-2], *self.source)

    def image_back(self, image: Pixels) -> Pixels:
        """Cut the content out of a picture [h, w, 3] of the frame and resize it to the source.

        The picture may have another size than the frame, but must have its aspect.
        """
        height, width = image.shape[:2]
        if abs(height * self.frame[1] - width * self.frame[0]) > max(self.frame):
            raise GeometryError(
                f"a picture with the aspect of the frame {self.frame} expected, got "
                f"{height} x {width}"
            )
        scale = (height / self.frame[0], width / self.frame[1])
        top, left = (o * s for o, s in zip(self.offset, scale, strict=True))
        bottom, right = (
            (o + c) * s for o, c, s in zip(self.offset, self.content, scale, strict=True)
        )
        resized = Image.fromarray(image).resize(
            (self.source[1], self.source[0]),
            Image.Resampling.BICUBIC,
            box=(left, top, right, bottom),
        )
        return np.asarray(resized)

    def points(
        self, xy: npt.NDArray[np.floating] | Sequence[Sequence[float]]
    ) -> npt.NDArray[np.float32]:
        """Map points [..., 2] (x, y) in pixels of the source to [0, 1] of the frame."""
        given = np.asarray(xy, np.float64)
        scale = (self.content[1] / self.source[1], self.content[0] / self.source[0])
        moved = given * scale + (self.offset[1], self.offset[0])
        return (moved / (self.frame[1], self.frame[0])).astype(np.float32)

    def _positions(self, axis: int, device: torch.device) -> Tensor:
        """Centres of the source's pixels along one axis, in [0, 1] of the frame."""
        count = self.source[axis]
        centres = (torch.arange(count, device=device) + 0.5) / count
        return (centres * self.content[axis] + self.offset[axis]) / self.frame[axis]


def letterbox(
    image: Pixels, size: tuple[int, int], fill: int | tuple[int, int, int] = WHITE
) -> tuple[Pixels, Letterbox]:
    """Fit a picture [H, W, 3] uint8 into `size` (h, w) without distortion, `fill` around it.

    Returns the frame [h, w, 3] uint8 and the `Letterbox` that leads back. Resampling is bicubic
    with antialiasing. Raises `GeometryError` unless the picture is uint8 with three channels.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise GeometryError(
            f"a picture [H, W, 3] uint8 expected, got {image.shape} {image.dtype}; "
            "convert it to RGB first"
        )
    box = Letterbox.fit((image.shape[0], image.shape[1]), size)
    content = image
    if box.content != box.source:
        content = np.asarray(
            Image.fromarray(image).resize(
                (box.content[1], box.content[0]), Image.Resampling.BICUBIC
            )
        )
    framed = np.empty((*size, 3), np.uint8)
    framed[:] = fill
    top, left = box.offset
    framed[top : top + box.content[0], left : left + box.content[1]] = content
    return framed, box


def lay_in_frame(
    masks: Sequence[Tensor], boxes: Sequence[Letterbox], frame: tuple[int, int]
) -> Tensor:
    """Lay each picture's first mask [1, H, W] into the encoders' frame: [B, 1, h, w] in [0, 1].

    Sampled by area, so that nothing thin is lost in a large picture.
    """
    framed = torch.zeros(len(boxes), 1, *frame)
    for row, (mask, box) in enumerate(zip(masks, boxes, strict=True)):
        height, width = box.content
        top, left = box.offset
        fitted = F.interpolate(mask[None, :1].float(), (height, width), mode="area")
        framed[row, 0, top : top + height, left : left + width] = fitted[0, 0]
    return framed
