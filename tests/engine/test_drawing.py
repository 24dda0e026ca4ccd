"""Drawing: where a cell comes from, the pointer that learns it, codes hidden from what follows."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from engine.data.scene_model import DataError
from engine.data.scene_tasks import plan_of, sample, subjects, touched
from engine.data.words import tiny_vocabulary
from engine.run import Run
from engine.runs import find_run
from engine.stages.drawing import about_to_draw, before_drawing, origins, spans
from engine.stages.multimodal import MultimodalStage, blank_codes
from engine.stages.pointing import ReadingModel
from engine.stages.reading import ReadingStage
from engine.stages.stage import Micro
from focus.batch import IGNORE, Batch, Source
from focus.inputs import collate
from focus.presets import focus_tiny
from focus.sequence import fill_codes, written_codes
from focus.tokenizer.dual import Codes
from tests.engine.pointing import fitted_loss

CONFIG = focus_tiny()
VOCABULARY = tiny_vocabulary(CONFIG)
GRID = (8, 8)


def batch_of(task: str, count: int = 6) -> Batch:
    records = [sample(task, "train", 2, i, 64) for i in range(count)]  # type: ignore[arg-type]
    return collate(records, CONFIG, VOCABULARY, seed=0)


def random_codes(count: int) -> Codes:
    draw = torch.Generator().manual_seed(0)
    return Codes(
        semantic=torch.randint(0, 256, (count, *GRID), generator=draw),
        pixel=torch.randint(0, 1024, (count, *GRID), generator=draw),
    )


def test_a_caption_says_what_every_cell_shows() -> None:
    for index in range(12):
        record = sample("generation", "train", 2, index, 64)
        plan = plan_of(record.id, GRID)
        assert plan.kept.max() == 0
        assert all(words in record.text for words, _ in plan.told)
        total = sum(share for _, share in plan.told)
        assert abs(total - 1).max() < 1e-5  # every cell is told, in full


def test_an_edit_says_what_changes_and_keeps_the_rest() -> None:
    kinds = set()
    for index in range(40):
        record = sample("editing", "train", 2, index, 128)
        plan = plan_of(record.id, GRID)
        mask = record.masks[0].reshape(8, 16, 8, 16).mean((1, 3)).reshape(-1)
        kinds.add(record.kind)
        if record.kind == "remove":
            assert plan.told == () and plan.kept[mask > 0.3].sum() == 0
        else:
            ((words, share),) = plan.told
            assert words in record.text and share.max() > 0.1
            assert (plan.kept + share).max() < 1 + 1e-6
        assert plan.kept[mask == 0].min(initial=1) > 0.8  # drawn at half of the mask's size
    assert kinds == {"remove", "replace", "recolour", "move", "background"}


def test_a_mask_query_points_at_all_that_an_edit_touches() -> None:
    for index in range(20):
        record = sample("editing", "train", 2, index, 128)
        exact = record.masks[0].reshape(8, 16, 8, 16).mean((1, 3)).reshape(-1)
        assert abs(touched(record.id, GRID) - exact).max() < 0.25
        if record.kind == "move":
            assert touched(record.id, GRID).sum() > 1.5 * subjects(record.id, GRID)[0].sum()
    for task in ("referring", "interactive", "generation"):
        record = sample(task, "train", 2, 0, 64)  # type: ignore[arg-type]
        assert (touched(record.id, GRID) == subjects(record.id, GRID)[0]).all()


def test_what_draws_nothing_has_no_plan_and_strangers_are_refused() -> None:
    plan = plan_of(sample("vqa", "train", 0, 0, 64).id, GRID)
    assert plan.told == () and plan.kept.max() == 0
    with pytest.raises(DataError, match="of the built-in world"):
        plan_of("coco-000000001", GRID)


def test_spans_finds_every_place_of_a_phrase() -> None:
    assert spans([1, 2, 3, 1, 2, 2], [1, 2]) == [0, 1, 3, 4]
    assert spans([1], [1, 2]) == []


@pytest.mark.parametrize("task", ["generation", "editing"])
def test_origins_point_at_the_words_and_at_the_cells_that_stay(task: str) -> None:
    records = [sample(task, "train", 2, i, 64) for i in range(6)]  # type: ignore[arg-type]
    batch = collate(records, CONFIG, VOCABULARY, seed=0)
    found = origins(batch, records, VOCABULARY, GRID)
    assert found is not None
    assert found.shares.shape == (6, 64, batch.input_ids.shape[1])
    assert float(found.shares[(~before_drawing(batch))[:, None].expand_as(found.shares)].sum()) == 0
    for row, record in enumerate(records):
        plan = plan_of(record.id, GRID)
        for words, share in plan.told:
            cell = int(share.argmax())
            here = (found.shares[row, cell] == float(share[cell])).nonzero()[:, 0]
            here = here[batch.source[row, here] == Source.TOKEN]
            assert words in VOCABULARY.decode(batch.input_ids[row, here].tolist())
        given = batch.source[row] == Source.SEMANTIC
        assert torch.equal(
            found.shares[row][:, given].sum(1), torch.from_numpy(plan.kept) * bool(given.any())
        )
        groups = len(plan.told) + int(plan.kept.max() > 0)
        assert float(found.weight[row].sum()) == pytest.approx(groups)


def test_questions_have_no_origins() -> None:
    records = [sample("vqa", "train", 2, i, 64) for i in range(2)]
    assert origins(collate(records, CONFIG, VOCABULARY), records, VOCABULARY, GRID) is None


def test_codes_are_about_to_be_drawn_where_labels_are_semantic_codes() -> None:
    batch = batch_of("editing")
    filled = fill_codes(batch, random_codes(6), VOCABULARY)
    ids = VOCABULARY.semantic_ids
    assert torch.equal(
        about_to_draw(batch), (filled.labels >= ids.start) & (filled.labels < ids.stop)
    )
    assert bool((about_to_draw(batch).sum(1) == 64).all())


def test_blanked_codes_are_read_as_padding_and_still_taught() -> None:
    batch = batch_of("generation", 64)
    hidden = blank_codes(batch, 0.5, seed=3)
    assert torch.equal(hidden, blank_codes(batch, 0.5, seed=3))
    assert not bool((hidden & ~written_codes(batch)).any())
    chosen = hidden.any(1)
    assert 16 < int(chosen.sum()) < 48
    shares = (hidden & (batch.grid[..., 0] == 0)).sum(1)[chosen] / 64
    assert float(shares.max()) == 1 and 0.4 < float(shares.mean()) < 0.75
    codes = random_codes(64)
    plain = fill_codes(batch, codes, VOCABULARY)
    filled = fill_codes(dataclasses.replace(batch, blank=hidden), codes, VOCABULARY)
    assert torch.equal(filled.labels, plain.labels)
    assert bool((filled.input_ids[hidden] == VOCABULARY.pad_id).all())
    assert torch.equal(filled.input_ids[~hidden], plain.input_ids[~hidden])


def drawing_run() -> Run:
    run = find_run("focus_tiny_seeing")
    extra = {**run.extra, "shards": "live", "align": 0, "point_weight": 1.0, "draw_layer": 2}
    extra |= {"tasks_per_step": 1, "blank_codes": 1.0, "drop_text": 0.0}
    mixture = (("generation", 6),)
    return dataclasses.replace(run, init_from=None, micro_batches=mixture, extra=extra)


def test_a_stage_hides_codes_when_its_run_asks() -> None:
    run, micro = drawing_run(), Micro(number=0, task="generation", size=6)
    batch = MultimodalStage().batches(run, 0, micro)
    assert batch.blank is not None and bool(batch.blank.any(1).all())
    plain = dataclasses.replace(run, extra={**run.extra, "blank_codes": 0.0})
    assert MultimodalStage().batches(plain, 0, micro).blank is None
    question = Micro(number=0, task="vqa", size=2)
    assert MultimodalStage().batches(run, 0, question).blank is None


def test_the_pointer_learns_which_words_tell_a_cell() -> None:
    torch.manual_seed(0)
    run, stage = drawing_run(), ReadingStage()
    model = stage.build(run)
    assert isinstance(model, ReadingModel)
    drawn = stage.batches(run, 0, Micro(number=0, task="generation", size=6))
    terms = stage.losses(model, drawn, 0)
    terms["generation/draw_point"].backward()
    assert model.trunk.layers[1].self_attn.q_proj.weight.grad is not None
    assert model.trunk.layers[2].self_attn.q_proj.weight.grad is None  # behind the pointer
    assert model.draw_pointer is not None
    loss = fitted_loss(
        model, model.draw_pointer, lambda: model.point_words(drawn.batch, drawn.drawn)
    )
    assert loss < 0.5 * float(terms["generation/draw_point"].detach())


def test_records_whose_text_was_dropped_need_not_point() -> None:
    run = drawing_run()
    run = dataclasses.replace(run, extra={**run.extra, "drop_text": 1.0})
    drawn = ReadingStage().batches(run, 0, Micro(number=0, task="generation", size=3))
    assert drawn.drawn is not None and float(drawn.drawn.shares.sum()) == 0
    assert bool((drawn.batch.labels != IGNORE).any())
