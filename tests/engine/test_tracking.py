"""Object embeddings learn from pairs of frames, and keep identities in clips."""

# F frames, I objects, Q queries, D embedding width

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.data.clips import draw_pair
from engine.data.scenes import Clip, clip
from engine.data.source import config_of, draw_records
from engine.data.words import tiny_vocabulary
from engine.run import Run
from engine.runs import find_run
from engine.stages.stage import Micro, find_stage
from focus import Focus
from focus.batch import Batch
from focus.inputs import collate
from focus.segment.loss import tracking_loss
from focus.segment.matcher import match
from focus.segment.predictor import Prediction
from focus.segment.tracker import Tracker, TrackerConfig, bi_softmax
from parallel.optimizer import freeze

SIZE = (128, 128)


def the_run(**extra: object) -> Run:
    run = find_run("focus_tiny_stage3")
    extra = {**run.extra, "tasks_per_step": 1, **extra}
    return dataclasses.replace(run, micro_batches=(("video", 2),), init_from=None, extra=extra)


def test_pairs_show_two_frames_of_one_clip_with_its_objects_numbered() -> None:
    for index in range(6):
        one, two = draw_pair(0, index, SIZE)
        found = clip("train", 0, index, 12, SIZE)
        assert one.id == two.id == found.id and one.classes == two.classes
        assert one.image is not None and two.image is not None
        assert not np.array_equal(one.image, two.image)
        for record in (one, two):
            assert record.image is not None
            (frame,) = (t for t, f in enumerate(found.frames) if np.array_equal(f, record.image))
            assert len(record.objects) == len(record.masks) == len(set(record.objects))
            for number, mask, label in zip(
                record.objects, record.masks, record.labels, strict=True
            ):
                item = found.scenes[0].objects[number]
                assert record.classes[label] == f"{item.colour} {item.shape}"
                assert np.array_equal(mask, found.instances[frame] == number + 1) and mask.any()


def test_a_batch_numbers_objects_over_the_frames_of_each_clip() -> None:
    records = draw_records(the_run(), 0, Micro(number=0, task="video", size=2))
    assert len(records) == 4
    config = config_of(the_run())
    batch = collate(records, config, tiny_vocabulary(config))
    assert batch.task == "class"
    assert batch.mask_objects is not None and batch.mask_labels is not None
    rows = [set(row[row >= 0].tolist()) for row in batch.mask_objects]
    assert rows[0] & rows[1] and rows[2] & rows[3] and not (rows[0] | rows[1]) & (rows[2] | rows[3])
    assert torch.equal(batch.mask_objects >= 0, batch.mask_labels >= 0)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_gradient_reaches_the_embedding_head_when_asked_and_only_then(weight: float) -> None:
    torch.manual_seed(0)
    run = the_run(track_weight=weight)
    stage = find_stage(run.stage)
    model = stage.build(run)
    freeze(model, run.rates)
    model.train()
    terms = stage.losses(model, stage.batches(run, 0, Micro(number=0, task="video", size=2)), 0)
    assert ("video/track" in terms) == bool(weight)
    assert {"video/words", "video/cls", "video/bce", "video/dice"} <= set(terms)
    torch.stack(list(terms.values())).sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("heads.segment.embedding."):
            assert (parameter.grad is not None) == bool(weight)
            assert not weight or float(parameter.grad.abs().sum()) > 0, name  # type: ignore[union-attr]


def test_pictures_of_class_tasks_have_no_tracking_term() -> None:
    run = dataclasses.replace(the_run(track_weight=1.0), micro_batches=(("class", 2),))
    stage = find_stage(run.stage)
    batch = stage.batches(run, 0, Micro(number=0, task="class", size=2))
    assert isinstance(batch, Batch) and batch.mask_objects is None


def squares(*columns: int) -> Tensor:
    """One mask [8, 16] per column."""
    masks = torch.zeros(len(columns), 8, 16, dtype=torch.bool)
    for number, column in enumerate(columns):
        masks[number, 2:6, column : column + 4] = True
    return masks


def test_tracking_loss_compares_matched_queries_of_the_other_frame() -> None:
    """Two frames; queries 1 and 2 draw the objects in one, 2 and 0 in the other."""
    drawn = torch.full((2, 3, 8, 16), -8.0)
    first, second = squares(0, 8), squares(2, 11)
    drawn[0, 1][first[0]], drawn[0, 2][first[1]] = 8.0, 8.0
    drawn[1, 2][second[0]], drawn[1, 0][second[1]] = 8.0, 8.0
    masks = torch.stack([first, second])
    torch.manual_seed(0)
    embeddings = torch.randn(2, 3, 6, requires_grad=True)
    prediction = Prediction(masks=drawn, scores=torch.zeros(2, 3, 2), embeddings=embeddings)
    labels, counts = torch.zeros(2, 2, dtype=torch.int64), torch.tensor([1, 1])

    def loss(objects: list[list[int]]) -> Tensor:
        return tracking_loss(
            prediction, masks, labels, torch.tensor(objects), counts, "class", num_points=64
        )

    def by_hand(key: Tensor, positive: Tensor, negatives: Tensor) -> Tensor:
        return (1 + (negatives @ key - positive @ key).exp().sum()).log()

    one, two = embeddings
    contrast = [
        (by_hand(one[1], two[2], two[:2]) + by_hand(one[2], two[0], two[1:])) / 2,
        (by_hand(two[2], one[1], one[[0, 2]]) + by_hand(two[0], one[2], one[:2])) / 2,
    ]
    own = [one[[1, 2]], two[[2, 0]]]
    other = [two[[2, 0, 1]], one[[1, 2, 0]]]
    truth = torch.eye(2, 3)
    aligned = [
        (torch.cosine_similarity(k[:, None], r[None], dim=-1) - truth).square().mean()
        for k, r in zip(own, other, strict=True)
    ]
    expected = torch.stack([c + a for c, a in zip(contrast, aligned, strict=True)]).mean()
    torch.testing.assert_close(loss([[0, 1], [0, 1]]), expected)
    strangers = loss([[0, 1], [2, 3]])
    strangers.backward()
    assert strangers.item() == 0.0 and embeddings.grad is not None
    assert not embeddings.grad.any()


@pytest.fixture(scope="module")
def model() -> Focus:
    return Focus.from_pretrained("focus-tiny")


@torch.no_grad()
def states_of(model: Focus, found: list[Clip], frames: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Of every clip: last query states [F, Q, D] and the query that draws each object [F, I]."""
    results = []
    for one in found:
        records = []
        for frame in frames:
            names = [f"{o.colour} {o.shape}" for o in one.scenes[0].objects]
            classes = tuple(dict.fromkeys(names))
            masks = one.instances[frame]
            shown = [i for i in range(len(names)) if (masks == i + 1).any()]
            records.append(
                dataclasses.replace(
                    draw_pair(0, 0, SIZE)[0],
                    id=one.id,
                    classes=classes,
                    answer=", ".join(names[i] for i in shown),
                    image=one.frames[frame],
                    masks=tuple(np.asarray(masks == i + 1) for i in shown),
                    labels=tuple(classes.index(names[i]) for i in shown),
                    objects=tuple(shown),
                )
            )
        batch = collate(records, model.config, model.vocabulary)
        hidden, features = model.model(batch)
        assert features is not None
        seen: list[Tensor] = []
        handle = model.model.heads.segment.embedding.register_forward_pre_hook(
            lambda _, given, seen=seen: seen.append(given[0])
        )
        prediction = model.model.heads.predict_masks(hidden, batch, features.maps)
        handle.remove()
        assert batch.masks is not None and batch.mask_labels is not None
        assert batch.num_conditions is not None and batch.mask_objects is not None
        queries = match(
            [(prediction.masks, prediction.scores)],
            batch.masks,
            batch.mask_labels,
            batch.num_conditions,
            "class",
            num_points=256,
        )[0]
        owner = torch.full((len(frames), len(one.scenes[0].objects)), -1)
        for row, record in enumerate(records):
            for column, number in enumerate(record.objects):
                owner[row, number] = queries[row, column]
        results.append((seen[0], owner))
    return results


def right_pairs(head: torch.nn.Module, states: list[tuple[Tensor, Tensor]]) -> float:
    """Share of objects, seen in both frames, that the tracker's similarity rule would continue."""
    right = total = 0
    with torch.no_grad():
        for queries, owner in states:
            both = [i for i in range(owner.shape[1]) if (owner[:, i] >= 0).all()]
            if len(both) < 2:
                continue
            first, last = (head(queries[t])[owner[t, both]] for t in (0, 1))
            similarity = bi_softmax(last, first)
            best = similarity.max(1)
            own = torch.arange(len(both))
            right += int(((best.indices == own) & (best.values > TrackerConfig().match)).sum())
            total += len(both)
    return right / total


def test_a_few_steps_make_tracking_by_embedding_better(model: Focus) -> None:
    """Only the head learns, on training clips; held-out clips tell."""
    learnt = states_of(model, [clip("train", 1, n, 6, SIZE) for n in range(16)], [0, 5])
    held = states_of(model, [clip("val", 1, n, 6, SIZE) for n in range(12)], [0, 5])
    head = copy.deepcopy(model.model.heads.segment.embedding)
    before = right_pairs(head, held)
    optimizer = torch.optim.Adam(head.parameters(), 1e-3)
    torch.manual_seed(0)
    for step in range(60):
        queries, owner = learnt[step % len(learnt)]
        present = owner >= 0
        one_hot = torch.full((*queries.shape[:2], 8, 8), -8.0)
        targets = torch.zeros(*owner.shape, 8, 8, dtype=torch.bool)
        for row, number in present.nonzero().tolist():  # masks that match as the true ones did
            one_hot[row, owner[row, number], number] = 8.0
            targets[row, number, number] = True
        prediction = Prediction(
            masks=one_hot,
            scores=torch.zeros(*queries.shape[:2], 2),
            embeddings=head(queries),
        )
        labels = torch.where(present, 0, -1)
        objects = torch.where(present, torch.arange(owner.shape[1]), -1)
        loss = tracking_loss(
            prediction, targets, labels, objects, torch.ones(2), "class", num_points=128
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = right_pairs(head, held)
    assert after > before + 0.2 and after > 0.6, (before, after)


def crossing() -> tuple[Clip, int]:
    """A clip in which an object hides wholly behind another and comes back, and its number."""
    for index in range(3000):
        found = clip("train", 7, index, 16, (32, 32))
        areas = np.array([[(f == i + 1).sum() for f in found.instances] for i in range(6)])
        for number in range(len(found.scenes[0].objects)):
            gone = areas[number] == 0
            if gone.any() and not gone[0] and not gone[-1]:
                return found, number
    raise AssertionError("no such clip")


def test_the_tracker_survives_crossing_disappearing_and_reappearing_objects() -> None:
    """Masks of a clip's truth, embeddings with noise: identities hold through the crossing."""
    found, hidden = crossing()
    count = len(found.scenes[0].objects)
    rng = torch.Generator().manual_seed(0)
    faces = torch.nn.functional.normalize(torch.randn(count, 16, generator=rng), dim=-1) * 4
    tracker, absent = Tracker(), []
    numbers: dict[int, int] = {}
    for frame in found.instances:
        shown = [i for i in range(count) if (frame == i + 1).any()]
        absent.append(hidden not in shown)
        order = torch.randperm(len(shown), generator=rng).tolist()
        shown = [shown[place] for place in order]
        masks = torch.stack([torch.from_numpy(frame == i + 1) for i in shown])
        noise = torch.randn(len(shown), 16, generator=rng) * 0.2
        told = tracker.update(faces[shown] + noise, torch.full((len(shown),), 0.9), masks)
        for own, number in zip(shown, told.tolist(), strict=True):
            assert numbers.setdefault(own, number) == number, "an identity changed"
    assert len(set(numbers.values())) == len(numbers) == count
    assert any(absent) and not absent[0] and not absent[-1]
