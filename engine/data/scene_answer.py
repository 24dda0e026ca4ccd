"""Questions about a scene and their short answers; and descriptions of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from engine.data.scene_expression import askable, pick, refer, unique_description
from engine.data.scene_model import (
    COLOURS,
    DIRECT,
    SHAPES,
    UNSEEN_PAIRS,
    Scene,
    allowed_pairs,
    choose,
    random_scene,
)
from engine.data.scene_query import describe, directed, fitting, place_of
from engine.data.scene_text import article, caption, name, noun, say

VQA: dict[str, float] = {
    "colour": 0.16,
    "shape": 0.14,
    "size": 0.06,
    "count": 0.15,
    "exists": 0.15,
    "which": 0.09,
    "between": 0.03,
    "relation": 0.08,
    "place": 0.06,
    "background_colour": 0.04,
    "background_pattern": 0.02,
    "describe": 0.05,
}
# The first questions of a trunk that has yet to learn to look anything up.
DIRECT_VQA = {"colour": 0.3, "shape": 0.3, "size": 0.1, "count": 0.1, "exists": 0.2}
# The further questions of a training dialogue: more of what takes long to learn.
FURTHER_VQA: dict[str, float] = {
    "colour": 0.1,
    "shape": 0.08,
    "size": 0.05,
    "count": 0.17,
    "exists": 0.1,
    "which": 0.17,
    "between": 0.05,
    "relation": 0.09,
    "place": 0.11,
    "background_colour": 0.05,
    "background_pattern": 0.03,
}
# Kinds whose answer is free text and cannot be scored by exact match.
FREE_KINDS = frozenset({"describe"})
QUESTIONS: dict[str, tuple[str, ...]] = {
    "colour": (
        "what colour is {x}?",
        "which colour does {x} have?",
        "what is the colour of {x}?",
        "tell me the colour of {x}.",
        "{x}: what colour is it?",
    ),
    "shape": (
        "what shape is {x}?",
        "which shape does {x} have?",
        "what is the shape of {x}?",
        "tell me the shape of {x}.",
        "{x}: what shape is it?",
    ),
    "size": (
        "is {x} small or large?",
        "what size is {x}, small or large?",
        "how big is {x}, small or large?",
        "small or large: what is {x}?",
        "does {x} count as small or large?",
    ),
    "count": (
        "how many {x} are there?",
        "how many {x} do you see?",
        "what is the number of {x} in the picture?",
        "count the {x}.",
        "how many {x} does the picture show?",
    ),
    "exists": (
        "is there {x}?",
        "is there {x} in the picture?",
        "do you see {x}?",
        "does the picture show {x}?",
        "can you find {x} here?",
    ),
    "which": (
        "what is {x}?",
        "name {x}.",
        "which object is {x}?",
        "can you name {x}?",
        "what do you call {x}?",
    ),
    "relation": (
        "is {x} {r} {y}?",
        "does {x} lie {r} {y}?",
        "would you say that {x} is {r} {y}?",
        "true or not: {x} is {r} {y}?",
        "is it right that {x} is {r} {y}?",
    ),
    "place": (
        "where is {x}?",
        "where in the picture is {x}?",
        "in which part of the picture is {x}?",
        "where do you see {x}?",
        "at which place is {x}?",
    ),
    "background_colour": (
        "what colour is the background?",
        "which colour does the background have?",
        "what is the colour of the backdrop?",
        "what colour lies behind the objects?",
        "tell me the background colour.",
    ),
    "background_pattern": (
        "what pattern does the background have?",
        "what is the background like?",
        "which kind of background is it?",
        "is the background plain or does it have a pattern?",
        "name the pattern of the backdrop.",
    ),
    "describe": (
        "describe the picture.",
        "what do you see?",
        "write a caption for this picture.",
        "tell me what the picture shows.",
        "give a full description of the image.",
    ),
}
_RELATION_WORDS = {
    "left_of": ("left of", "to the left of"),
    "right_of": ("right of", "to the right of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "lower than"),
}
_OPPOSITE = {"left_of": "right_of", "right_of": "left_of", "above": "below", "below": "above"}
_LOCATING = {
    "attribute": 0.45,
    "left_of": 0.08,
    "right_of": 0.08,
    "above": 0.08,
    "below": 0.08,
    "leftmost": 0.04,
    "rightmost": 0.04,
    "topmost": 0.04,
    "bottommost": 0.04,
    "largest": 0.04,
    "smallest": 0.03,
}


class Asked(NamedTuple):
    """A question, its answer, and the numbers of the objects that it is about."""

    question: str
    answer: str
    about: tuple[int, ...] = ()


def _the(words: str) -> str:
    words = words.removeprefix("the ").removeprefix("that ")
    for tail in (" in the picture", " in this image"):
        words = words.removesuffix(tail)
    return "the " + words


def _ask(rng: np.random.Generator, kind: str, **fields: str) -> str:
    return choose(rng, QUESTIONS[kind]).format(**fields)


def _attribute(
    rng: np.random.Generator, scene: Scene, i: int, split: str, kind: str
) -> Asked | None:
    """Colour, shape or size of an object that the question tells apart by other means."""
    item = scene.objects[i]
    use, answer = {
        "colour": ("sz", item.colour),
        "shape": ("cz", item.shape),
        "size": ("cs", item.size),
    }[kind]
    relation = "attribute" if split == DIRECT else pick(rng, _LOCATING)
    if kind == "size" and relation in ("largest", "smallest"):
        return None
    query = refer(rng, scene, i, relation, use)
    if query is None:
        return None
    words = _the(say(rng, query))
    if kind == "shape":  # not "what shape is the shape"
        words = re.sub(r"\b(shape|figure)\b", "object", words)
    return Asked(_ask(rng, kind, x=words), answer, (i,))


def _which(rng: np.random.Generator, scene: Scene, i: int, kind: str) -> Asked | None:
    relation = kind
    if kind == "which":
        relation = pick(rng, {k: w for k, w in _LOCATING.items() if k != "attribute"})
    query = refer(rng, scene, i, relation, "")
    if query is None or len(fitting(scene, describe(*scene.objects[i].pair))) > 1:
        return None
    return Asked(_ask(rng, "which", x=_the(say(rng, query))), name(scene, i), (i,))


def _count(rng: np.random.Generator, scene: Scene, i: int, unseen: bool) -> Asked:
    item = scene.objects[i]
    colour: str | None = item.colour
    shape: str | None = item.shape
    roll = rng.random()
    if roll < 0.3:
        shape = None
    elif roll < 0.6:
        colour = None
    elif roll < 0.7 and not unseen:
        colour = shape = None
    if not unseen and rng.random() < 0.12:  # something that is not there
        colour, shape = _absent(rng, scene, "train")
    wanted = describe(colour, shape)
    words = noun(rng, wanted)
    plural = words + ("es" if words.endswith("s") else "s")
    found = tuple(fitting(scene, wanted))
    return Asked(_ask(rng, "count", x=plural), str(len(found)), found)


def _absent(rng: np.random.Generator, scene: Scene, split: str) -> tuple[str, str]:
    """A pair that the scene lacks, mostly one that shares its colour or shape with an object."""
    there = {o.pair for o in scene.objects}
    pool = UNSEEN_PAIRS if split == "test_unseen" else allowed_pairs(split)
    free = [p for p in pool if p not in there]
    item = choose(rng, scene.objects)
    near = [p for p in free if p[0] == item.colour or p[1] == item.shape]
    return choose(rng, near if near and rng.random() < 0.75 else free)


def _exists(rng: np.random.Generator, scene: Scene, i: int, split: str) -> Asked:
    """Balanced: yes and no are equally likely, whatever is asked about."""
    yes = bool(rng.random() < 0.5)
    item = scene.objects[i]
    roll = rng.random()
    if split != "test_unseen" and roll < 0.4:
        side, names = (0, tuple(COLOURS)) if roll < 0.2 else (1, SHAPES)
        there = {o.pair[side] for o in scene.objects}
        word = item.pair[side] if yes else choose(rng, [n for n in names if n not in there])
        wanted = describe(word) if side == 0 else describe(None, word)
    else:
        wanted = describe(*(item.pair if yes else _absent(rng, scene, split)))
    asked = _ask(rng, "exists", x=article(noun(rng, wanted)))
    return Asked(asked, "yes" if yes else "no", tuple(fitting(scene, wanted)))


def _relation(rng: np.random.Generator, scene: Scene, i: int) -> Asked | None:
    """Balanced yes-no question about two objects that stand clearly in some direction."""
    others = [k for k in range(len(scene.objects)) if k != i]
    if not others:
        return None
    j = choose(rng, others)
    for relation, opposite in _OPPOSITE.items():
        if directed(scene.objects[i], scene.objects[j], relation):
            a, b = unique_description(rng, scene, i), unique_description(rng, scene, j)
            if a is None or b is None:
                return None
            yes = bool(rng.random() < 0.5)
            words = choose(rng, _RELATION_WORDS[relation if yes else opposite])
            x, y = f"the {noun(rng, a)}", f"the {noun(rng, b)}"
            asked = _ask(rng, "relation", x=x, r=words, y=y)
            return Asked(asked, "yes" if yes else "no", (i, j))
    return None


def _place(rng: np.random.Generator, scene: Scene, i: int) -> Asked | None:
    item = scene.objects[i]
    clear = all(abs(3 * v - edge) > 0.12 for v in (item.x, item.y) for edge in (1, 2))
    found = unique_description(rng, scene, i)
    if not clear or found is None:
        return None
    return Asked(_ask(rng, "place", x=f"the {noun(rng, found)}"), place_of(item), (i,))


def _backdrop(rng: np.random.Generator, scene: Scene, kind: str) -> Asked | None:
    background = scene.background
    if kind == "background_pattern":
        return Asked(_ask(rng, kind), background.kind)
    return None if background.kind == "gradient" else Asked(_ask(rng, kind), background.first)


def question(rng: np.random.Generator, split: str) -> tuple[str, Scene, Asked]:
    """A scene and a question about it: (kind, scene, question).

    In `test_unseen` the object asked about is of a held-out pair, descriptions are of scenes with
    held-out pairs only, and nothing is asked about the background.
    """
    unseen = split == "test_unseen"
    mix = DIRECT_VQA if split == DIRECT else VQA
    kinds = {k: w for k, w in mix.items() if not (unseen and k.startswith("background"))}
    kind = pick(rng, kinds)
    make = _maker(rng, split, kind)
    while True:
        max_num = 3 if kind == "describe" else 6
        num = int(rng.integers(3, 7)) if kind == "between" else None
        whole = kind in ("describe", "exists")
        scene = random_scene(
            rng, split, num=num, max_num=max_num, all_unseen=whole,
            anchored=kind in ("describe", "place"),
        )  # fmt: skip
        for i in askable(rng, scene, split):
            asked = make(scene, i)
            if asked is not None:
                return kind, scene, asked


def further_questions(
    rng: np.random.Generator, scene: Scene, split: str, num: int, first: str
) -> tuple[Asked, ...]:
    """Up to `num` further questions about a scene, none of them asked twice or equal to `first`."""
    found: dict[str, Asked] = {}
    for _ in range(num):
        kind = pick(rng, DIRECT_VQA if split == DIRECT else FURTHER_VQA)
        make = _maker(rng, split, kind)
        for i in askable(rng, scene, split)[:3]:
            asked = make(scene, i)
            if asked is not None and asked.question != first:
                found.setdefault(asked.question, asked)
                break
    return tuple(found.values())


def _maker(rng: np.random.Generator, split: str, kind: str) -> Callable[[Scene, int], Asked | None]:
    """What asks a question of a kind about one object of a scene; None where it cannot."""
    makers: dict[str, Callable[[Scene, int], Asked | None]] = {
        **dict.fromkeys(
            ("colour", "shape", "size"), lambda s, i: _attribute(rng, s, i, split, kind)
        ),
        **dict.fromkeys(("which", "between"), lambda s, i: _which(rng, s, i, kind)),
        "count": lambda s, i: _count(rng, s, i, split == "test_unseen"),
        "exists": lambda s, i: _exists(rng, s, i, split),
        "relation": lambda s, i: _relation(rng, s, i),
        "place": lambda s, i: _place(rng, s, i),
        "background_colour": lambda s, i: _backdrop(rng, s, kind),
        "background_pattern": lambda s, i: _backdrop(rng, s, kind),
        "describe": lambda s, i: Asked(_ask(rng, kind), caption(rng, s).text),
    }
    return makers[kind]
