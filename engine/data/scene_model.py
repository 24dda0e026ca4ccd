"""What a scene of the built-in world is, and how one is drawn at random.

Coordinates: x to the right and y downwards, both in [0, 1] across the picture; radii in units of
the shorter side. Everything is a function of (split, seed, index): no global state, no files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

T = TypeVar("T")
Split = Literal["train", "val", "test", "test_unseen"]
SPLITS: tuple[Split, ...] = ("train", "val", "test", "test_unseen")
DIRECT = "train_direct"  # like train, but questions name an object by its looks alone

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
SIZES = ("small", "large")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (210, 28, 38),
    "orange": (242, 122, 12),
    "yellow": (250, 220, 40),
    "green": (34, 148, 58),
    "cyan": (28, 196, 214),
    "blue": (32, 68, 218),
    "purple": (140, 40, 172),
    "pink": (250, 92, 182),
}
BACKGROUND_COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (241, 241, 239),
    "light grey": (198, 200, 203),
    "dark grey": (92, 94, 99),
    "beige": (222, 207, 178),
    "light blue": (178, 199, 219),
    "light green": (186, 209, 182),
    "lavender": (203, 190, 218),
    "rose": (223, 192, 192),
}
BACKGROUND_KINDS = ("plain", "gradient", "stripes", "checker", "noise")
# Held out of train, val and test: every colour once and every shape once.
HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    {
        ("red", "triangle"),
        ("orange", "ring"),
        ("yellow", "heart"),
        ("green", "star"),
        ("cyan", "square"),
        ("blue", "circle"),
        ("purple", "cross"),
        ("pink", "diamond"),
    }
)
ALL_PAIRS: tuple[tuple[str, str], ...] = tuple((c, s) for c in COLOURS for s in SHAPES)
SEEN_PAIRS: tuple[tuple[str, str], ...] = tuple(p for p in ALL_PAIRS if p not in HELD_OUT)
UNSEEN_PAIRS: tuple[tuple[str, str], ...] = tuple(p for p in ALL_PAIRS if p in HELD_OUT)

SMALL_RADIUS = (0.09, 0.11)
LARGE_RADIUS = (0.16, 0.20)
# name -> (x, y) of the nine named places, row by row
PLACES: dict[str, tuple[float, float]] = {
    "top left": (0.22, 0.22),
    "top": (0.5, 0.22),
    "top right": (0.78, 0.22),
    "left": (0.22, 0.5),
    "centre": (0.5, 0.5),
    "right": (0.78, 0.5),
    "bottom left": (0.22, 0.78),
    "bottom": (0.5, 0.78),
    "bottom right": (0.78, 0.78),
}
MAX_TILT = 0.2  # radians; shapes stay recognisable and a square never becomes a diamond
# Shapes that can hold a small object, and from which radius on; the hole of a ring stays visible.
_HOSTS = {"circle": 0.15, "square": 0.15, "heart": 0.15, "ring": 0.185}
_COUNT_WEIGHTS = np.cumsum([0.08, 0.22, 0.27, 0.22, 0.13, 0.08])


class DataError(ValueError):
    """A request to the data floor that cannot be met; says expected, got and what to do."""


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One flat coloured shape: centre (x, y), radius, tilt in radians, depth (larger = nearer)."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    radius: float
    depth: int
    tilt: float = 0.0

    @property
    def pair(self) -> tuple[str, str]:
        """(colour, shape)."""
        return self.colour, self.shape


@dataclass(frozen=True, kw_only=True)
class Background:
    """Backdrop: `kind` of `BACKGROUND_KINDS`, its colour names, texture frequency and seed.

    `second` is the other end of a gradient and equals `first` for the other kinds, whose texture
    is a faint change of brightness. `angle` is 0 (left to right) or 1 (top to bottom) for
    gradients and stripes.
    """

    kind: str
    first: str
    second: str
    angle: int = 0
    cells: int = 8
    contrast: float = 8.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture before rendering. Instance number in the map = position in `objects` + 1."""

    objects: tuple[SceneObject, ...]
    background: Background


def stream(*parts: str | int) -> np.random.Generator:
    """Random stream that belongs to `parts`: PCG64 seeded by BLAKE2b, the same on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def check_split(split: str) -> None:
    """Raise DataError unless `split` is one of `SPLITS` or `DIRECT`."""
    if split not in (*SPLITS, DIRECT):
        raise DataError(f"expected a split of {', '.join(SPLITS)}, got {split!r}; choose one")


def allowed_pairs(split: str) -> tuple[tuple[str, str], ...]:
    """Colour-shape pairs that pictures and texts of a split may hold."""
    return ALL_PAIRS if split == "test_unseen" else SEEN_PAIRS


def choose(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One option, uniformly."""
    return options[int(rng.integers(len(options)))]


def random_background(rng: np.random.Generator) -> Background:
    """A muted backdrop with at most faint texture."""
    kind = choose(rng, BACKGROUND_KINDS)
    names = list(BACKGROUND_COLOURS)
    first = choose(rng, names)
    second = first
    if kind == "gradient":
        second = choose(rng, [n for n in names if n != first])
    return Background(
        kind=kind,
        first=first,
        second=second,
        angle=int(rng.integers(2)),
        cells=int(rng.integers(5, 11)),
        contrast=float(rng.uniform(6.0, 10.0)),
        seed=int(rng.integers(2**31)),
    )


def random_pairs(
    rng: np.random.Generator, split: str, num: int, all_unseen: bool
) -> list[tuple[str, str]]:
    """Colours and shapes of `num` objects: distractors often share one with an earlier object.

    In `test_unseen` the first is always held out; the others all are (`all_unseen`) or half are.
    """
    pairs: list[tuple[str, str]] = []
    for i in range(num):
        pool = allowed_pairs(split)
        if split == "test_unseen" and (i == 0 or all_unseen or rng.random() < 0.5):
            pool = UNSEEN_PAIRS
        roll = rng.random()
        if pairs and roll < 0.12:
            same = choose(rng, pairs)
            pool = (same,) if same in pool else pool
        elif pairs and roll < 0.55:
            colour, shape = choose(rng, pairs)
            near = [p for p in pool if (p[0] == colour) != (p[1] == shape)]
            pool = tuple(near) or pool
        pairs.append(choose(rng, pool))
    return pairs


def _free(placed: list[SceneObject], item: SceneObject, crowded: bool) -> bool:
    """Whether an object keeps its distance from all others; a little overlap is free if crowded."""
    for other in placed:
        overlap = crowded and other.colour != item.colour
        reach = (0.86 if overlap else 1.18) * (other.radius + item.radius)
        if (other.x - item.x) ** 2 + (other.y - item.y) ** 2 < reach * reach:
            return False
    return True


def _hosted(
    rng: np.random.Generator, placed: list[SceneObject], item: SceneObject
) -> SceneObject | None:
    """The small object in the middle of a large one that has room and stands apart."""
    for host in placed:
        if host.radius < _HOSTS.get(host.shape, 1.0) or host.colour == item.colour:
            continue
        if any(
            o is not host and np.hypot(o.x - host.x, o.y - host.y) < o.radius + 0.13 for o in placed
        ):
            continue
        dx, dy = rng.uniform(-0.01, 0.01, 2)
        lift = 0.12 * host.radius if host.shape == "heart" else 0.0
        x, y = host.x + float(dx), host.y + float(dy) - lift
        return replace(item, x=x, y=y, radius=SMALL_RADIUS[0])
    return None


def _placed(
    rng: np.random.Generator,
    placed: list[SceneObject],
    item: SceneObject,
    crowded: bool,
    anchored: bool,
) -> SceneObject | None:
    """The object at a free spot, or None if none of the spots tried is free."""
    low, high = 1.1 * item.radius, 1.0 - 1.1 * item.radius
    spots = rng.uniform(low, high, (24, 2))
    if anchored:
        places = rng.permutation(np.array(list(PLACES.values())))
        spots = np.clip(places + rng.uniform(-0.04, 0.04, places.shape), low, high)
    for x, y in spots:
        there = replace(item, x=float(x), y=float(y))
        if _free(placed, there, crowded):
            return there
    return None


def _arrange(
    rng: np.random.Generator,
    pairs: Sequence[tuple[str, str]],
    hosting: float,
    anchored: bool,
) -> tuple[SceneObject, ...] | None:
    """Objects of the given pairs with random sizes and places; None if they did not fit."""
    num = len(pairs)
    crowded = bool(rng.random() < 0.35)
    large = rng.random(num) < (0.5 if num < 5 else 0.35)
    found: dict[int, SceneObject] = {}
    for i in np.argsort(~large, kind="stable"):  # large ones first, so they lie behind
        item = SceneObject(
            colour=pairs[i][0],
            shape=pairs[i][1],
            size=SIZES[int(large[i])],
            x=0.5,
            y=0.5,
            radius=float(rng.uniform(*(LARGE_RADIUS if large[i] else SMALL_RADIUS))),
            depth=len(found),
            tilt=float(rng.uniform(-MAX_TILT, MAX_TILT)),
        )
        others = list(found.values())
        there = None
        if not large[i] and rng.random() < hosting:
            there = _hosted(rng, others, item)
        there = there or _placed(rng, others, item, crowded, anchored)
        if there is None:
            return None
        found[int(i)] = there
    return tuple(found[i] for i in range(num))


def random_scene(
    rng: np.random.Generator,
    split: str,
    *,
    num: int | None = None,
    max_num: int = 6,
    all_unseen: bool = False,
    pairs: Sequence[tuple[str, str]] | None = None,
    hosting: float = 0.3,
    anchored: bool = False,
) -> Scene:
    """A scene of `num` objects (drawn at random up to `max_num` when None) that all fit.

    Objects overlap only when their colours differ, and each stays at least about 65 % visible.
    The first object of a `test_unseen` scene is of a held-out pair.

    all_unseen: every object of a `test_unseen` scene is. pairs: the objects' colours and shapes,
    instead of random ones. hosting: how often a small object goes inside a large one if it can.
    anchored: objects stand at the nine named `PLACES`, give or take 0.04.
    """
    check_split(split)
    if pairs is not None:
        num = len(pairs)
    if num is None:
        weights = _COUNT_WEIGHTS[:max_num]
        num = 1 + int(np.searchsorted(weights, rng.random() * weights[-1]))
    background = random_background(rng)
    pairs = pairs or random_pairs(rng, split, num, all_unseen)
    while True:
        objects = _arrange(rng, pairs, hosting, anchored)
        if objects is not None:
            return Scene(objects=objects, background=background)
