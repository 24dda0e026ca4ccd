"""The rule on pixels: which coloured shapes of the built-in world a picture shows.

No learned judge. Pixels take the nearest palette colour; each connected patch of an object colour
is compared with every shape of the world, fitted in place, size and tilt; the shape with the best
overlap is what the patch shows, if the overlap is good enough.
"""

# H, W picture; h, w one patch with its margin

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow
from scipy import ndimage

from engine.data.records import Image, Mask
from engine.data.scene_draw import shape_distance
from engine.data.scene_model import BACKGROUND_COLOURS, COLOURS, MAX_TILT, SHAPES

SIDE = 128  # pictures are brought to this size before looking
MIN_AREA, MAX_AREA = 0.005, 0.3  # of the picture; the smallest object has 0.011, the largest 0.14
MIN_OVERLAP = 0.7  # intersection over union with the best shape
HIDDEN_COST = 0.35
NUM_FITTED = 3
_GREYS = ((145, 147, 150), (118, 120, 124))  # between dark and light ends of a gradient

Float = npt.NDArray[np.float32]
Pose = tuple[float, float, float, float]  # centre x, y and radius in pixels, tilt in radians


@dataclass(frozen=True, kw_only=True)
class Detection:
    """A coloured shape found in a picture: centre (x, y) in [0, 1], radius in shorter sides."""

    colour: str
    shape: str
    overlap: float
    x: float
    y: float
    radius: float


def label_colours(image: Image) -> npt.NDArray[np.int64]:
    """Index of the nearest object colour for every pixel [H, W], -1 for a background colour.

    A 3x3 median comes first: it removes noise and the one-pixel rims of antialiased edges.
    """
    palette = np.array([*COLOURS.values(), *BACKGROUND_COLOURS.values(), *_GREYS], np.float32)
    smooth = ndimage.median_filter(image, size=(3, 3, 1)).astype(np.float32)
    gaps = ((smooth[:, :, None] - palette) ** 2).sum(-1)
    nearest = gaps.argmin(-1)
    return np.where(nearest < len(COLOURS), nearest, -1)


def _overlap(patch: Mask, known: Mask, shape: str, pose: Pose) -> float:
    """How well a posed shape explains a patch: IoU over the `known` pixels, less what it hides.

    score = IoU * (1 - HIDDEN_COST * share of the shape on unknown pixels): a shape may pass behind
    patches of other colours, but one that stands free in front of them explains the patch better.
    """
    x, y, radius, tilt = pose
    dy = ((np.arange(patch.shape[0], dtype=np.float32) - np.float32(y)) / np.float32(radius))[
        :, None
    ]
    dx = ((np.arange(patch.shape[1], dtype=np.float32) - np.float32(x)) / np.float32(radius))[None]
    c, s = np.float32(np.cos(tilt)), np.float32(np.sin(tilt))
    drawn = shape_distance(shape, c * dx + s * dy, c * dy - s * dx) <= 0
    union = int(((drawn | patch) & known).sum())
    if not union:
        return 0.0
    hidden = 1 - int((drawn & known).sum()) / max(1, int(drawn.sum()))
    return int((drawn & patch).sum()) / union * (1 - HIDDEN_COST * hidden)


def _start(patch: Mask, shape: str) -> Pose:
    """Pose of an upright shape with about the patch's box."""
    rows, columns = np.nonzero(patch)
    x0, x1, y0, y1 = columns.min(), columns.max(), rows.min(), rows.max()
    width = {"diamond": 0.84, "triangle": 0.9, "square": 0.9}.get(shape, 0.97)
    return float(x0 + x1) / 2, float(y0 + y1) / 2, float(x1 - x0 + y1 - y0 + 2) / 4 / width, 0.0


def _climb(
    patch: Mask, known: Mask, shape: str, pose: Pose, rounds: tuple[int, ...]
) -> tuple[float, Pose]:
    """Best score of a shape with a patch, by coordinate ascent over its pose, finer each round."""
    best, reach = _overlap(patch, known, shape, pose), pose[2]
    for number in rounds:
        steps = np.array([0.15 * reach, 0.15 * reach, 0.12 * reach, 0.12]) / 1.7**number
        for k in (2, 1, 0, 3):
            for sign in (1, -1):
                moved = list(pose)
                moved[k] += sign * float(steps[k])
                moved[3] = min(max(moved[3], -1.5 * MAX_TILT), 1.5 * MAX_TILT)
                trial: Pose = (moved[0], moved[1], max(1.0, moved[2]), moved[3])
                score = _overlap(patch, known, shape, trial)
                if score > best:
                    best, pose = score, trial
    return best, pose


def _fit(patch: Mask, known: Mask) -> tuple[str, float, Pose]:
    """The shape that explains a patch best, how well, and its pose.

    Every shape is fitted roughly, the most promising ones then finely.
    """
    rough = {s: _climb(patch, known, s, _start(patch, s), (0,)) for s in SHAPES}
    hopeful = sorted(SHAPES, key=lambda s: -rough[s][0])[:NUM_FITTED]
    fits = {s: _climb(patch, known, s, rough[s][1], (0, 1, 2, 3)) for s in hopeful}
    shape = max(fits, key=lambda s: fits[s][0])
    return shape, *fits[shape]


def _at_size(image: Image) -> Image:
    """The picture with its longer side at `SIDE`: averaged down or interpolated up."""
    height, width = image.shape[:2]
    factor = max(height, width) / SIDE
    size = (max(1, round(width / factor)), max(1, round(height / factor)))
    how = Pillow.Resampling.BOX if factor > 1 else Pillow.Resampling.BICUBIC
    return image if factor == 1 else np.asarray(Pillow.fromarray(image).resize(size, how))


def detect(image: Image) -> list[Detection]:
    """All coloured shapes of a uint8 picture [H, W, 3], largest first."""
    image = _at_size(image)
    height, width = image.shape[:2]
    labels = label_colours(image)
    found: list[tuple[int, Detection]] = []
    for number, colour in enumerate(COLOURS):
        parts, _ = ndimage.label(labels == number)
        for k, box in enumerate(ndimage.find_objects(parts), 1):
            area = int((parts[box] == k).sum())
            if not MIN_AREA * height * width <= area <= MAX_AREA * height * width:
                continue
            margin = 2 + round(0.3 * max(box[0].stop - box[0].start, box[1].stop - box[1].start))
            top, left = box[0].start - margin, box[1].start - margin
            around = np.pad(labels, margin, constant_values=-2)[
                top + margin : box[0].stop + 2 * margin, left + margin : box[1].stop + 2 * margin
            ]
            patch = np.pad(parts, margin)[
                top + margin : box[0].stop + 2 * margin, left + margin : box[1].stop + 2 * margin
            ]
            patch = patch == k
            known = patch | (around == -1) | (around == number)  # elsewhere it may be covered
            shape, overlap, (x, y, radius, _) = _fit(patch, known)
            if overlap < MIN_OVERLAP:
                continue
            detection = Detection(
                colour=colour,
                shape=shape,
                overlap=overlap,
                x=(x + left + 0.5) / width,
                y=(y + top + 0.5) / height,
                radius=radius / min(height, width),
            )
            found.append((area, detection))
    return [d for _, d in sorted(found, key=lambda pair: -pair[0])]


def present(image: Image, wanted: Iterable[tuple[str, str]]) -> list[bool]:
    """For each wanted (colour, shape), whether the picture shows it; each patch serves one only."""
    free = [(d.colour, d.shape) for d in detect(image)]
    answers = []
    for pair in wanted:
        answers.append(pair in free)
        if pair in free:
            free.remove(pair)
    return answers


def share_present(image: Image, wanted: Iterable[tuple[str, str]]) -> float:
    """Share of the wanted (colour, shape) that the picture shows; 1 when nothing is wanted."""
    answers = present(image, wanted)
    return sum(answers) / len(answers) if answers else 1.0
