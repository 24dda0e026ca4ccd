"""Measures with exact ground truth: overlap of masks, likeness of pictures, equality of answers.

All are pure functions of arrays; none needs a learned judge.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from engine.data.records import Image, Mask

Array = npt.NDArray[np.floating]


def iou(predicted: Mask, truth: Mask) -> float:
    """Intersection over union of two masks [H, W]; 1 when both are empty."""
    if predicted.shape != truth.shape:
        raise ValueError(f"masks of one shape expected, got {predicted.shape} and {truth.shape}")
    union = np.logical_or(predicted, truth).sum()
    return 1.0 if union == 0 else float(np.logical_and(predicted, truth).sum() / union)


def cumulative_iou(pairs: Iterable[tuple[Mask, Mask]]) -> float:
    """cIoU: summed intersections over summed unions of (predicted, truth) pairs."""
    inter = union = 0
    for predicted, truth in pairs:
        inter += int(np.logical_and(predicted, truth).sum())
        union += int(np.logical_or(predicted, truth).sum())
    return 1.0 if union == 0 else inter / union


def class_miou(predicted: Sequence[dict[str, Mask]], truth: Sequence[dict[str, Mask]]) -> float:
    """Mean over classes of the IoU summed over pictures; absent classes do not count."""
    inter: dict[str, int] = {}
    union: dict[str, int] = {}
    for found, wanted in zip(predicted, truth, strict=True):
        for name in found.keys() | wanted.keys():
            a, b = found.get(name), wanted.get(name)
            both = 0 if a is None or b is None else int(np.logical_and(a, b).sum())
            size_a = 0 if a is None else int(a.sum())
            size_b = 0 if b is None else int(b.sum())
            inter[name] = inter.get(name, 0) + both
            union[name] = union.get(name, 0) + size_a + size_b - both
    scores = [inter[name] / union[name] for name in union if union[name]]
    return float(np.mean(scores)) if scores else 1.0


def psnr(predicted: Image, truth: Image, where: Mask | None = None) -> float:
    """Peak signal-to-noise ratio in dB of 8-bit pictures, over the pixels of `where`."""
    error = (predicted.astype(np.float64) - truth.astype(np.float64)) ** 2
    kept = error if where is None else error[where]
    if kept.size == 0:
        return float("inf")
    mean = kept.mean()
    return float("inf") if mean == 0 else float(10 * np.log10(255.0**2 / mean))


def mean_abs_error(predicted: Image, truth: Image, where: Mask) -> float:
    """Mean absolute error in 8-bit units over the pixels of `where`; 0 when there are none."""
    error = np.abs(predicted.astype(np.float64) - truth.astype(np.float64))[where]
    return float(error.mean()) if error.size else 0.0


def edit_succeeds(
    predicted: Image, truth: Image, changed: Mask, inside: float = 30.0, outside: float = 22.0
) -> bool:
    """Whether an edit is right: error inside the changed region below `inside` (8-bit units), PSNR
    outside it at least `outside` dB."""
    return (
        mean_abs_error(predicted, truth, changed) < inside
        and psnr(predicted, truth, ~changed) >= outside
    )


def normalise_answer(text: str) -> str:
    """Lower case, no articles, no punctuation, single spaces: what exact match compares."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return " ".join(word for word in words if word not in {"a", "an", "the"})


def answers_match(predicted: str, truth: str) -> bool:
    """Exact match after `normalise_answer`."""
    return normalise_answer(predicted) == normalise_answer(truth)


def union(masks: Sequence[Mask], shape: tuple[int, int]) -> Mask:
    """Return the union of masks; empty when there are none."""
    return np.any(masks, axis=0) if len(masks) else np.zeros(shape, np.bool_)
