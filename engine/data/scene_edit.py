"""Editing samples: an instruction and the scene after it, rendered exactly."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from engine.data.records import REGION_KINDS, RegionKind
from engine.data.scene_expression import askable, pick, refer
from engine.data.scene_model import (
    BACKGROUND_COLOURS,
    PLACES,
    Background,
    Scene,
    SceneObject,
    allowed_pairs,
    choose,
    random_scene,
)
from engine.data.scene_query import inside
from engine.data.scene_text import article, say

EDITS: dict[str, float] = {
    "remove": 0.2,
    "replace": 0.22,
    "recolour": 0.22,
    "move": 0.2,
    "background": 0.16,
}
MIN_CHANGE = 35.0  # mean absolute difference of 8-bit colours; an edit may be wrong by 30

TEMPLATES: dict[str, tuple[str, ...]] = {
    "remove": (
        "remove {x}",
        "delete {x}",
        "erase {x} from the picture",
        "take {x} away",
        "get rid of {x}",
        "make {x} disappear",
        "please remove {x}",
    ),
    "recolour": (
        "make {x} {c}",
        "paint {x} {c}",
        "change the colour of {x} to {c}",
        "turn {x} {c}",
        "recolour {x} in {c}",
        "give {x} the colour {c}",
        "{x} should be {c}",
    ),
    "replace": (
        "replace {x} with {n}",
        "swap {x} for {n}",
        "put {n} in the place of {x}",
        "turn {x} into {n}",
        "exchange {x} for {n}",
        "draw {n} instead of {x}",
    ),
    "move": (
        "move {x} to {p}",
        "shift {x} to {p}",
        "put {x} at {p}",
        "bring {x} to {p}",
        "drag {x} to {p}",
        "place {x} at {p} instead",
    ),
    "background": (
        "make the background plain {c}",
        "change the background to plain {c}",
        "replace the background with a plain {c} one",
        "paint the whole background {c}",
        "put everything on a plain {c} background",
        "set the backdrop to plain {c}",
    ),
}
PLACE_NAMES: dict[str, tuple[str, ...]] = {
    "top left": ("the top left corner", "the upper left corner"),
    "top": ("the middle of the top side", "the top centre"),
    "top right": ("the top right corner", "the upper right corner"),
    "left": ("the middle of the left side", "the left centre"),
    "centre": ("the centre of the picture", "the middle of the picture"),
    "right": ("the middle of the right side", "the right centre"),
    "bottom left": ("the bottom left corner", "the lower left corner"),
    "bottom": ("the middle of the bottom side", "the bottom centre"),
    "bottom right": ("the bottom right corner", "the lower right corner"),
}


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Scene before and after. target: the object that changes, None for the background.

    region: how the user points at the target, when the text holds "<region>". told: the words of
    the text for what comes in its place (colour, noun or place), empty when nothing does.
    """

    kind: str
    before: Scene
    after: Scene
    target: int | None
    text: str
    region: RegionKind | None = None
    told: str = ""


def _with(scene: Scene, target: int, item: SceneObject | None) -> Scene:
    """The scene with one object exchanged or (None) taken out."""
    kept = (*scene.objects[:target], *([] if item is None else [item]))
    return replace(scene, objects=kept + scene.objects[target + 1 :])


def _near(scene: Scene, target: int, item: SceneObject, factor: float) -> list[SceneObject]:
    """Other objects that come closer to `item` than `factor` times both radii."""
    return [
        o
        for k, o in enumerate(scene.objects)
        if k != target and np.hypot(o.x - item.x, o.y - item.y) < factor * (o.radius + item.radius)
    ]


def _change(
    rng: np.random.Generator, scene: Scene, target: int, kind: str, split: str
) -> tuple[SceneObject, dict[str, str]] | None:
    """The object after a recolour or replace and the words for it; never melts into a neighbour."""
    item = scene.objects[target]
    taken = {o.colour for o in _near(scene, target, item, 1.1)}
    pool = [p for p in allowed_pairs(split) if p[0] not in taken]
    if kind == "recolour":
        options = [p for p in pool if p[1] == item.shape and p[0] != item.colour]
    elif rng.random() < 0.35 and item.colour not in taken:
        options = [p for p in pool if p[0] == item.colour and p[1] != item.shape]
    else:
        options = [p for p in pool if p[1] != item.shape and p[0] != item.colour]
    if not options:
        return None
    colour, shape = choose(rng, options)
    new = article(f"{colour} {shape}")
    if colour == item.colour:
        new = f"{article(shape)} of the same colour"
    return replace(item, colour=colour, shape=shape), {"c": colour, "n": new}


def _moved(
    rng: np.random.Generator, scene: Scene, target: int
) -> tuple[SceneObject, dict[str, str]] | None:
    """The object at another, free, named place. Hosts of inner objects stay where they are."""
    item = scene.objects[target]
    if any(k != target and inside(scene, k, target) for k in range(len(scene.objects))):
        return None
    for number in rng.permutation(len(PLACES)):
        place = list(PLACES)[int(number)]
        x, y = PLACES[place]
        goal = replace(item, x=x, y=y)
        far = np.hypot(item.x - x, item.y - y) > 0.25
        if far and not _near(scene, target, goal, 1.1):
            return goal, {"p": choose(rng, PLACE_NAMES[place])}
    return None


def _point(
    rng: np.random.Generator, scene: Scene, target: int
) -> tuple[str, RegionKind | None] | None:
    """Words for the object: an expression, "<region>", or both."""
    roll = rng.random()
    region = choose(rng, REGION_KINDS) if roll < 0.45 else None
    if roll < 0.32:
        return "<region>", region
    relations = {"attribute": 0.7, "left_of": 0.06, "right_of": 0.06, "above": 0.06, "below": 0.06}
    query = refer(rng, scene, target, pick(rng, relations))
    if query is None:
        return None
    words = say(rng, query)
    words = "the " + words.removeprefix("the ").removeprefix("that ")
    for tail in (" in the picture", " in this image"):
        words = words.removesuffix(tail)
    return (f"{words} at <region>" if region else words), region


def _differs(one: str, other: str) -> bool:
    """Whether two backdrop colours are further apart than an edit may miss its target."""
    a, b = (np.array(BACKGROUND_COLOURS[name]) for name in (one, other))
    return float(np.abs(a - b).mean()) > MIN_CHANGE


def _background(rng: np.random.Generator, scene: Scene) -> Edit:
    old = scene.background
    far = [c for c in BACKGROUND_COLOURS if _differs(c, old.first) and _differs(c, old.second)]
    colour = choose(rng, far)
    after = replace(scene, background=Background(kind="plain", first=colour, second=colour))
    text = choose(rng, TEMPLATES["background"]).format(c=colour)
    return Edit(kind="background", before=scene, after=after, target=None, text=text, told=colour)


def editing(rng: np.random.Generator, split: str) -> Edit:
    """An edit of a fresh scene.

    The object that changes is of a held-out pair in `test_unseen`; when the background changes,
    every object there is.
    """
    kind = pick(rng, EDITS)
    while True:
        scene = random_scene(rng, split, max_num=5, all_unseen=kind == "background")
        if kind == "background":
            return _background(rng, scene)
        for target in askable(rng, scene, split):
            item: SceneObject | None = None
            words: dict[str, str] = {}
            told = ""
            if kind != "remove":
                change = (
                    _moved(rng, scene, target)
                    if kind == "move"
                    else _change(rng, scene, target, kind, split)
                )
                if change is None:
                    continue
                item, words = change
                told = words["p" if kind == "move" else "c" if kind == "recolour" else "n"]
            pointed = _point(rng, scene, target)
            if pointed is None:
                continue
            text = choose(rng, TEMPLATES[kind]).format(x=pointed[0], **words)
            after = _with(scene, target, item)
            return Edit(
                kind=kind,
                before=scene,
                after=after,
                target=target,
                text=text,
                region=pointed[1],
                told=told,
            )
