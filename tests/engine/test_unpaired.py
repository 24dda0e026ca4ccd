"""Words left out of an answer's softmax: those that training never pairs with what is there."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from engine.data.records import Record
from engine.data.scene_model import COLOURS, HELD_OUT, SHAPES, allowed_pairs
from engine.data.scene_tasks import pairs_asked, pairs_segmented, sample, scene_of
from engine.data.words import tiny_vocabulary
from engine.runs import find_run
from engine.stages.reading import ReadingStage
from engine.stages.stage import Micro
from engine.stages.unpaired import unpaired, unpaired_classes, unpaired_masks, without
from focus.batch import IGNORE
from focus.inputs import collate
from focus.losses import language_loss
from focus.presets import focus_tiny
from focus.segment.predictor import Prediction

CONFIG = focus_tiny()
VOCABULARY = tiny_vocabulary(CONFIG)
WORDS = {VOCABULARY.encode(word)[0]: word for word in (*COLOURS, *SHAPES)}


@pytest.mark.parametrize("task", ["vqa", "referring", "interactive", "class", "editing"])
def test_what_is_left_out_never_stands_beside_the_other_word_in_training(task: str) -> None:
    records = [sample(task, "train", 4, i, 128) for i in range(12)]  # type: ignore[arg-type]
    batch = collate(records, CONFIG, VOCABULARY, seed=0)
    found = unpaired(batch, records, VOCABULARY)
    assert bool((found >= 0).any())
    for row, t in (found >= 0).nonzero().tolist():
        if set(records[row].classes) & set(SHAPES):
            continue  # a list of mere shapes has a rule of its own, below
        told, left_out = WORDS[int(batch.labels[row, t])], WORDS[int(found[row, t])]
        assert told != left_out and (told in COLOURS) == (left_out in COLOURS)
        here, never = (
            {b if a == word else a for a, b in pairs if word in (a, b)}
            for word, pairs in ((told, allowed_pairs("train")), (left_out, HELD_OUT))
        )
        assert here & never  # what the told word may stand beside and the one left out may not


def test_names_leave_out_by_their_own_words_and_answers_by_the_object() -> None:
    record = sample("referring", "train", 4, 0, 128)
    batch = collate([record], CONFIG, VOCABULARY, seed=0)
    found = unpaired(batch, [record], VOCABULARY)[0]
    colour, shape = record.answer.split()[-2:]
    at = {
        WORDS[int(batch.labels[0, t])]: WORDS[int(found[t])] for t in (found >= 0).nonzero()[:, 0]
    }
    assert set(at) == {colour, shape}
    assert (colour, at[shape]) in HELD_OUT and (at[colour], shape) in HELD_OUT
    assert bool((found[batch.labels[0] == IGNORE] == -1).all())
    single = 0
    for index in range(20):
        record = sample("vqa", "train", 4, index, 128)
        batch = collate([record], CONFIG, VOCABULARY, seed=0)
        left = unpaired(batch, [record], VOCABULARY)[0].tolist()
        answers = [record.answer, *(answer for _, answer in record.turns)]
        for answer, pairs in zip(answers, pairs_asked(record.id), strict=True):
            if answer in COLOURS and len(pairs) == 1:
                (never,) = [c for c, s in HELD_OUT if s == pairs[0][1]]
                assert VOCABULARY.encode(never)[0] in left
                single += 1
    assert single > 10


def shape_lists(num: int) -> list[Record]:
    found = (sample("class", "train", 4, i, 128) for i in range(200))
    return [r for r in found if set(r.classes) <= set(SHAPES)][:num]


def test_of_a_list_of_shapes_the_absent_one_of_a_held_out_pair_is_left_out() -> None:
    records = shape_lists(20)
    batch = collate(records, CONFIG, VOCABULARY, seed=0)
    words, classes = unpaired(batch, records, VOCABULARY), unpaired_classes(records)
    assert classes is not None and bool(classes.any()) and not bool(classes.all())
    for row, record in enumerate(records):
        pairs = [o.pair for o in scene_of(record.id).objects]
        expected = {
            s
            for s in record.classes
            if s not in {shape for _, shape in pairs}
            and any((colour, s) in HELD_OUT for colour, _ in pairs)
        }
        left_out = {s for s, k in zip(record.classes, classes[row].tolist(), strict=False) if k}
        assert left_out == expected
        assert not bool(classes[row, len(record.classes) :].any())
        at = words[row] >= 0
        assert {WORDS[int(k)] for k in words[row][at]} <= expected
        assert bool(at.any()) == bool(expected and record.answer)
    pairs_only = [sample("class", "train", 4, i, 128) for i in range(12)]
    kept = unpaired_classes([r for r in pairs_only if not set(r.classes) <= set(SHAPES)])
    assert kept is not None and not bool(kept.any())
    assert unpaired_classes([sample("vqa", "train", 4, 0, 32)]) is None


def test_the_query_of_a_mask_leaves_out_the_shape_never_seen_in_its_colour() -> None:
    records = [sample("class", "train", 4, i, 128) for i in range(60)]
    found = unpaired_masks(records)
    batch = collate(records, CONFIG, VOCABULARY, seed=0)
    assert found is not None and batch.mask_labels is not None
    assert found.shape == batch.mask_labels.shape
    named = 0
    for row, record in enumerate(records):
        pairs = pairs_segmented(record.id)
        assert len(pairs) == len(record.masks)
        for number, (colour, shape) in enumerate(pairs):
            label = record.classes[record.labels[number]]
            assert label in (shape, f"{colour} {shape}")
            left_out = int(found[row, number])
            if left_out >= 0:
                assert (colour, record.classes[left_out]) in HELD_OUT
                named += 1
            else:
                assert not any((colour, s) in HELD_OUT for s in record.classes)
        assert bool((found[row, len(pairs) :] == -1).all())
    assert named > 10
    assert unpaired_masks([sample("vqa", "train", 4, 0, 32)]) is None


def test_queries_learn_nothing_of_a_candidate_left_out() -> None:
    scores = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    masks, embeddings = torch.zeros(2, 5, 4, 4), torch.zeros(2, 5, 8)
    given = Prediction(
        masks=masks, scores=scores, embeddings=embeddings, auxiliary=[(masks, 2 * scores)]
    )
    found = without(given, torch.tensor([[False, True, False], [False, False, False]]))
    assert bool((found.scores.softmax(-1)[0, :, 1] == 0).all())
    assert bool((found.auxiliary[0][1].softmax(-1)[0, :, 1] == 0).all())
    (found.scores.logsumexp(-1).sum() + found.auxiliary[0][1].logsumexp(-1).sum()).backward()
    assert scores.grad is not None and bool((scores.grad[0, :, 1] == 0).all())
    assert bool((scores.grad[0, :, [0, 2, 3]] > 0).all()) and bool((scores.grad[1] > 0).all())


def test_the_loss_is_that_over_the_other_words() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, 8, generator=generator, requires_grad=True)
    table = torch.randn(11, 8, generator=generator, requires_grad=True)
    labels = torch.tensor([[1, 4, IGNORE], [9, 2, 0]])
    without = torch.tensor([[3, -1, 5], [-1, 7, -1]])
    logits = (hidden @ table.T).detach().double()
    expected = []
    for row, t in (labels != IGNORE).nonzero().tolist():
        kept = [k for k in range(11) if k != int(without[row, t])]
        expected.append(logits[row, t, kept].logsumexp(0) - logits[row, t, labels[row, t]])
    loss = language_loss(hidden, labels, table, without=without)
    assert loss.item() == pytest.approx(float(torch.stack(expected).mean()), rel=1e-6)
    loss.backward()  # type: ignore[no-untyped-call]
    assert table.grad is not None and bool(table.grad.isfinite().all())
    only = language_loss(hidden[:1, :1], labels[:1, :1], table, without=without[:1, :1])
    (alone,) = torch.autograd.grad(only, table)
    assert bool((alone[3] == 0).all()) and bool((alone[4] != 0).any())


def test_a_split_table_refuses() -> None:
    class Split:
        def loss(self, *_: torch.Tensor | None) -> torch.Tensor:
            return torch.zeros(())

    with pytest.raises(ValueError, match="no `without`"):
        language_loss(
            torch.zeros(1, 1, 2),
            torch.zeros(1, 1, dtype=torch.int64),
            Split(),  # type: ignore[arg-type]
            without=torch.zeros(1, 1, dtype=torch.int64),
        )


def test_the_run_asks_for_it() -> None:
    run = find_run("focus_tiny_seeing")
    micro = Micro(number=0, task="referring", size=2)
    found = {}
    for asked in (False, True):
        extra = {**run.extra, "shards": "live", "align": 0, "unpaired": asked}
        stage = ReadingStage()
        torch.manual_seed(0)  # the biases too
        model = stage.build(dataclasses.replace(run, init_from=None, extra=extra))
        for parameter in model.parameters():
            parameter.data.normal_(std=0.02) if parameter.dim() > 1 else None
        batch = stage.batches(stage.run, 1, micro)  # type: ignore[arg-type]
        assert (batch.unpaired is not None) == asked
        torch.manual_seed(0)
        found[asked] = stage.losses(model, batch, 1)["referring/words"].item()
    assert found[True] < found[False]  # fewer words share the same chance
