"""Expressions that mean exactly one object: referring (by relation) and reasoning (indirect)."""

from __future__ import annotations

from collections import Counter

import numpy as np

from engine.data.scene_model import (
    HELD_OUT,
    PLACES,
    UNSEEN_PAIRS,
    Scene,
    SceneObject,
    allowed_pairs,
    choose,
    random_scene,
)
from engine.data.scene_query import (
    EXTREMES,
    Description,
    Query,
    at_place,
    describe,
    fitting,
    means,
)
from engine.data.scene_text import COLOUR_HINTS, SHAPE_HINTS, noun, say

REFERRING: dict[str, float] = {  # kind -> share
    "attribute": 0.22,
    "left_of": 0.09,
    "right_of": 0.09,
    "above": 0.09,
    "below": 0.09,
    "inside": 0.05,
    "between": 0.07,
    **dict.fromkeys(EXTREMES, 0.04),
    "place": 0.06,
}
REASONING: dict[str, float] = {
    "shape_hint": 0.18,
    "colour_hint": 0.16,
    "double_hint": 0.12,
    "negation": 0.1,
    "odd_one_out": 0.08,
    "nearest": 0.07,
    "farthest": 0.07,
    "same_colour": 0.07,
    "same_shape": 0.07,
    "first_met": 0.08,
}
# What a description mentions: colour, shape, size; the most natural first.
_OPTIONS = tuple(frozenset(o) for o in ("cs", "s", "c", "csz", "sz", "cz", "z", ""))
_HINTED = ("the {t} {h}", "the one {t} {h}", "the only {t} {h}", "something {h}", "the item {h}")
_NOT_COLOUR = (
    "the only {t} that is not {x}",
    "the {t} which is anything but {x}",
    "the one {t} that isn't {x}",
    "the {t} that remains when everything {x} is taken away",
    "the {t} in another colour than {x}",
)
_NOT_SHAPE = (
    "the only {t} that is not a {x}",
    "the {t} which is anything but a {x}",
    "the one {t} that isn't a {x}",
    "the {t} that remains when every {x} is taken away",
    "the {t} with another form than a {x}",
)
_ODD = (
    "the odd one out",
    "the {t} that does not belong with the others",
    "the {t} that differs from all the rest",
    "the exception among these {t}s",
    "the {t} that breaks the pattern",
)
_FIRST_MET: dict[str, tuple[str, ...]] = {
    "leftmost": (
        "the {t} you would meet first coming in from the left edge",
        "what an ant walking in from the left side of the picture reaches first",
        "the {t} with nothing to its left",
        "the {t} that leads if everything marches to the left",
        "the {t} a shutter closing from the left would cover first",
    ),
    "rightmost": (
        "the {t} you would meet first coming in from the right edge",
        "what an ant walking in from the right side of the picture reaches first",
        "the {t} with nothing to its right",
        "the {t} that leads if everything marches to the right",
        "the {t} a shutter closing from the right would cover first",
    ),
    "topmost": (
        "the {t} that rain would reach first",
        "the {t} with nothing above it",
        "the {t} that has the longest way to fall",
        "the {t} a lowered blind would cover first",
        "the {t} that is closest to the ceiling",
    ),
    "bottommost": (
        "the {t} that rising water would reach first",
        "the {t} with nothing below it",
        "the {t} that has the shortest way to fall",
        "the {t} a rising curtain would show first",
        "the {t} that is closest to the floor",
    ),
}


def pick(rng: np.random.Generator, weights: dict[str, float]) -> str:
    """A key, with probability proportional to its value."""
    keys = list(weights)
    ends = np.cumsum(list(weights.values()))
    return keys[min(int(np.searchsorted(ends, rng.random() * ends[-1])), len(keys) - 1)]


def askable(rng: np.random.Generator, scene: Scene, split: str) -> list[int]:
    """Objects that a sample of a split may ask about, shuffled: all, or the held-out pairs."""
    order = [int(i) for i in rng.permutation(len(scene.objects))]
    if split == "test_unseen":
        order = [i for i in order if scene.objects[i].pair in HELD_OUT]
    return order


def _by(item: SceneObject, option: frozenset[str]) -> Description:
    return describe(
        item.colour if "c" in option else None,
        item.shape if "s" in option else None,
        item.size if "z" in option else None,
    )


def unique_description(
    rng: np.random.Generator, scene: Scene, i: int, use: str = "csz"
) -> Description | None:
    """A description that only object i fits; rarely with more words than it needs.

    use: what it may mention: colour "c", shape "s", size "z".
    """
    item = scene.objects[i]
    shared = [
        {
            letter
            for letter, same in (
                ("c", o.colour == item.colour),
                ("s", o.shape == item.shape),
                ("z", o.size == item.size),
            )
            if same
        }
        for k, o in enumerate(scene.objects)
        if k != i
    ]
    unique = [o for o in _OPTIONS if o.issubset(use) and not any(o <= s for s in shared)]
    if not unique:
        return None
    if rng.random() < 0.5:
        return _by(item, unique[0])
    short = [o for o in unique if "z" not in o]
    return _by(item, choose(rng, short if short and rng.random() < 0.8 else unique))


def refer(
    rng: np.random.Generator, scene: Scene, target: int, relation: str, use: str = "csz"
) -> Query | None:
    """A query of this relation that means `target` alone, or None if none was found.

    use: what the head may mention, as in `unique_description`.
    """
    if relation == "attribute":
        head = unique_description(rng, scene, target, use)
        return None if head is None else Query(head=head)
    item = scene.objects[target]
    others = [int(k) for k in rng.permutation(len(scene.objects)) if k != target]
    place = next((p for p in PLACES if at_place(item, p)), "") if relation == "place" else ""
    num_anchors = {"between": 2, "place": 0, **dict.fromkeys(EXTREMES, 0)}.get(relation, 1)
    if len(others) < max(1, num_anchors) or (relation == "place" and not place):
        return None
    heads = [o for o in _OPTIONS if o.issubset(use)]
    needed = rng.random() < 0.8  # mostly the relation tells the target from something like it
    for _ in range(6):
        head = _by(item, choose(rng, heads))
        picked = [others[int(k)] for k in rng.permutation(len(others))[:num_anchors]]
        rivals = [k for k in fitting(scene, head) if k != target and k not in picked]
        if (needed or relation in EXTREMES) and not rivals:
            continue
        anchors = [unique_description(rng, scene, k) for k in picked]
        found = tuple(d for d in anchors if d is not None)
        if len(found) < num_anchors:
            continue
        query = Query(head=head, relation=relation, anchors=found, place=place)
        if means(scene, query, target):
            return query
    return None


def _scene_for(rng: np.random.Generator, split: str, relation: str) -> Scene:
    if relation == "inside":
        return random_scene(rng, split, num=int(rng.integers(2, 6)), hosting=1.0)
    if relation == "attribute":
        return random_scene(rng, split)
    return random_scene(rng, split, num=int(rng.integers(3 if relation == "between" else 2, 7)))


def referring(rng: np.random.Generator, split: str) -> tuple[str, Scene, int, str]:
    """A scene, one object of it and an expression for it: (kind, scene, target, text)."""
    kind = pick(rng, REFERRING)
    while True:
        scene = _scene_for(rng, split, kind)
        for target in askable(rng, scene, split):
            query = refer(rng, scene, target, kind)
            if query is not None:
                return kind, scene, target, say(rng, query)


def _hint(
    rng: np.random.Generator, scene: Scene, target: int, kind: str
) -> tuple[Description, str] | None:
    """A description by fits of hints, and its words after "the thing"."""
    item = scene.objects[target]
    shapes = [h for h in SHAPE_HINTS if item.shape in h[0]]
    colours = [h for h in COLOUR_HINTS if item.colour in h[0]]
    shape, colour = choose(rng, shapes), choose(rng, colours)
    if kind == "shape_hint":
        found, words = Description(shapes=frozenset(shape[0])), shape[1]
    elif kind == "colour_hint":
        found, words = Description(colours=frozenset(colour[0])), colour[1]
    else:
        found = Description(colours=frozenset(colour[0]), shapes=frozenset(shape[0]))
        both = shape[1].startswith("that ") and colour[1].startswith("that ")
        words = f"{shape[1]}{' and' if both else ','} {colour[1]}"
    return (found, words) if fitting(scene, found) == [target] else None


def _negation(rng: np.random.Generator, scene: Scene, target: int) -> str | None:
    others = [o for k, o in enumerate(scene.objects) if k != target]
    item = scene.objects[target]
    thing = noun(rng, Description())
    if not others:
        return None
    found = []
    if {o.colour for o in others} == {others[0].colour} != {item.colour}:
        found.append(choose(rng, _NOT_COLOUR).format(t=thing, x=others[0].colour))
    if {o.shape for o in others} == {others[0].shape} != {item.shape}:
        found.append(choose(rng, _NOT_SHAPE).format(t=thing, x=others[0].shape))
    return choose(rng, found) if found else None


def _odd_pairs(rng: np.random.Generator, split: str, num: int) -> list[tuple[str, str]] | None:
    """Pairs of which the first differs in colour (or shape) from all others, which agree in it."""
    pool = allowed_pairs(split)
    odd = choose(rng, UNSEEN_PAIRS if split == "test_unseen" else pool)
    side = int(rng.integers(2))
    value = choose(rng, sorted({p[side] for p in pool if p[side] != odd[side]}))
    rest = [p for p in pool if p[side] == value]
    pairs = [odd] + [choose(rng, rest) for _ in range(num - 1)]
    return pairs if odd_ones(pairs) == {0} else None


def odd_ones(pairs: list[tuple[str, str]]) -> set[int]:
    """Every position that is alone with its colour, or its shape, while all others agree."""
    found: set[int] = set()
    for side in (0, 1):
        counts = Counter(p[side] for p in pairs)
        if len(pairs) > 2 and len(counts) == 2 and 1 in counts.values():
            found |= {i for i, p in enumerate(pairs) if counts[p[side]] == 1}
    return found


def _reason(rng: np.random.Generator, scene: Scene, target: int, kind: str) -> str | None:
    thing = noun(rng, Description())
    if kind.endswith("_hint"):
        hint = _hint(rng, scene, target, kind)
        return None if hint is None else choose(rng, _HINTED).format(t=thing, h=hint[1])
    if kind == "negation":
        return _negation(rng, scene, target)
    if kind == "odd_one_out":
        if odd_ones([o.pair for o in scene.objects]) != {target}:
            return None
        return choose(rng, _ODD).format(t=thing)
    if kind == "first_met":
        relation = choose(rng, list(_FIRST_MET))
        query = Query(head=describe(), relation=relation)
        if len(scene.objects) < 2 or not means(scene, query, target):
            return None
        return choose(rng, _FIRST_MET[relation]).format(t=thing)
    found = refer(rng, scene, target, kind, use="")
    text = "" if found is None else say(rng, found)
    names_it = " ".join(scene.objects[target].pair) in text  # its twin is the anchor
    return None if names_it or not text else text


def reasoning(rng: np.random.Generator, split: str) -> tuple[str, Scene, int, str]:
    """A scene, one object of it and an indirect expression: (kind, scene, target, text)."""
    kind = pick(rng, REASONING)
    while True:
        pairs = None
        num = None if kind.endswith("_hint") else int(rng.integers(2, 6))
        if kind == "odd_one_out" or (kind == "negation" and rng.random() < 0.7):
            pairs = _odd_pairs(rng, split, int(rng.integers(3, 6)))
            if pairs is None:
                continue
        scene = random_scene(rng, split, num=num, pairs=pairs)
        for target in askable(rng, scene, split):
            text = _reason(rng, scene, target, kind)
            if text is not None:
                return kind, scene, target, text
