"""Words of the built-in world against an independent reading of them, on the rendered picture."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from engine.data.records import REGION_KINDS
from engine.data.scene_answer import QUESTIONS
from engine.data.scene_edit import TEMPLATES as EDIT_TEMPLATES
from engine.data.scene_expression import REASONING, REFERRING
from engine.data.scene_model import COLOURS, SHAPES, Scene
from engine.data.scene_text import TEMPLATES
from engine.data.scenes import FREE_KINDS, draft, render, sample

THING = (
    rf"(?:(small|large) )?(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)}|object|thing|shape|figure)"
)


@dataclass(frozen=True)
class Seen:
    """An object as the picture shows it: words that fit it, and its visible middle in pixels."""

    words: frozenset[str]
    x: float
    y: float
    span: int


def look(scene: Scene) -> list[Seen]:
    """Objects from pixels: nearest palette colour and extent; shapes are taken from the scene."""
    image, instances = render(scene, (128, 128))
    colours = np.array(list(COLOURS.values()))
    found = []
    for i, item in enumerate(scene.objects):
        rows, columns = np.nonzero(instances == i + 1)
        middle = image[rows, columns].mean(0)
        colour = list(COLOURS)[int(np.abs(colours - middle).sum(1).argmin())]
        span = int(max(np.ptp(rows), np.ptp(columns)))
        words = frozenset({colour, item.shape, "large" if span > 33 else "small"})
        middle_xy = ((columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2)
        found.append(Seen(words, *map(float, middle_xy), span))
    return found


def fits(seen: list[Seen], match: tuple[str | None, ...]) -> list[int]:
    wanted = {w for w in match if w and w not in ("object", "thing", "shape", "figure")}
    return [i for i, o in enumerate(seen) if wanted <= o.words]


def read(seen: list[Seen], kind: str, text: str) -> int | None:
    """The object that an expression means, read by regular expressions; None if not understood."""
    found = re.findall(THING + r"\b", text)
    if not found:
        return None
    heads = fits(seen, found[0])
    if kind == "attribute" and len(found) == 1:
        assert len(heads) == 1, text
        return heads[0]
    keys = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "bottommost": (1, -1)}
    if kind in keys and len(found) == 1:
        axis, sign = keys[kind]
        return min(heads, key=lambda i: sign * (seen[i].x, seen[i].y)[axis])
    if kind in ("largest", "smallest") and len(found) == 1:
        sign = 1 if kind == "smallest" else -1
        return min(heads, key=lambda i: sign * seen[i].span)
    sides = {"left_of": (0, -1), "right_of": (0, 1), "above": (1, -1), "below": (1, 1)}
    if kind in sides and len(found) == 2:
        anchors = fits(seen, found[1])
        assert len(anchors) == 1, text
        axis, sign = sides[kind]
        base = (seen[anchors[0]].x, seen[anchors[0]].y)[axis]
        right = [
            i for i in heads if i != anchors[0] and sign * ((seen[i].x, seen[i].y)[axis] - base) > 2
        ]
        assert len(right) == 1, text
        return right[0]
    return None


def test_expressions_mean_their_target_and_nothing_else() -> None:
    understood = Counter[str]()
    for split in ("train", "test_unseen"):
        for index in range(120):
            plan, _ = draft("referring", split, 6, index)
            got = read(look(plan.scene), plan.kind, plan.text)
            if got is not None:
                understood[plan.kind] += 1
                assert got == plan.targets[0][0], (plan.text, plan.answer)
    assert sum(understood.values()) > 160 and len(understood) == 11


def test_answers_name_the_target() -> None:
    for task in ("referring", "reasoning", "interactive"):
        for index in range(60):
            plan, _ = draft(task, "val", 2, index)
            for name, (i, _) in zip(plan.answer.split(", "), plan.targets, strict=False):
                words = name.split()
                item = plan.scene.objects[i]
                assert words[-2:] == [item.colour, item.shape]
                twins = sum(o.pair == item.pair for o in plan.scene.objects)
                assert len(words) == 2 or (words[0] == item.size and twins > 1)


def test_reasoning_never_names_its_target() -> None:
    kinds = set()
    for index in range(150):
        plan, _ = draft("reasoning", "train", 8, index)
        kinds.add(plan.kind)
        item = plan.scene.objects[plan.targets[0][0]]
        assert f"{item.colour} {item.shape}" not in plan.text
        if plan.kind.endswith("_hint"):
            assert not {item.colour, item.shape} & set(re.findall(r"[a-z]+", plan.text))
    assert kinds == set(REASONING)


def test_questions_are_answered_from_the_picture() -> None:
    checked = Counter[str]()
    for index in range(300):
        plan, _ = draft("vqa", "val", 3, index)
        seen = look(plan.scene)
        about = re.sub(r"\b(what|which|the) shape\b|what shape is it", "", plan.text)
        found = re.findall(THING + r"(?:s|es)?\b", about)
        if plan.kind == "count":
            assert plan.answer == str(len(fits(seen, found[0])))
        elif plan.kind == "exists":
            there = fits(seen, found[0])
            assert plan.answer == ("yes" if there else "no")
        elif plan.kind == "relation":
            a, b = (fits(seen, match)[0] for match in found)
            dx, dy = seen[a].x - seen[b].x, seen[a].y - seen[b].y
            holds = {
                "left of": dx < 0,
                "right of": dx > 0,
                "above": dy < 0,
                "over": dy < 0,
                "higher than": dy < 0,
                "below": dy > 0,
                "under": dy > 0,
                "lower than": dy > 0,
            }
            word = next(w for w in holds if f" {w} " in plan.text)
            assert plan.answer == ("yes" if holds[word] else "no"), plan.text
        elif plan.kind in ("colour", "shape", "size") and len(found) == 1:
            there = fits(seen, found[0])
            if len(there) != 1:
                continue  # a superlative or a place
            assert plan.answer in seen[there[0]].words
        else:
            continue
        checked[plan.kind] += 1
    assert len(checked) == 6 and min(checked.values()) > 6


def test_questions_leak_no_answer() -> None:
    yes: dict[str, list[bool]] = defaultdict(list)
    for index in range(600):
        plan, _ = draft("vqa", "train", 11, index)
        words = set(re.findall(r"[a-z]+", plan.text))
        if plan.kind in ("colour", "shape", "which", "between", "place", "count"):
            alone = len(re.findall(THING, plan.text.removeprefix("what shape"))) < 2
            named = plan.answer in plan.text if " " in plan.answer else plan.answer in words
            assert not (alone and named), plan.text  # an anchor may share the answer
        if plan.kind in ("exists", "relation"):
            opening = " ".join(plan.text.split()[:2])
            yes[plan.kind].append(plan.answer == "yes")
            yes[opening].append(plan.answer == "yes")
    assert all(0.25 < np.mean(v) < 0.75 for v in yes.values() if len(v) >= 30)
    assert 0.4 < np.mean(yes["exists"]) < 0.6
    assert {"describe"} == FREE_KINDS


def test_every_fact_has_at_least_five_templates() -> None:
    for table in (TEMPLATES, QUESTIONS, EDIT_TEMPLATES):
        assert min(len(set(options)) for options in table.values()) >= 5
    assert set(REFERRING) <= set(TEMPLATES)


def test_region_prompts_point_at_their_object() -> None:
    kinds = Counter[str]()
    for index in range(80):
        r = sample("interactive", "train", 4, index, (96, 96))
        for mask, region in zip(r.masks, r.regions, strict=True):
            kinds[r.kind] += 1
            inside = (mask & region).sum() / region.sum()
            overlap = (mask & region).sum() / (mask | region).sum()
            rows, columns = np.nonzero(mask)
            box = np.zeros_like(mask)
            box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
            if r.kind in ("click", "scribble"):
                assert inside > 0.6 and region.sum() < 0.6 * mask.sum()
            elif r.kind == "box":
                assert (box & region).sum() / (box | region).sum() > 0.6
                assert region.sum() == np.prod([np.ptp(v) + 1 for v in np.nonzero(region)])
            else:
                assert 0.35 < overlap < 1
    assert set(kinds) == set(REGION_KINDS)
