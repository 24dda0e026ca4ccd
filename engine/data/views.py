"""How one picture becomes its three copies: crop, flip, colours, sizes. No pixel is touched here.

Both loaders, DALI's and PIL's, carry out the same `View`, so they differ by rounding alone.
"""

# every pair is (height, width); boxes are (top, left, bottom, right) in pixels, ends excluded

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from engine.data.shards import RATIO_BUCKETS
from focus.buckets import Bucket
from focus.geometry import Letterbox

Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the copies: the encoders' frame X_H, the ViT copy X_L and the pixel copy."""

    frame: Size
    vit: Size
    pixel: Size


@dataclass(frozen=True, kw_only=True)
class Augment:
    """How much pictures may change while training.

    flip: share of mirrored pictures; a text that speaks of sides is mirrored with its picture or
    keeps it as it is. brightness, contrast: largest relative change. Hue and saturation stay:
    texts name colours. shift: whether the crop may lie off the centre.
    """

    flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    shift: bool = False


NO_AUGMENT = Augment()


@dataclass(frozen=True, kw_only=True)
class View:
    """What is done to one picture, its target and its masks.

    box: what is kept. content, offset: where the crop lies inside the frame. brightness, contrast:
    v -> brightness (128 + contrast (v - 128)).
    """

    box: tuple[int, int, int, int]
    content: Size
    offset: Size
    sizes: Sizes
    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0


def bucket_sizes(bucket: int | Bucket, frame: Size) -> Sizes:
    """Sizes of one of the eleven shapes."""
    found = RATIO_BUCKETS[bucket] if isinstance(bucket, int) else bucket
    return Sizes(frame=frame, vit=found.vit_size, pixel=found.size)


def crop_box(size: Size, shape: Size, at: tuple[float, float] = (0.5, 0.5)) -> tuple[int, ...]:
    """The largest box with the aspect of `shape` inside `size`, `at` of the way from top left."""
    height, width = size
    kept_height = min(height, max(1, round(width * shape[0] / shape[1])))
    kept_width = min(width, max(1, round(height * shape[1] / shape[0])))
    top = round((height - kept_height) * at[0])
    left = round((width - kept_width) * at[1])
    return top, left, top + kept_height, left + kept_width


def make_view(
    size: Size,
    sizes: Sizes,
    *,
    crop: bool = True,
    augment: Augment = NO_AUGMENT,
    seed: int | None = None,
    flippable: bool = True,
) -> View:
    """Plan the copies of a picture of `size`; with `seed` the augmentation is drawn from it.

    `crop` False keeps the whole picture: the frame letterboxes it, the other copies squeeze it.
    """
    height, width = size
    rng = None if seed is None else np.random.default_rng(seed)
    draws = np.array([0.5] * 5) if rng is None else rng.random(5)
    at = (float(draws[0]), float(draws[1])) if augment.shift else (0.5, 0.5)
    box = crop_box(size, sizes.pixel, at) if crop else (0, 0, height, width)
    fitted = Letterbox.fit((box[2] - box[0], box[3] - box[1]), sizes.frame)
    return View(
        box=(box[0], box[1], box[2], box[3]),
        content=fitted.content,
        offset=fitted.offset,
        sizes=sizes,
        flip=bool(rng is not None and flippable and rng.random() < augment.flip),
        brightness=1 + augment.brightness * float(2 * draws[3] - 1),
        contrast=1 + augment.contrast * float(2 * draws[4] - 1),
    )


# Words by which a text knows left from right, and those that make a mirrored picture untrue.
_SIDE = re.compile(r"\b(left|right)(most|ward|wards|-hand)?\b", re.IGNORECASE)
_FIXED = re.compile(
    r"\b(right (now|away|angle\w*|before|after|there|here|answer|order)|(all|is|are|that's|turn) "
    r"right|rights|left (over|behind|out|alone)|(has|have|had|is|are|was|were|been) left|"
    r"left-?overs?|clockwise|counter-?clockwise|anticlockwise|mirror\w*|flip\w*|rotat\w*|"
    r"east\w*|west\w*|text|letters?|words?|writ\w+|says?|reads?|signs?|numbers?|digits?|logos?|"
    r"o'?clock|watch(es)?|clocks?|left[- ]handed|right[- ]handed|starboard|port side)\b",
    re.IGNORECASE,
)


def may_flip(*texts: str) -> bool:
    """Whether texts stay true when their picture is mirrored and `mirror_text` is applied."""
    return not any(_FIXED.search(text) for text in texts)


def mirror_text(text: str) -> str:
    """Swap left and right, case kept: "the Leftmost cup" -> "the Rightmost cup"."""

    def swap(match: re.Match[str]) -> str:
        word, rest = match.group(1), match.group(2) or ""
        other = "right" if word.lower() == "left" else "left"
        if word.isupper():
            other = other.upper()
        elif word[0].isupper():
            other = other.capitalize()
        return other + rest

    return _SIDE.sub(swap, text)
