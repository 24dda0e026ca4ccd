"""What `focus demo` shows: for each task the first unseen scenes, asked, answered and judged."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from engine.data.records import REGION_KINDS, Mask, Record, RegionKind, Task
from engine.data.scenes import FREE_KINDS, clip, requested, sample
from engine.demo_page import Example, Section, Shot, Verdict
from engine.evaluate.metrics import answers_match, edit_succeeds, iou, mean_abs_error, psnr, union
from engine.evaluate.pixels import present
from engine.show import overlay, spotlight

if TYPE_CHECKING:
    from focus import Focus
    from focus.regions import Region
    from focus.request import SegmentResult

SPLIT = "test_unseen"
SIZE = 256  # side of the scenes, pixels
EDITS = ("remove", "replace", "recolour", "move", "background")
CLIP_FRAMES = 12
MAX_SEARCH = 200  # scenes looked at to find one of a wanted kind
PAINTERS = {"pixel": "the tokenizer's pixel decoder", "diffusion": "the diffusion decoder"}


def first(
    task: Task, seed: int, number: int, wanted: Callable[[Record], bool] = lambda _: True
) -> list[Record]:
    """The first `number` unseen samples of a task that are wanted, in order."""
    samples = (sample(task, SPLIT, seed, index, SIZE) for index in range(MAX_SEARCH))
    return [record for record, _ in zip(filter(wanted, samples), range(number), strict=False)]


def _pointed_by(kind: str, record: Record) -> bool:
    return set(record.region_kinds) == {kind}


def _is_kind(kind: str, record: Record) -> bool:
    return record.kind == kind


def grade(value: float, good: float, fair: float) -> Verdict:
    """Sort a number into good, fair and poor."""
    return "good" if value >= good else "fair" if value >= fair else "poor"


# ---- segmentation ------------------------------------------------------------------------------


def referring(model: Focus, seed: int) -> Section:
    """Referring segmentation."""
    return Section(
        name="referring",
        title="Find what a sentence names",
        told="The model names what it is about to segment, then draws its mask.",
        examples=tuple(_segment(model, record) for record in first("referring", seed, 6)),
    )


def reasoning(model: Focus, seed: int) -> Section:
    """Reasoning segmentation."""
    return Section(
        name="reasoning",
        title="Find what a sentence means",
        told="The sentence describes the object without naming it.",
        examples=tuple(_segment(model, record) for record in first("reasoning", seed, 4)),
    )


def interactive(model: Focus, seed: int) -> Section:
    """Interactive segmentation, one example of each kind of region."""
    found = [
        record
        for kind in REGION_KINDS
        for record in first("interactive", seed, 1, partial(_pointed_by, kind))
    ]
    return Section(
        name="interactive",
        title="Find what you point at",
        told="A click, a scribble, a box or a rough mask; no words at all.",
        examples=tuple(_segment(model, record) for record in found),
    )


def by_class(model: Focus, seed: int) -> Section:
    """Class-based segmentation."""
    return Section(
        name="classes",
        title="Find every object of a list",
        told="Candidate names go in; each found object comes out with the name that fits best.",
        examples=tuple(_segment(model, record) for record in first("class", seed, 4)),
    )


def _segment(model: Focus, record: Record) -> Example:
    assert record.image is not None
    image = Image.fromarray(record.image)
    text = ", ".join(record.classes) if record.task == "class" else record.text or None
    pointed = [region(m, k) for m, k in zip(record.regions, record.region_kinds, strict=True)]
    begin = time.perf_counter()
    result = model.segment(image, text=text, regions=pointed or None, task=record.task)
    seconds = time.perf_counter() - begin
    score = _overlap(record, result)
    shots = [Shot(caption="picture", frames=(image,))]
    if record.regions:
        shown = overlay(image, record.regions, enlarge=False)
        shots[0] = Shot(
            caption="picture and " + ", ".join(sorted(set(record.region_kinds))), frames=(shown,)
        )
    shots.append(Shot(caption="found", frames=(spotlight(image, result.masks),)))
    shots.append(Shot(caption="true", frames=(spotlight(image, record.masks),)))
    instruction = text or "What is here?"
    return Example(
        task=record.task,
        kind=record.kind or ", ".join(record.region_kinds) or record.task,
        instruction=instruction,
        shots=tuple(shots),
        badge=f"IoU {score:.2f}",
        verdict=grade(score, 0.8, 0.5),
        words=(("said", ", ".join(result.names)), ("true", record.answer)),
        seconds=seconds,
        figures={"iou": round(score, 4)},
    )


def _overlap(record: Record, result: SegmentResult) -> float:
    """Mean IoU over the true masks; classes and regions must carry the right label."""
    if record.task not in ("class", "interactive"):
        return iou(union(result.masks, (SIZE, SIZE)), union(record.masks, (SIZE, SIZE)))
    scores = []
    for truth, label in zip(record.masks, record.labels, strict=True):
        same = [m for m, other in zip(result.masks, result.labels, strict=True) if other == label]
        scores.append(max((iou(mask, truth) for mask in same), default=0.0))
    return float(np.mean(scores)) if scores else 0.0


def region(mask: Mask, kind: RegionKind) -> Region:
    """The region prompt that a person would have given for a record's region mask."""
    from focus.regions import Box, Click, MaskRegion, Scribble

    rows, columns = np.nonzero(mask)
    if kind == "click":
        return Click(float(columns.mean()), float(rows.mean()))
    if kind == "box":
        left, top = float(columns.min()), float(rows.min())
        return Box(left, top, float(columns.max()) + 1, float(rows.max()) + 1)
    return Scribble(mask) if kind == "scribble" else MaskRegion(mask)


def video(model: Focus, seed: int) -> Section:
    """Referring segmentation in a short video."""
    film = clip(SPLIT, seed, 0, CLIP_FRAMES, SIZE)
    frames = [Image.fromarray(frame) for frame in film.frames]
    begin = time.perf_counter()
    results = [model.segment(frame, text=film.text, task="referring") for frame in frames]
    seconds = time.perf_counter() - begin
    found = [union(result.masks, (SIZE, SIZE)) for result in results]
    scores = [iou(mask, truth) for mask, truth in zip(found, film.masks(), strict=True)]
    score = float(np.mean(scores))
    shots = {
        "video": frames,
        "found": [spotlight(frame, [mask]) for frame, mask in zip(frames, found, strict=True)],
        "true": [spotlight(f, [mask]) for f, mask in zip(frames, film.masks(), strict=True)],
    }
    example = Example(
        task="video",
        kind=f"{CLIP_FRAMES} frames",
        instruction=film.text,
        shots=tuple(Shot(caption=name, frames=tuple(shown)) for name, shown in shots.items()),
        badge=f"IoU {score:.2f}",
        verdict=grade(score, 0.8, 0.5),
        words=(("true", film.answer),),
        seconds=seconds,
        figures={"iou": round(score, 4), "frames": [round(value, 4) for value in scores]},
    )
    return Section(
        name="video",
        title="Follow it",
        told="The same sentence, asked anew of every frame while the objects drift and hide.",
        examples=(example,),
    )


# ---- pictures and words ------------------------------------------------------------------------


def editing(model: Focus, seed: int) -> Section:
    """Editing, one example of each kind."""
    found = [
        record for kind in EDITS for record in first("editing", seed, 1, partial(_is_kind, kind))
    ]
    return Section(
        name="editing",
        title="Change exactly that",
        told="The language model finds the region, then writes new visual tokens under it, which "
        f"{PAINTERS[model.settings.decoder]} paints. Right: close to the truth inside the region, "
        "untouched outside.",
        examples=tuple(_edit(model, record, seed) for record in found),
    )


def _edit(model: Focus, record: Record, seed: int) -> Example:
    assert record.image is not None
    assert record.target is not None
    image, target = Image.fromarray(record.image), Image.fromarray(record.target)
    pointed = [region(m, k) for m, k in zip(record.regions, record.region_kinds, strict=True)]
    begin = time.perf_counter()
    result = model.edit(image, record.text, region=pointed[0] if pointed else None, seed=seed)
    seconds = time.perf_counter() - begin
    changed = np.any(record.masks, axis=0)
    edited = np.asarray(result.image.convert("RGB"))
    inside = mean_abs_error(edited, record.target, changed)
    outside = min(99.0, psnr(edited, record.target, ~changed))
    right = edit_succeeds(edited, record.target, changed)
    shots = (
        Shot(caption="before", frames=(_marked(image, record),)),
        Shot(caption="mask found", frames=(spotlight(image, [result.mask]),)),
        Shot(caption="after", frames=(result.image,)),
        Shot(caption="true", frames=(target,)),
    )
    return Example(
        task="editing",
        kind=record.kind,
        instruction=record.text.replace("<region>", "[this]"),
        shots=shots,
        badge="right" if right else "not right",
        verdict="good" if right else grade(-inside, -30, -60),
        words=(("error inside", f"{inside:.0f} of 255"), ("PSNR outside", f"{outside:.1f} dB")),
        seconds=seconds,
        figures={
            "error_inside": round(inside, 2),
            "psnr_outside": round(outside, 2),
            "mask_iou": round(iou(result.mask, changed), 4),
            "success": right,
        },
    )


def _marked(image: Image.Image, record: Record) -> Image.Image:
    return overlay(image, record.regions, enlarge=False) if record.regions else image


def generation(model: Focus, seed: int) -> Section:
    """Generation from captions."""
    return Section(
        name="generation",
        title="Draw what I say",
        told="The language model writes visual tokens, "
        f"{PAINTERS[model.settings.decoder]} paints them.",
        examples=tuple(_generate(model, record, seed) for record in first("generation", seed, 4)),
    )


def _generate(model: Focus, record: Record, seed: int) -> Example:
    assert record.target is not None
    begin = time.perf_counter()
    image = model.generate(record.text, seed=seed)
    seconds = time.perf_counter() - begin
    wanted = [(item.colour, item.shape) for item in requested(record.id)]
    there = present(np.asarray(image), wanted)
    return Example(
        task="generation",
        kind="generation",
        instruction=record.text,
        shots=(
            Shot(caption="drawn", frames=(image,)),
            Shot(caption="one of many right answers", frames=(Image.fromarray(record.target),)),
        ),
        badge=f"{sum(there)} of {len(there)} there",
        verdict=grade(float(np.mean(there)), 1.0, 0.5),
        words=tuple(
            (" ".join(pair), "there" if right else "missing")
            for pair, right in zip(wanted, there, strict=True)
        ),
        seconds=seconds,
        figures={"score": round(float(np.mean(there)), 4)},
    )


def answering(model: Focus, seed: int) -> Section:
    """Question answering."""
    return Section(
        name="answering",
        title="Ask",
        told="Counting, colours, places, comparisons.",
        examples=tuple(
            _answer(model, record, seed)
            for record in first("vqa", seed, 12, lambda record: record.kind not in FREE_KINDS)
        ),
    )


def _answer(model: Focus, record: Record, seed: int) -> Example:
    assert record.image is not None
    image = Image.fromarray(record.image)
    begin = time.perf_counter()
    answer = model.chat(image, record.text, seed=seed)
    seconds = time.perf_counter() - begin
    right = answers_match(answer, record.answer)
    return Example(
        task="vqa",
        kind=record.kind or "question",
        instruction=record.text,
        shots=(Shot(caption="picture", frames=(image,)),),
        badge="right" if right else "wrong",
        verdict="good" if right else "poor",
        words=(("said", answer), ("true", record.answer)),
        seconds=seconds,
        figures={"right": right},
    )


SECTIONS: tuple[Callable[[Focus, int], Section], ...] = (
    referring,
    interactive,
    editing,
    reasoning,
    by_class,
    video,
    answering,
    generation,
)
