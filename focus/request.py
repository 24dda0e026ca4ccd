"""What users ask and what they get back: plain records between the API and the network."""

# H W picture

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image as PILImage

Pixels = npt.NDArray[np.uint8]  # [H, W, 3]
Bitmap = npt.NDArray[np.bool_]  # [H, W]


class RequestError(ValueError):
    """A request that the model cannot take; says expected, got and what to do."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request, as `focus.inputs.Sample` wants it. `size` is the user's own picture size.

    turns: further (question, answer) pairs of a dialogue; the last answer is the one to write.
    """

    task: str
    text: str = ""
    answer: str = ""
    turns: tuple[tuple[str, str], ...] = ()
    classes: tuple[str, ...] = ()
    image: Pixels | None = None
    regions: tuple[Bitmap, ...] = ()
    masks: tuple[Bitmap, ...] = ()
    labels: tuple[int, ...] = ()
    target: Pixels | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class SegmentResult:
    """Masks of one picture at its own size: best first, or one for each region in their order.

    masks: bool [H, W] each. names: the candidate of each mask (class name, expression, region).
    scores: confidence in [0, 1]. labels: candidate number of each. text: what the model said.
    probabilities: float [H, W] of each, before thresholding.
    """

    masks: list[Bitmap]
    names: list[str]
    scores: list[float]
    labels: list[int]
    text: str
    probabilities: list[npt.NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class EditResult:
    """An edited picture at the size of the source, and the region that the model decided to change.

    raw: the decoder's picture at the model's own resolution, before it is fitted into the source.
    """

    image: PILImage.Image
    mask: Bitmap
    text: str
    raw: PILImage.Image
