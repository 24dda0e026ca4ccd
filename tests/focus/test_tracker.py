"""Identities through frames."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from focus.segment.predictor import SegmentError
from focus.segment.tracker import (
    Tracker,
    TrackerConfig,
    bi_softmax,
    contrastive_loss,
    mask_iou,
    propagate,
    suppress,
)

FACES = torch.eye(4) * 8  # four objects with embeddings that cannot be confused


def separate(count: int) -> Tensor:
    masks = torch.zeros(count, 4, 16, dtype=torch.bool)
    for number in range(count):
        masks[number, :, 4 * number : 4 * number + 4] = True
    return masks


def test_bi_softmax_is_half_row_half_column() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 5), torch.randn(4, 5)
    logits = a @ b.T
    expected = 0.5 * (logits.exp() / logits.exp().sum(1, keepdim=True))
    expected = expected + 0.5 * (logits.exp() / logits.exp().sum(0, keepdim=True))
    torch.testing.assert_close(bi_softmax(a, b), expected)


def test_objects_keep_their_numbers_when_the_order_changes() -> None:
    tracker = Tracker()
    scores = torch.full((3,), 0.9)
    assert tracker.update(FACES[:3], scores, separate(3)).tolist() == [0, 1, 2]
    order = torch.tensor([2, 0, 1])
    noisy = FACES[order] + 0.3
    assert tracker.update(noisy, scores, separate(3)).tolist() == [2, 0, 1]


def test_a_lost_object_comes_back_within_memory_and_is_new_after_it() -> None:
    scores = torch.full((2,), 0.9)
    for absent, number in ((3, 1), (11, 2)):
        tracker = Tracker(config=TrackerConfig(memory=10))
        tracker.update(FACES[:2], scores, separate(2))
        for _ in range(absent):
            assert tracker.update(FACES[:1], scores[:1], separate(1)).tolist() == [0]
        assert tracker.update(FACES[:2], scores, separate(2)).tolist() == [0, number]


def test_thresholds_decide_who_starts_a_track() -> None:
    tracker = Tracker()
    first = tracker.update(FACES[:2], torch.tensor([0.3, 0.1]), separate(2))
    assert first.tolist() == [0, -1]
    later = tracker.update(FACES[[0, 2, 3]], torch.tensor([0.3, 0.4, 0.6]), separate(3))
    assert later.tolist() == [0, -1, 1]


def test_labels_separate_objects_and_momentum_moves_embeddings() -> None:
    tracker = Tracker(config=TrackerConfig(momentum=0.25))
    score = torch.tensor([0.9])
    tracker.update(FACES[:1], score, separate(1), torch.tensor([0]))
    assert tracker.update(FACES[:1], score, separate(1), torch.tensor([1])).tolist() == [1]
    tracker.update(FACES[:1] + 4, score, separate(1), torch.tensor([0]))
    torch.testing.assert_close(tracker.tracks[0].embedding, FACES[0] + 1)


def test_doubles_are_suppressed() -> None:
    masks = separate(2)
    doubled = torch.cat([masks, masks[:1]])
    torch.testing.assert_close(mask_iou(doubled)[2], torch.tensor([1.0, 0.0, 1.0]))
    assert suppress(doubled, torch.tensor([0.5, 0.6, 0.9]), 0.7).tolist() == [2, 1]
    numbers = Tracker().update(FACES[[0, 1, 0]], torch.tensor([0.5, 0.6, 0.9]), doubled)
    assert numbers.tolist() == [-1, 1, 0]


def test_empty_frames_pass() -> None:
    tracker = Tracker()
    assert tracker.update(FACES[:0], torch.zeros(0), separate(0)).tolist() == []
    with pytest.raises(SegmentError, match="got 1, 2 and 1"):
        tracker.update(FACES[:1], torch.zeros(2), separate(1))


def test_contrastive_loss_equals_the_double_sum_and_falls_when_learnt() -> None:
    torch.manual_seed(0)
    key, reference = torch.randn(3, 6), torch.randn(4, 6)
    same = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    logits = key @ reference.T
    terms = []
    for i in range(2):
        pairs = [
            (logits[i, n] - logits[i, p]).exp()
            for p in same[i].nonzero()[:, 0]
            for n in (~same[i]).nonzero()[:, 0]
        ]
        terms.append((1 + torch.stack(pairs).sum()).log())
    cosine = torch.nn.functional.cosine_similarity(key[:, None], reference[None], dim=-1)
    expected = torch.stack(terms).mean() + (cosine - same.float()).square().mean()
    torch.testing.assert_close(contrastive_loss(key, reference, same), expected)
    perfect = contrastive_loss(FACES, FACES, torch.eye(4, dtype=torch.bool))
    assert perfect.item() < 1e-3


def test_contrastive_loss_without_pairs_has_finite_gradients() -> None:
    key = torch.randn(2, 3, requires_grad=True)
    loss = contrastive_loss(key, torch.randn(2, 3), torch.zeros(2, 2, dtype=torch.bool))
    loss.backward()
    assert key.grad is not None
    assert torch.isfinite(key.grad).all()


def test_propagation_runs_both_ways_from_the_annotated_frame() -> None:
    visits: list[tuple[int, int]] = []

    def step(previous: int, masks: Tensor, frame: int) -> Tensor:
        visits.append((previous, frame))
        return masks.roll(frame - previous, dims=-1)

    start = separate(1)
    found = propagate([0, 1, 2, 3], 1, start, step)
    assert visits == [(1, 2), (2, 3), (1, 0)]
    for frame, masks in enumerate(found):
        torch.testing.assert_close(masks, start.roll(frame - 1, dims=-1))
    with pytest.raises(SegmentError, match="between 0 and 3"):
        propagate([0, 1, 2, 3], 4, start, step)
