"""Which objects of a scene an expression means: descriptions and relations with margins.

Every relation has a strict and a loose reading. An expression is unambiguous when its target holds
in the strict reading and nothing else holds even in the loose one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from engine.data.scene_model import PLACES, Scene, SceneObject

STRICT_GAP, LOOSE_GAP = 0.12, -0.03  # of the picture's side, between centres
EXTREME_GAP = 0.07  # by how much an extreme object leads
RELATIONS = ("left_of", "right_of", "above", "below", "inside", "between")
EXTREMES = ("leftmost", "rightmost", "topmost", "bottommost", "largest", "smallest")
COMPARISONS = ("nearest", "farthest", "same_colour", "same_shape")


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a noun phrase demands of an object; None demands nothing. `negated` turns it round."""

    colours: frozenset[str] | None = None
    shapes: frozenset[str] | None = None
    size: str | None = None
    negated: bool = False

    def fits(self, item: SceneObject) -> bool:
        """Whether the object meets every demand (or, negated, not all of them)."""
        fits = (
            (self.colours is None or item.colour in self.colours)
            and (self.shapes is None or item.shape in self.shapes)
            and (self.size is None or item.size == self.size)
        )
        return fits != self.negated


@cache
def describe(
    colour: str | None = None, shape: str | None = None, size: str | None = None
) -> Description:
    """Description by at most one colour, one shape and one size."""
    return Description(
        colours=None if colour is None else frozenset({colour}),
        shapes=None if shape is None else frozenset({shape}),
        size=size,
    )


@dataclass(frozen=True, kw_only=True)
class Query:
    """An expression in logical form: head description, relation and its anchor descriptions.

    relation: "attribute", "place" (with `place`), or one of RELATIONS, EXTREMES, COMPARISONS.
    """

    head: Description
    relation: str = "attribute"
    anchors: tuple[Description, ...] = ()
    place: str = ""


def fitting(scene: Scene, description: Description) -> list[int]:
    """Positions in `scene.objects` that fit a description."""
    return [i for i, o in enumerate(scene.objects) if description.fits(o)]


def inside(scene: Scene, i: int, j: int) -> bool:
    """Whether small object i lies within large object j and in front of it."""
    a, b = scene.objects[i], scene.objects[j]
    near = math.hypot(a.x - b.x, a.y - b.y) < 0.25 * b.radius
    return a.size == "small" and b.size == "large" and a.depth > b.depth and near


def directed(a: SceneObject, b: SceneObject, relation: str, *, loose: bool = False) -> bool:
    """Whether a is left_of, right_of, above or below b.

    Strictly: more than STRICT_GAP, and farther along the named direction than across it.
    """
    along, across = a.x - b.x, a.y - b.y
    if relation in ("above", "below"):
        along, across = across, along
    if relation in ("left_of", "above"):
        along = -along
    if loose:
        return along > LOOSE_GAP
    return along > STRICT_GAP and abs(across) < along


def between(a: SceneObject, b: SceneObject, c: SceneObject, *, loose: bool = False) -> bool:
    """Whether a lies between b and c: near the middle of the line from b to c."""
    ux, uy = c.x - b.x, c.y - b.y
    length = math.hypot(ux, uy)
    if length < 0.3:
        return False
    along = ((a.x - b.x) * ux + (a.y - b.y) * uy) / length**2
    across = abs((a.x - b.x) * uy - (a.y - b.y) * ux) / length
    if loose:
        return -0.05 < along < 1.05 and across < 0.3
    return 0.2 < along < 0.8 and across < 0.13


def at_place(item: SceneObject, place: str, *, loose: bool = False) -> bool:
    """Whether an object is at one of the nine named places."""
    x, y = PLACES[place]
    reach = 0.26 if loose else 0.1
    return abs(item.x - x) < reach and abs(item.y - y) < reach


def _score(scene: Scene, i: int, relation: str, anchor: int | None) -> float:
    """What the extreme or nearest object has least of."""
    item = scene.objects[i]
    if relation in ("nearest", "farthest"):
        assert anchor is not None
        other = scene.objects[anchor]
        distance = math.hypot(item.x - other.x, item.y - other.y)
        return distance if relation == "nearest" else -distance
    return {
        "leftmost": item.x,
        "rightmost": -item.x,
        "topmost": item.y,
        "bottommost": -item.y,
        "largest": -2.0 * item.radius,
        "smallest": 2.0 * item.radius,
    }[relation]


def _holds(scene: Scene, i: int, query: Query, anchors: list[int], loose: bool) -> bool:
    item = scene.objects[i]
    relation = query.relation
    if relation == "attribute":
        return True
    if relation == "place":
        return at_place(item, query.place, loose=loose)
    first = scene.objects[anchors[0]]
    if relation == "inside":
        return inside(scene, i, anchors[0])
    if relation == "between":
        return between(item, first, scene.objects[anchors[1]], loose=loose)
    if relation == "same_colour":
        return item.colour == first.colour
    if relation == "same_shape":
        return item.shape == first.shape
    return directed(item, first, relation, loose=loose)


def resolve(scene: Scene, query: Query, *, loose: bool = False) -> list[int]:
    """Objects that a query means; empty when an anchor is not exactly one object.

    Extremes and nearest/farthest return the leader and, when `loose`, everything within the
    margin of it; strictly, nothing at all when the lead is smaller than the margin.
    """
    anchors: list[int] = []
    for description in query.anchors:
        found = fitting(scene, description)
        if len(found) != 1 or found[0] in anchors:
            return []
        anchors += found
    candidates = [i for i in fitting(scene, query.head) if i not in anchors]
    if query.relation in EXTREMES or query.relation in ("nearest", "farthest"):
        if not candidates:
            return []
        anchor = anchors[0] if anchors else None
        scores = {i: _score(scene, i, query.relation, anchor) for i in candidates}
        best = min(scores.values())
        close = [i for i in candidates if scores[i] < best + EXTREME_GAP]
        return close if loose or len(close) == 1 else []
    return [i for i in candidates if _holds(scene, i, query, anchors, loose)]


def means(scene: Scene, query: Query, target: int) -> bool:
    """Whether a query means `target` and, with margins, nothing else."""
    return resolve(scene, query) == [target] and resolve(scene, query, loose=True) == [target]


def place_of(item: SceneObject) -> str:
    """Name of the place nearest to an object's centre (thirds of the picture)."""
    row = ("top", "", "bottom")[min(2, int(3 * item.y))]
    column = ("left", "", "right")[min(2, int(3 * item.x))]
    return f"{row} {column}".strip() or "centre"
