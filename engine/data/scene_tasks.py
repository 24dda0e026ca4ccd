"""One sample of every task: first a draft in terms of the scene, then its pixels."""

# H, W picture

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from engine.data.records import REGION_KINDS, TASKS, Mask, Record, RegionKind, Task
from engine.data.scene_answer import Asked, further_questions, question
from engine.data.scene_draw import render
from engine.data.scene_edit import editing
from engine.data.scene_expression import askable, reasoning, referring
from engine.data.scene_model import (
    DIRECT,
    SHAPES,
    DataError,
    Scene,
    allowed_pairs,
    check_split,
    choose,
    random_scene,
    stream,
)
from engine.data.scene_query import describe, fitting
from engine.data.scene_region import region_prompt
from engine.data.scene_text import caption, name, names

MAX_DRAWN = 4  # objects in a picture to generate
MAX_TURNS = 10  # further questions of a training dialogue
MANY_REGIONS = 0.2  # how often a training prompt points at every object


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A sample before rendering. targets: (object, label) of each mask; regions: objects.

    about: for each answer of a dialogue, the objects that its question is about. told: what a
    picture to draw takes from the text, as pairs of 0 for the backdrop or an object's number plus
    one, and the words for it.
    """

    kind: str
    scene: Scene
    text: str = ""
    answer: str = ""
    classes: tuple[str, ...] = ()
    targets: tuple[tuple[int, int], ...] = ()
    after: Scene | None = None
    changed: int | None = None
    regions: tuple[int, ...] = ()
    region_kinds: tuple[RegionKind, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    about: tuple[tuple[int, ...], ...] = ()
    told: tuple[tuple[int, str], ...] = ()


def _class(rng: np.random.Generator, split: str) -> Draft:
    """Candidate names, some present and some not; a mask per instance of those that are."""
    scene = random_scene(rng, split, all_unseen=True)
    kind = "pairs" if rng.random() < 0.65 else "shapes"
    total = int(rng.integers(3, 9 if kind == "pairs" else 7))
    if kind == "pairs":
        there = list(dict.fromkeys(o.pair for o in scene.objects))
        absent = [p for p in allowed_pairs(split) if p not in there]
        colours, shapes = {p[0] for p in there}, {p[1] for p in there}
        near = [p for p in absent if p[0] in colours or p[1] in shapes]
        wrong = [" ".join(choose(rng, near if rng.random() < 0.6 else absent)) for _ in range(8)]
        present = [" ".join(p) for p in there]
    else:
        present = list(dict.fromkeys(o.shape for o in scene.objects))
        wrong = [s for s in rng.permutation(SHAPES) if s not in present]
    low = 0 if rng.random() < 0.06 else 1
    most = min(len(present), total - 1)
    num = min(most, int(rng.integers(low, most + 1)) if rng.random() < 0.3 or not low else most)
    kept = [present[int(k)] for k in rng.permutation(len(present))[:num]]
    listed = (kept + list(dict.fromkeys(str(w) for w in wrong)))[:total]
    classes = tuple(listed[int(k)] for k in rng.permutation(len(listed)))
    targets = []
    for label, words in enumerate(classes):
        colour, _, shape = words.rpartition(" ")
        targets += [(i, label) for i in fitting(scene, describe(colour or None, shape))]
    answer = names([classes[label] for _, label in targets])
    return Draft(kind=kind, scene=scene, classes=classes, targets=tuple(targets), answer=answer)


def _referring(rng: np.random.Generator, split: str) -> Draft:
    kind, scene, target, text = referring(rng, split)
    answer = name(scene, target)
    return Draft(kind=kind, scene=scene, text=text, answer=answer, targets=((target, 0),))


def _reasoning(rng: np.random.Generator, split: str) -> Draft:
    kind, scene, target, text = reasoning(rng, split)
    answer = name(scene, target)
    return Draft(kind=kind, scene=scene, text=text, answer=answer, targets=((target, 0),))


def _interactive(rng: np.random.Generator, split: str) -> Draft:
    """One region, or two of the same kind, each with its own object; often more in training."""
    scene = random_scene(rng, split)
    most = 2 if rng.random() < 0.3 else 1
    if split == "train" and rng.random() < MANY_REGIONS:  # each teaches as much as a picture more
        most = len(scene.objects)
    found = askable(rng, scene, split)[:most]
    kind = choose(rng, REGION_KINDS)
    return Draft(
        kind=kind,
        scene=scene,
        answer=names([name(scene, i) for i in found]),
        targets=tuple((i, label) for label, i in enumerate(found)),
        regions=tuple(found),
        region_kinds=(kind,) * len(found),
    )


def _generation(rng: np.random.Generator, split: str) -> Draft:
    scene = random_scene(rng, split, max_num=MAX_DRAWN, all_unseen=True, anchored=True)
    said = caption(rng, scene)
    return Draft(
        kind=f"objects_{len(scene.objects)}",
        scene=scene,
        text=said.text,
        after=scene,
        told=((0, said.backdrop), *((i + 1, phrase) for i, phrase in said.items)),
    )


def _editing(rng: np.random.Generator, split: str) -> Draft:
    edit = editing(rng, split)
    target = edit.target
    return Draft(
        kind=edit.kind,
        scene=edit.before,
        text=edit.text,
        answer="background" if target is None else name(edit.before, target),
        after=edit.after,
        changed=target,
        regions=() if edit.region is None or target is None else (target,),
        region_kinds=() if edit.region is None else (edit.region,),
        told=((0 if target is None else target + 1, edit.told),) if edit.told else (),
    )


def _vqa(rng: np.random.Generator, split: str) -> Draft:
    """One question; in training several more about the same picture, as a dialogue."""
    kind, scene, first = question(rng, split)
    further: tuple[Asked, ...] = ()
    if split in ("train", DIRECT):
        further = further_questions(rng, scene, split, MAX_TURNS, first.question)
    return Draft(
        kind=kind,
        scene=scene,
        text=first.question,
        answer=first.answer,
        turns=tuple((asked.question, asked.answer) for asked in further),
        about=tuple(asked.about for asked in (first, *further)),
    )


_DRAFTS = {
    "class": _class,
    "referring": _referring,
    "reasoning": _reasoning,
    "interactive": _interactive,
    "generation": _generation,
    "editing": _editing,
    "vqa": _vqa,
}


def draft(task: str, split: str, seed: int, index: int) -> tuple[Draft, np.random.Generator]:
    """The sample before rendering, and its random stream from there on.

    Raises: DataError for a task or split that is not known.
    """
    if task not in TASKS:
        raise DataError(f"expected a task of {', '.join(TASKS)}, got {task!r}; choose one")
    check_split(split)
    rng = stream("sample", split, seed, index, task)
    return _DRAFTS[task](rng, split), rng


def as_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W) of a side or a pair."""
    return (size, size) if isinstance(size, int) else size


def sample(
    task: Task, split: str, seed: int, index: int, size: int | tuple[int, int] = (128, 128)
) -> Record:
    """Sample number `index` of a task: a pure function of its arguments.

    size: (H, W) or the side of a square picture; the same scene at any size.
    Raises: DataError for an unknown task or split, or sides under 8 pixels.
    """
    size = as_size(size)
    plan, rng = draft(task, split, seed, index)
    image, instances = render(plan.scene, size)
    target = None if plan.after is None else image
    masks = [(instances == i + 1, label) for i, label in plan.targets]
    if task == "editing" and plan.after is not None:
        target, after = render(plan.after, size)
        masks = [(_changed(plan, instances, after), 0)]
    regions = [
        region_prompt(rng, instances == i + 1, kind)
        for i, kind in zip(plan.regions, plan.region_kinds, strict=True)
    ]
    return Record(
        id=f"{split}-{seed}-{task}-{index}",
        task=task,
        text=plan.text,
        answer=plan.answer,
        classes=plan.classes,
        image=None if task == "generation" else image,
        masks=tuple(mask for mask, _ in masks),
        labels=tuple(label for _, label in masks),
        regions=tuple(regions),
        region_kinds=plan.region_kinds,
        target=target,
        turns=plan.turns,
        kind=plan.kind,
    )


def _changed(plan: Draft, before: np.ndarray, after: np.ndarray) -> Mask:
    """Visible footprint of the changing object before and after; or the whole background."""
    if plan.changed is None:
        return np.asarray(before == 0)
    mask = before == plan.changed + 1
    if plan.kind != "remove":
        mask = mask | (after == plan.changed + 1)
    return np.asarray(mask)


@dataclass(frozen=True, kw_only=True)
class Requested:
    """An object that a caption asks for."""

    colour: str
    shape: str
    size: str
    x: float
    y: float


@lru_cache(maxsize=64)  # what is asked of a record comes in a row
def _plan(record_id: str, task: str | None = None) -> Draft:
    """The draft behind a record of the built-in world, which its id names."""
    parts = record_id.rsplit("-", 3)
    found: str | None = None
    if len(parts) == 4 and parts[1].isdigit() and parts[3].isdigit():
        found = parts[2]
    if found not in TASKS or task not in (None, found):
        raise DataError(
            f"expected an id like 'test-0-{task or 'vqa'}-7', got {record_id!r}; pass the id of a "
            f"{task or 'any'} record of the built-in world"
        )
    return draft(found, parts[0], int(parts[1]), int(parts[3]))[0]


def scene_of(record_id: str) -> Scene:
    """The scene behind a record, from its id alone.

    Raises: DataError when the id is not of a record of the built-in world.
    """
    return _plan(record_id).scene


def coverage(scene: Scene, grid: tuple[int, int]) -> np.ndarray:
    """Share of each cell that the background (column 0) and each object cover.

    Returns float32 [rows * columns, 1 + objects], from a small drawing of the scene.
    """
    fine, (rows, columns) = 4, grid
    _, instances = render(scene, (rows * fine, columns * fine))
    own = instances[..., None] == np.arange(1 + len(scene.objects))
    cells = own.reshape(rows, fine, columns, fine, -1).mean((1, 3), dtype=np.float32)
    return np.asarray(cells.reshape(rows * columns, -1))


def subjects(record_id: str, grid: tuple[int, int]) -> np.ndarray:
    """Where the objects lie that each answer of a record is about, from its id alone.

    Returns float32 [Q, rows * columns]: the share of each cell that they cover, one row for each
    answer of a dialogue; of other tasks one row, for the objects to segment, point at or change.
    Raises: DataError when the id is not of a record of the built-in world.
    """
    plan = _plan(record_id)
    about = plan.about or (tuple(i for i, _ in plan.targets) or plan.regions,)
    if plan.changed is not None:
        about = ((plan.changed,),)
    if plan.after is plan.scene:  # a picture to draw shows nothing yet
        about = ((),)
    share = coverage(plan.scene, grid)
    return np.stack([share[:, [i + 1 for i in objects]].sum(1) for objects in about])


def listed(record_id: str, grid: tuple[int, int]) -> np.ndarray:
    """Where the objects lie that each candidate class names, from a record's id alone.

    Returns float32 [K, rows * columns]: the share of each cell that they cover, zero where none is.
    Raises: DataError when the id is not of a record of the built-in world.
    """
    plan = _plan(record_id)
    share = coverage(plan.scene, grid)
    labels = range(len(plan.classes))
    named = [[i + 1 for i, of in plan.targets if of == label] for label in labels]
    found = [share[:, columns].sum(1) for columns in named]
    return np.stack(found) if found else np.zeros((0, len(share)), np.float32)


def pairs_asked(record_id: str) -> tuple[tuple[tuple[str, str], ...], ...]:
    """(colour, shape) of the objects that each answer of a dialogue is about, from its id alone.

    Raises: DataError when the id is not of a record of the built-in world.
    """
    plan = _plan(record_id)
    return tuple(tuple(plan.scene.objects[i].pair for i in about) for about in plan.about)


def pairs_segmented(record_id: str) -> tuple[tuple[str, str], ...]:
    """(colour, shape) of the object behind each mask of a record to segment, from its id alone.

    Raises: DataError when the id is not of a record of the built-in world.
    """
    plan = _plan(record_id)
    return tuple(plan.scene.objects[i].pair for i, _ in plan.targets)


def touched(record_id: str, grid: tuple[int, int]) -> np.ndarray:
    """Where a record's masks lie, from its id alone: share [rows * columns] of each cell.

    As the first row of `subjects`; an edit's is what it changes, before and after.
    Raises: DataError when the id is not of a record of the built-in world.
    """
    drawn = _plan(record_id)
    if drawn.after is None or drawn.after is drawn.scene:
        return np.asarray(subjects(record_id, grid)[0])
    return _edited(drawn, coverage(drawn.after, grid), grid)


def _edited(drawn: Draft, after: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Share of each cell that an edit changes. after: coverage of the scene behind it."""
    changed = 0 if drawn.changed is None else drawn.changed + 1
    before = coverage(drawn.scene, grid)[:, changed]
    return before if drawn.kind == "remove" else np.maximum(before, after[:, changed])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the cells of a picture to draw come from.

    told: words of the text and the share [rows * columns] of each cell that what they say covers.
    kept: share of each cell that stays as it is in the picture given, 0 where none is.
    """

    told: tuple[tuple[str, np.ndarray], ...]
    kept: np.ndarray


def plan_of(record_id: str, grid: tuple[int, int]) -> Plan:
    """What each cell of a picture to draw comes from, from the record's id alone.

    Raises: DataError when the id is not of a record of the built-in world.
    """
    drawn = _plan(record_id)
    none = np.zeros(grid[0] * grid[1], np.float32)
    if drawn.after is None:
        return Plan(told=(), kept=none)
    after = coverage(drawn.after, grid)
    told = tuple((words, after[:, column]) for column, words in drawn.told)
    if drawn.after is drawn.scene:
        return Plan(told=told, kept=none)
    there = _edited(drawn, after, grid)
    if drawn.kind == "remove":  # what shows there now is told by no single place
        return Plan(told=told, kept=np.asarray(there == 0, np.float32))
    return Plan(told=told, kept=1 - there)


def requested(record_id: str) -> tuple[Requested, ...]:
    """The objects that a generation record's caption asks for, from its id alone.

    Raises: DataError when the id is not of a generation record of the built-in world.
    """
    plan = _plan(record_id, "generation")
    return tuple(
        Requested(colour=o.colour, shape=o.shape, size=o.size, x=o.x, y=o.y)
        for o in plan.scene.objects
    )
