"""The reading stage: what answers are about, where they begin, a pointer that learns to point."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from engine.data.scene_draw import render
from engine.data.scene_model import DIRECT, DataError, allowed_pairs, random_scene, stream
from engine.data.scene_tasks import draft, listed, sample, scene_of, subjects
from engine.data.source import draw_records
from engine.data.words import text_rows, tiny_vocabulary
from engine.run import Run
from engine.runs import find_run
from engine.stages.align import align, centred_words, spoken
from engine.stages.answers import answer_starts
from engine.stages.pointing import ReadingModel, candidate_ends
from engine.stages.reading import ReadingStage, look_nearby
from engine.stages.stage import Micro
from focus.batch import IGNORE
from focus.inputs import collate, to_pictures
from focus.model import FocusModel
from focus.presets import focus_tiny
from tests.engine.pointing import fitted_loss

CONFIG = focus_tiny()
GRID = (8, 8)


@pytest.mark.parametrize("task", ["referring", "interactive", "class"])
def test_subjects_cover_the_cells_of_the_masks(task: str) -> None:
    for index in range(6):
        record = sample(task, "train", 3, index, 128)  # type: ignore[arg-type]
        (about,) = subjects(record.id, GRID)
        plan, _ = draft(task, "train", 3, index)
        if task == "interactive":
            assert about.sum() > 0 and 1 <= len(plan.regions) <= len(plan.scene.objects)
            assert len(draft(task, "val", 3, index)[0].regions) in (1, 2)
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
    run = find_run("focus_tiny_seeing")
    extra = {**run.extra, "shards": "live", "tasks_per_step": 1, "spread": 0.1, "align": 0}
    extra["point_weight"] = 1.0
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
    loss = fitted_loss(model, model.pointer, lambda: model.point(drawn.batch, drawn.about))
    # A guess among all cells costs about 3, one among the cells of a picture's objects about 1.
    assert float(terms["vqa/point"].detach()) > 2 and loss < 1


def test_mask_queries_learn_to_point_at_what_they_segment() -> None:
    torch.manual_seed(0)
    run, stage = reading_run(), ReadingStage()
    run = dataclasses.replace(run, extra={**run.extra, "mask_layer": 4})
    model = stage.build(run)
    assert isinstance(model, ReadingModel) and model.mask_pointer is not None
    assert "vqa/mask_point" not in stage.losses(
        model, stage.batches(run, 0, Micro(number=0, task="vqa", size=2)), 0
    )
    drawn = stage.batches(run, 0, Micro(number=0, task="interactive", size=4))
    before = stage.losses(model, drawn, 0)["interactive/mask_point"]
    before.backward()
    reached = [layer.self_attn.q_proj.weight.grad is not None for layer in model.trunk.layers]
    assert reached == [True] * 4 + [False] * 2
    optimizer = torch.optim.AdamW(model.trunk.parameters(), lr=1e-3)
    for _ in range(12):
        optimizer.zero_grad()
        loss = stage.losses(model, drawn, 0)["interactive/mask_point"]
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.8 * float(before.detach())


def test_candidates_learn_to_point_at_what_they_name() -> None:
    torch.manual_seed(0)
    run, stage = reading_run(), ReadingStage()
    run = dataclasses.replace(run, extra={**run.extra, "class_layer": 2})
    model = stage.build(run)
    assert isinstance(model, ReadingModel) and model.class_pointer is not None
    drawn = stage.batches(run, 0, Micro(number=0, task="class", size=4))
    listed_cells = drawn.listed
    assert listed_cells is not None
    terms = stage.losses(model, drawn, 0)
    loss = fitted_loss(
        model, model.class_pointer, lambda: model.point_classes(drawn.batch, listed_cells)
    )
    assert float(terms["class/class_point"].detach()) > 2 and loss < 1.2
    other = stage.batches(run, 0, Micro(number=0, task="referring", size=2))
    assert other.listed is None and "referring/class_point" not in stage.losses(model, other, 0)


def test_what_candidates_name_lies_where_the_masks_of_their_label_do() -> None:
    vocabulary = tiny_vocabulary(CONFIG)
    records = [sample("class", "train", 3, i, 128) for i in range(6)]
    batch = collate(records, CONFIG, vocabulary, seed=0)
    ends = candidate_ends(batch.condition, max(len(r.classes) for r in records))
    for row, record in enumerate(records):
        cells = listed(record.id, GRID)
        assert cells.shape == (len(record.classes), 64)
        for label, words in enumerate(record.classes):
            masks = [m for m, of in zip(record.masks, record.labels, strict=True) if of == label]
            union = np.any(masks, axis=0) if masks else np.zeros((128, 128), bool)
            exact = union.reshape(8, 16, 8, 16).mean((1, 3)).reshape(-1)
            assert np.abs(cells[label] - exact).max() < 0.2
            assert bool(cells[label].any()) == bool(masks)
            end = int(ends[row, label])
            expected = [vocabulary.encode(words)[-1], vocabulary.seg_id]
            assert batch.input_ids[row, end - 1 : end + 1].tolist() == expected
            assert int(batch.condition[row, end]) == label
    assert listed(sample("referring", "train", 3, 0, 32).id, GRID).shape == (0, 64)


def test_a_fresh_trunk_tells_its_text_rows_apart() -> None:
    run = reading_run()
    extra = {**run.extra, "afresh": True, "spread": 0.0}
    model = ReadingStage().build(dataclasses.replace(run, extra=extra))
    assert isinstance(model, ReadingModel)
    words = text_rows(tiny_vocabulary(CONFIG))
    rows = model.front.token_embedding.weight[:words].detach()
    assert 0.095 < float(rows.std()) < 0.105
    near = torch.nn.functional.normalize(rows, dim=1)
    assert float((near @ near.T - torch.eye(words)).abs().max()) < 0.5
    down = model.trunk.layers[2].mlp.down_proj.weight
    assert abs(float(down.detach().std()) * down.shape[1] ** 0.5 - 1) < 0.05


def test_direct_questions_name_what_they_are_about_by_its_looks() -> None:
    nearby = (
        "left",
        "right",
        "above",
        "below",
        "top",
        "bottom",
        "between",
        "largest",
        "background",
    )
    for index in range(40):
        record = sample("vqa", DIRECT, 0, index, 32)
        asked = [record.text, *(question for question, _ in record.turns)]
        assert len(asked) > 2 and not any(word in text for text in asked for word in nearby)
        assert len(subjects(record.id, GRID)) == len(asked)
        assert all(o.pair in allowed_pairs("train") for o in scene_of(record.id).objects)
    run = dataclasses.replace(find_run("focus_tiny_reading"), extra={"direct": True})
    drawn = draw_records(run, 3, Micro(number=0, task="vqa", size=2))
    assert [r.id.rsplit("-", 3)[0] for r in drawn] == [DIRECT] * 2


def influence(model: FocusModel, distance: int) -> float:
    """How much the first layer's last state listens to a token that far back."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 256, CONFIG.llm.dim, generator=generator)
    tokens = (0.05 * tokens).requires_grad_(True)
    states = model.trunk.layers[0](*layer_inputs(model, tokens))
    states[0, -1].square().sum().backward()
    assert tokens.grad is not None
    return float(tokens.grad[0, -1 - distance].norm())


def layer_inputs(model: FocusModel, tokens: torch.Tensor) -> tuple[object, ...]:
    """Return what the trunk passes to its first layer."""
    seen: list[tuple[object, ...]] = []
    hook = model.trunk.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    model.trunk(tokens)
    hook.remove()
    return seen[0]


def test_heads_that_look_nearby_listen_to_the_last_words() -> None:
    torch.manual_seed(0)
    model = FocusModel(CONFIG)
    plain = influence(model, 4) / influence(model, 120)
    look_nearby(model)
    assert 0.2 < plain < 5
    assert influence(model, 4) / influence(model, 120) > 3 * plain


def test_alignment_lets_visual_tokens_say_what_they_show() -> None:
    torch.manual_seed(0)
    model, vocabulary = FocusModel(CONFIG), tiny_vocabulary(CONFIG)
    torch.nn.init.normal_(model.front.token_embedding.weight, std=0.1)
    words = centred_words(model.front.token_embedding.weight.detach(), vocabulary)
    scenes = [random_scene(stream("align", 0, i), "train") for i in range(24)]
    meant = torch.stack([spoken(scene, vocabulary, GRID).double() @ words for scene in scenes])

    def agreement() -> float:
        """Mean cosine of projected tokens and what lies under them."""
        images = [render(scene, CONFIG.hierarchical.image_size)[0] for scene in scenes]
        with torch.no_grad():
            told = model.front.encode(to_pictures(images, CONFIG)).fused.projected.double()
        pair = (told - told.mean((0, 1)), meant - meant.mean((0, 1)))
        return float(torch.cosine_similarity(*pair, dim=-1).mean())

    before = agreement()
    align(model, vocabulary, count=24, share=2.0)
    assert abs(before) < 0.1 and agreement() > 0.3  # encoders with random weights


def test_tokens_say_the_words_for_what_they_show() -> None:
    vocabulary = tiny_vocabulary(CONFIG)
    scene = draft("vqa", "train", 2, 7)[0].scene
    said = spoken(scene, vocabulary, GRID)
    assert said.shape == (64, text_rows(vocabulary))
    for item in scene.objects:
        if any(o.depth > item.depth for o in scene.objects):
            continue  # something may lie in front
        cell = int(item.y * 8) * 8 + int(item.x * 8)
        (row,) = vocabulary.encode(" " + item.colour)
        if item.size == "large" and item.shape in ("circle", "square", "diamond"):
            assert said[cell, row] > 0.9
    # Three words of an object, three of a backdrop of two words, two of one: never more.
    assert 1.9 < float(said.sum(1).min()) and float(said.sum(1).max()) < 3.1


def test_spelled_pictures_need_no_encoder() -> None:
    torch.manual_seed(0)
    run, stage = find_run("focus_tiny_reading"), ReadingStage()
    run = dataclasses.replace(run, init_from=None, extra={**run.extra, "shards": "live"})
    model = stage.build(run)
    drawn = stage.batches(run, 0, Micro(number=0, task="vqa", size=3))
    for encoder in (model.front.vanilla, model.front.hierarchical):  # type: ignore[union-attr]
        encoder.register_forward_hook(lambda *_: pytest.fail("an encoder ran"))  # type: ignore[union-attr]
    terms = stage.losses(model, drawn, 0)
    assert set(terms) == {"vqa/words", "vqa/point"}
    sum(terms.values()).backward()  # type: ignore[union-attr]
    table = model.front.token_embedding.weight  # type: ignore[union-attr]
    assert table.grad is not None and bool(table.grad.isfinite().all())  # type: ignore[union-attr]
