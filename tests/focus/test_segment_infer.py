"""Decoding rules on predictions whose right answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from focus.geometry import Letterbox
from focus.segment.infer import (
    Row,
    Thresholds,
    decode,
    instances,
    interactive,
    mask_quality,
    panoptic,
    referring,
    row_of,
    semantic,
)
from focus.segment.predictor import Prediction, SegmentError

GRID = 8


def square(top: int, left: int, size: int, sharp: float = 8.0) -> Tensor:
    logits = torch.full((GRID, GRID), -sharp)
    logits[top : top + size, left : left + size] = sharp
    return logits


def row(masks: list[Tensor], scores: list[list[float]]) -> Row:
    return Row(
        masks=torch.stack(masks),
        scores=torch.tensor(scores),
        embeddings=torch.arange(len(masks)).float()[:, None],
    )


def test_referring_takes_the_best_of_score_and_mask_quality() -> None:
    vague = square(0, 0, 4, sharp=0.2)
    sharp = square(4, 4, 4)
    found = referring(row([vague, sharp], [[2.0], [1.5]]))
    assert found.queries.tolist() == [1]
    assert found.masks.shape == (1, 4 * GRID, 4 * GRID)
    assert found.masks[0, 20:30, 20:30].all()
    assert not found.masks[0, :12].any()
    assert found.embeddings.tolist() == [[1.0]]
    expected = torch.tensor(1.5).sigmoid() * mask_quality(sharp[None])
    torch.testing.assert_close(found.scores, expected)


def test_union_joins_all_above_the_threshold_or_falls_back() -> None:
    made = row([square(0, 0, 3), square(5, 5, 3), square(0, 5, 3)], [[2.0], [1.0], [-1.0]])
    joined = referring(made, rule="union").masks[0]
    assert joined[4, 4]
    assert joined[28, 28]
    assert not joined[4, 28]
    strict = referring(made, rule="union", thresholds=Thresholds(union=0.99))
    assert strict.queries.tolist() == [0]
    assert not strict.masks[0, 28, 28]


def test_interactive_answers_region_by_region() -> None:
    scores = [[3.0, 2.5], [2.0, 1.0], [0.0, 0.0]]
    made = row([square(0, 0, 3), square(5, 5, 3), square(0, 5, 3)], scores)
    assert interactive(made).queries.tolist() == [0, 0]
    unique = interactive(made, unique=True)
    assert unique.queries.tolist() == [0, 1]
    assert unique.labels.tolist() == [0, 1]
    assert interactive(made, unique=True, candidates=1).queries.tolist() == [0, 0]


def test_interactive_wants_the_mask_at_the_prompt() -> None:
    masks = [square(0, 0, 3), square(5, 5, 3), square(0, 5, 3, sharp=0.5)]
    made = row(masks, [[3.0, 3.0], [2.5, 2.5], [2.0, 2.0]])
    points = torch.tensor([[[0.75, 0.8], [0.85, 0.8]], [[0.2, 0.2], [0.15, 0.1]]])
    assert interactive(made).queries.tolist() == [0, 0]
    found = interactive(made, points=points)
    assert found.queries.tolist() == [1, 0]
    # The score says how sure the mask is, not how well it was chosen.
    expected = torch.tensor([2.5, 3.0]).sigmoid() * mask_quality(made.masks)[[1, 0]]
    torch.testing.assert_close(found.scores, expected)
    batch = Prediction(
        masks=made.masks[None], scores=made.scores[None], embeddings=made.embeddings[None]
    )
    assert decode(batch, "region", [2], points=points[None])[0].queries.tolist() == [1, 0]


def test_semantic_map_names_every_pixel_or_none() -> None:
    made = row([square(0, 0, 4), square(4, 4, 4)], [[6.0, 0.0, 0.0], [0.0, 6.0, 0.0]])
    found = semantic(made)
    assert found[8, 8] == 0
    assert found[24, 24] == 1
    assert found[8, 24] == -1
    everywhere = semantic(made, thresholds=Thresholds(background=None))
    assert int(everywhere.min()) == 0


def test_panoptic_gives_each_pixel_one_owner_and_drops_the_hidden() -> None:
    big, hidden, other = square(0, 0, 5), square(1, 1, 3), square(6, 6, 2)
    scores = [[9.0, 0.0, 0.0], [5.0, 0.0, 0.0], [0.0, 9.0, 0.0]]
    found = panoptic(row([hidden, big, other], [scores[1], scores[0], scores[2]]))
    assert sorted(found.queries.tolist()) == [1, 2]
    assert sorted(found.labels.tolist()) == [0, 1]
    assert int(found.masks.sum(dim=0).max()) == 1


def test_panoptic_warns_when_the_threshold_hides_everything() -> None:
    made = row([square(0, 0, 4)], [[1.0, 0.0]])
    with pytest.warns(UserWarning, match=r"no object above the score 0.8 \(best 0.73\)"):
        assert len(panoptic(made)) == 0
    assert len(panoptic(made, thresholds=Thresholds(object=0.5))) == 1


def test_background_queries_are_silent() -> None:
    made = row([square(0, 0, 4)], [[0.0, 9.0]])
    assert len(panoptic(made)) == 0
    assert panoptic(made).masks.shape == (0, 32, 32)


def test_instances_rank_pairs_of_query_and_class() -> None:
    made = row([square(0, 0, 4), square(4, 4, 4)], [[4.0, 3.0, 0.0], [0.0, 5.0, 0.0]])
    found = instances(made, top=3)
    assert list(zip(found.queries.tolist(), found.labels.tolist(), strict=True)) == [
        (1, 1),
        (0, 0),
        (0, 1),
    ]
    assert found.scores.diff().le(0).all()


def test_masks_come_back_at_the_size_of_the_picture() -> None:
    box = Letterbox.fit((20, 40), (32, 32))  # content 16 x 32 in the middle rows
    found = referring(row([square(2, 0, 4)], [[2.0]]), box)
    assert found.masks.shape == (1, 20, 40)
    share = found.masks.float().mean().item()
    assert share == pytest.approx(0.5, abs=0.02)
    assert found.masks[0, 1:-1, :18].all()
    assert not found.masks[0, :, 22:].any()


def test_decode_cuts_padding_candidates_and_applies_the_kinds_rule() -> None:
    masks = torch.stack([square(0, 0, 4), square(4, 4, 4)]).expand(2, -1, -1, -1)
    scores = torch.tensor([[[0.0, 9.0], [1.0, 9.0]], [[3.0, 0.0], [0.0, 3.0]]])
    prediction = Prediction(masks=masks, scores=scores, embeddings=torch.zeros(2, 2, 1))
    found = decode(prediction, "region", [1, 2])
    assert [len(f) for f in found] == [1, 2]
    assert found[0].queries.tolist() == [1]
    assert found[1].queries.tolist() == [0, 1]
    kept = row_of(prediction, 0, 1, "class").scores
    assert kept.tolist() == [[0.0, 9.0], [1.0, 9.0]]  # candidate 0 and the background
    with pytest.raises(SegmentError, match="one candidate count and one letterbox per row"):
        decode(prediction, "text", [1])
