"""Evaluation: an oracle reaches the top of every measure, a blind model the bottom."""

from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from engine.data.records import Record
from engine.data.scenes import sample
from engine.evaluate import tasks
from engine.evaluate.metrics import (
    answers_match,
    class_miou,
    cumulative_iou,
    edit_succeeds,
    iou,
    psnr,
)
from focus.presets import focus_tiny
from focus.request import EditResult, Request, SegmentResult


class Oracle:
    """Answers from the record that a request was made of."""

    config = focus_tiny()

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.records: list[Record] = []
        known = tasks.ask

        def remember(record: Record, seed: int) -> Request:
            self.records.append(record)
            return known(record, seed)

        monkeypatch.setattr(tasks, "ask", remember)

    def take(self, requests: Sequence[Request]) -> list[Record]:
        taken, self.records = self.records[: len(requests)], self.records[len(requests) :]
        return taken

    def segment_batch(self, requests: Sequence[Request]) -> list[SegmentResult]:
        return [
            SegmentResult(
                masks=list(r.masks),
                names=[r.answer] * len(r.masks),
                scores=[1.0] * len(r.masks),
                labels=list(r.labels),
                text=r.answer,
                probabilities=[],
            )
            for r in self.take(requests)
        ]

    def chat_batch(self, requests: Sequence[Request]) -> list[str]:
        return [record.answer for record in self.take(requests)]

    def generate_batch(self, requests: Sequence[Request]) -> list[np.ndarray]:
        return [r.target for r in self.take(requests) if r.target is not None]

    def edit_batch(self, requests: Sequence[Request]) -> list[EditResult]:
        results = []
        for record in self.take(requests):
            assert record.target is not None
            image = Image.fromarray(record.target)
            results.append(
                EditResult(image=image, mask=record.masks[0], text=record.answer, raw=image)
            )
        return results


@pytest.mark.parametrize("split", ["val", "test_unseen"])
def test_an_oracle_is_perfect(monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    wanted = [name for name in tasks.MEASURES if name != "tokenizer"]
    oracle = Oracle(monkeypatch)
    figures = tasks.evaluate(oracle, split=split, seed=5, num=8, tasks=wanted)  # type: ignore[arg-type]
    assert figures.pop("generation_score") >= 0.95
    assert figures["referring_miou"] == figures["class_miou"] == figures["vqa_accuracy"] == 1
    assert set(figures["interactive_iou"].values()) == {1.0}
    assert figures["editing_success"] == figures["editing_mask_miou"] == 1


def test_an_unchanged_picture_is_hardly_ever_an_edit() -> None:
    """Only a shape replaced by a near one of its own colour changes too few pixels to tell."""
    records = [sample("editing", "val", 0, index) for index in range(60)]
    idle = [
        record.kind
        for record in records
        if record.image is not None
        and record.target is not None
        and edit_succeeds(record.image, record.target, record.masks[0])
    ]
    assert set(idle) <= {"replace"} and len(idle) <= 0.05 * len(records)


def test_overlap_measures_by_hand() -> None:
    a, b = np.zeros((2, 2), bool), np.zeros((2, 2), bool)
    assert iou(a, b) == 1
    a[0], b[:, 0] = True, True
    assert iou(a, b) == pytest.approx(1 / 3)
    assert cumulative_iou([(a, b), (a, a)]) == pytest.approx(3 / 5)
    assert class_miou([{"x": a}], [{"x": b, "y": a}]) == pytest.approx((1 / 3 + 0) / 2)


def test_psnr_and_answers_by_hand() -> None:
    black, grey = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 51, np.uint8)
    assert psnr(black, grey) == pytest.approx(20 * np.log10(5))
    assert psnr(black, black) == float("inf")
    assert answers_match("The Red Circle.", "red circle")
    assert not answers_match("red", "red circle")
