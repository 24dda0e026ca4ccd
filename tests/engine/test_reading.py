"""The reading stage: what answers are about, where they begin, a pointer that learns to point."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from engine.data.scene_model import DataError
from engine.data.scene_tasks import draft, sample, subjects
from engine.data.words import tiny_vocabulary
from engine.run import Run
from engine.runs import find_run
from engine.stages.reading import ReadingModel, ReadingStage, answer_starts
from engine.stages.stage import Micro
from focus.batch import IGNORE
from focus.inputs import collate
from focus.presets import focus_tiny

CONFIG = focus_tiny()
GRID = (8, 8)


@pytest.mark.parametrize("task", ["referring", "interactive", "class"])
def test_subjects_cover_the_cells_of_the_masks(task: str) -> None:
    for index in range(6):
        record = sample(task, "train", 3, index, 128)  # type: ignore[arg-type]
        (about,) = subjects(record.id, GRID)
        plan, _ = draft(task, "train", 3, index)
        if task == "interactive":
            assert about.sum() > 0 and len(plan.regions) in (1, 2)
            continue
        union = np.any(record.masks, axis=0) if record.masks else np.zeros((128, 128), bool)
        exact = union.reshape(8, 16, 8, 16).mean((1, 3)).reshape(-1)
        assert np.abs(about - exact).max() < 0.2  # the same scene drawn at a quarter of the size
        assert abs(about.sum() - exact.sum()) < 0.08 * max(1.0, exact.sum())


def test_questions_are_about_what_they_name() -> None:
    seen: set[str] = set()
    for index in range(60):
        plan, _ = draft("vqa", "train", 5, index)
        assert len(plan.about) == 1 + len(plan.turns)
        questions = [(plan.text, plan.answer), *plan.turns]
        for (question, answer), about in zip(questions, plan.about, strict=True):
            objects = [plan.scene.objects[i] for i in about]
            if question.startswith(("how many", "count")):
                assert len(about) == int(answer)
                seen.add("count")
            elif answer in ("yes", "no") and question.startswith("is there"):
                assert bool(about) == (answer == "yes")
                seen.add("exists")
            elif "colour" in question and "back" not in question and "behind" not in question:
                assert [o.colour for o in objects] == [answer]
                seen.add("colour")
            elif question.startswith(("what shape", "which shape")):
                assert [o.shape for o in objects] == [answer]
                seen.add("shape")
    assert seen == {"count", "exists", "colour", "shape"}


def test_a_record_of_elsewhere_is_refused() -> None:
    with pytest.raises(DataError, match="of the built-in world"):
        subjects("coco-000000001", GRID)


def test_answers_begin_where_labels_do() -> None:
    records = [sample("vqa", "train", 1, i, 128) for i in range(3)]
    batch = collate(records, CONFIG, tiny_vocabulary(CONFIG), seed=0)
    starts = answer_starts(batch, 12)
    vocabulary = tiny_vocabulary(CONFIG)
    for row, record in enumerate(records):
        answers = [record.answer, *(answer for _, answer in record.turns)]
        places = [int(p) for p in starts[row] if p >= 0]
        assert len(places) == len(answers)
        for place, answer in zip(places, answers, strict=True):
            length = len(vocabulary.encode(answer))
            said = batch.labels[row, place : place + length]
            assert bool((said != IGNORE).all())
            assert vocabulary.decode(said.tolist()).strip() == answer


def reading_run() -> Run:
    run = find_run("focus_tiny_reading")
    extra = {**run.extra, "shards": "live", "tasks_per_step": 1}
    return dataclasses.replace(run, init_from=None, micro_batches=(("vqa", 4),), extra=extra)


def test_the_pointer_learns_to_point_and_text_rows_move_apart() -> None:
    torch.manual_seed(0)
    run, stage = reading_run(), ReadingStage()
    model = stage.build(run)
    assert isinstance(model, ReadingModel)
    words = model.front.token_embedding.weight[: min(tiny_vocabulary(CONFIG).structure.values())]
    assert 0.08 < float(words.detach().std()) < 0.12
    drawn = stage.batches(run, 0, Micro(number=0, task="vqa", size=4))
    assert drawn.about.shape[::2] == (4, 64)
    terms = stage.losses(model, drawn, 0)
    terms["vqa/point"].backward()
    assert model.trunk.layers[0].self_attn.q_proj.weight.grad is not None
    assert model.trunk.layers[4].self_attn.q_proj.weight.grad is None  # behind the pointer
    assert model.states is not None
    model.states = model.states.detach()
    optimizer = torch.optim.AdamW(model.pointer.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model.point(drawn.batch, drawn.about)
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # A guess among all cells costs about 3, one among the cells of a picture's objects about 1.
    assert float(terms["vqa/point"].detach()) > 2 and float(loss.detach()) < 1
