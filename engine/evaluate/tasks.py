"""`focus evaluate`: every measure of the model card, with exact truth and no learned judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from engine.data.records import REGION_KINDS, Mask, Record, Task
from engine.data.scenes import requested, sample
from engine.evaluate.metrics import (
    answers_match,
    class_miou,
    cumulative_iou,
    edit_succeeds,
    iou,
    psnr,
    union,
)
from engine.evaluate.pixels import present
from focus.api import Focus
from focus.inputs import to_pictures
from focus.pipeline import to_uint8
from focus.request import EditResult, Pixels, Request, SegmentResult

Figures = dict[str, Any]
BATCH = 16
OPEN_ENDED = ("describe",)  # kinds of question whose answers exact match cannot judge


class Samples:
    """The first `num` samples of a task, of one split and seed."""

    def __init__(self, model: Focus, split: str, seed: int, num: int) -> None:
        self.model = model
        self.split = split
        self.seed = seed
        self.num = num
        self.size = model.config.hierarchical.image_size

    def records(
        self, task: Task, wanted: Callable[[Record], bool] = lambda record: True
    ) -> list[Record]:
        """Return `num` records that are wanted, in order of their number."""
        found: list[Record] = []
        index = 0
        while len(found) < self.num:
            record = sample(task, self.split, self.seed, index, self.size)
            if wanted(record):
                found.append(record)
            index += 1
        return found


def evaluate(
    model: Focus,
    *,
    split: str = "test",
    seed: int = 0,
    num: int = 100,
    tasks: Sequence[str] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Figures:
    """Return the figures of the chosen tasks (default: all), by the names of the model card."""
    samples = Samples(model, split, seed, num)
    figures: Figures = {}
    for task, measure in MEASURES.items():
        if tasks is None or task in tasks:
            say(f"{task}: {num} samples of {split}")
            figures.update(measure(samples))
    return figures


def chunks(records: Sequence[Record]) -> Iterator[Sequence[Record]]:
    """Yield batches of records."""
    for start in range(0, len(records), BATCH):
        yield records[start : start + BATCH]


def ask(record: Record, seed: int) -> Request:
    """Return what a user would send: a record without its answer, masks and target."""
    return Request(
        task=record.task,
        text=record.text,
        classes=record.classes,
        image=record.image,
        regions=record.regions,
        seed=seed,
    )


def segment(model: Focus, records: Sequence[Record], seed: int) -> list[SegmentResult]:
    """Segment every record."""
    results: list[SegmentResult] = []
    for batch in chunks(records):
        results += model.segment_batch([ask(record, seed + i) for i, record in enumerate(batch)])
    return results


def measure_text(samples: Samples, task: Task) -> Figures:
    """Mean IoU and cIoU of expressions, and how often the spoken name is right."""
    records = samples.records(task)
    results = segment(samples.model, records, samples.seed)
    pairs = [
        (union(result.masks, samples.size), union(record.masks, samples.size))
        for record, result in zip(records, results, strict=True)
    ]
    named = [
        answers_match(result.text, record.answer)
        for record, result in zip(records, results, strict=True)
    ]
    return {
        f"{task}_miou": float(np.mean([iou(*pair) for pair in pairs])),
        f"{task}_ciou": cumulative_iou(pairs),
        f"{task}_names": float(np.mean(named)),
    }


def measure_interactive(samples: Samples) -> Figures:
    """Mean IoU per region, for each kind of region by itself."""
    figures: dict[str, float] = {}
    for kind in REGION_KINDS:
        records = samples.records("interactive", lambda r, k=kind: set(r.region_kinds) == {k})  # type: ignore[misc]
        scores = []
        for record, result in zip(
            records, segment(samples.model, records, samples.seed), strict=True
        ):
            for mask, label in zip(record.masks, record.labels, strict=True):
                found = [m for m, n in zip(result.masks, result.labels, strict=True) if n == label]
                scores.append(iou(union(found, samples.size), mask))
        figures[kind] = float(np.mean(scores))
    return {"interactive_iou": figures}


def measure_class(samples: Samples) -> Figures:
    """Mean IoU over classes, intersections and unions summed over pictures."""
    records = samples.records("class")
    results = segment(samples.model, records, samples.seed)
    predicted, truth = [], []
    for record, result in zip(records, results, strict=True):
        predicted.append(_by_class(record, result.masks, result.labels))
        truth.append(_by_class(record, record.masks, record.labels))
    return {"class_miou": class_miou(predicted, truth)}


def _by_class(record: Record, masks: Sequence[Mask], labels: Sequence[int]) -> dict[str, Mask]:
    found: dict[str, Mask] = {}
    for mask, label in zip(masks, labels, strict=True):
        name = record.classes[label]
        found[name] = found[name] | mask if name in found else mask
    return found


def measure_vqa(samples: Samples) -> Figures:
    """Exact match of short answers, in all and by kind of question."""
    records = samples.records("vqa", lambda record: record.kind not in OPEN_ENDED)
    answers: list[str] = []
    for batch in chunks(records):
        answers += samples.model.chat_batch([ask(record, samples.seed) for record in batch])
    right: dict[str, list[bool]] = {}
    for record, answer in zip(records, answers, strict=True):
        right.setdefault(record.kind, []).append(answers_match(answer, record.answer))
    return {
        "vqa_accuracy": float(np.mean([hit for hits in right.values() for hit in hits])),
        "vqa_by_kind": {kind: float(np.mean(hits)) for kind, hits in sorted(right.items())},
    }


def measure_generation(samples: Samples) -> Figures:
    """Share of requested objects present with the right colour and shape (a rule on pixels)."""
    records = samples.records("generation")
    scores: list[bool] = []
    for batch in chunks(records):
        requests = [ask(record, samples.seed + i) for i, record in enumerate(batch)]
        for record, picture in zip(batch, samples.model.generate_batch(requests), strict=True):
            wanted = [(item.colour, item.shape) for item in requested(record.id)]
            scores += present(picture, wanted)
    return {"generation_score": float(np.mean(scores))}


def measure_editing(samples: Samples) -> Figures:
    """Share of edits right inside and outside the true mask, in all and by kind."""
    records = samples.records("editing")
    right: dict[str, list[bool]] = {}
    raw: list[bool] = []
    overlaps: list[float] = []
    for batch in chunks(records):
        requests = [ask(record, samples.seed + i) for i, record in enumerate(batch)]
        for record, result in zip(batch, samples.model.edit_batch(requests), strict=True):
            hit, bare = _judge(record, result)
            right.setdefault(record.kind, []).append(hit)
            raw.append(bare)
            overlaps.append(iou(result.mask, record.masks[0]))
    return {
        "editing_success": float(np.mean([hit for hits in right.values() for hit in hits])),
        "editing_by_kind": {kind: float(np.mean(hits)) for kind, hits in sorted(right.items())},
        "editing_success_unpasted": float(np.mean(raw)),
        "editing_mask_miou": float(np.mean(overlaps)),
    }


def _judge(record: Record, result: EditResult) -> tuple[bool, bool]:
    """Return whether the edit succeeds, and whether the decoder's own picture would have."""
    assert record.target is not None
    raw: Pixels = np.asarray(result.raw.resize(result.image.size))
    changed = record.masks[0]
    return (
        edit_succeeds(np.asarray(result.image), record.target, changed),
        edit_succeeds(raw, record.target, changed),
    )


def measure_tokenizer(samples: Samples) -> Figures:
    """PSNR of reconstructions by the tokenizer's pixel decoder and by the diffusion decoder."""
    model = samples.model.model
    records = samples.records("vqa")
    figures: dict[str, list[float]] = {"tokenizer_psnr": [], "diffusion_psnr": []}
    pipeline = samples.model.pipeline()
    pipeline.settings = replace(pipeline.settings, decoder="diffusion")
    for batch in chunks(records):
        pictures = to_pictures([r.image for r in batch if r.image is not None], model.config)
        truth = to_uint8(pictures.pixel)
        codes = model.front.tokenize(pictures)
        decoded = to_uint8(model.front.tokenizer.decode(codes).detach())
        painted = to_uint8(pipeline.paint(codes), truth.shape[1:3])
        figures["tokenizer_psnr"] += [psnr(a, b) for a, b in zip(decoded, truth, strict=True)]
        figures["diffusion_psnr"] += [psnr(a, b) for a, b in zip(painted, truth, strict=True)]
    return {name: float(np.mean(values)) for name, values in figures.items()}


MEASURES: dict[str, Callable[[Samples], Figures]] = {
    "referring": lambda samples: measure_text(samples, "referring"),
    "reasoning": lambda samples: measure_text(samples, "reasoning"),
    "interactive": measure_interactive,
    "class": measure_class,
    "vqa": measure_vqa,
    "generation": measure_generation,
    "editing": measure_editing,
    "tokenizer": measure_tokenizer,
}
