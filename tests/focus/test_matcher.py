"""Hungarian matching against brute force and against transformers' pairwise costs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from transformers.models.mask2former.modeling_mask2former import (
    pair_wise_dice_loss,
    pair_wise_sigmoid_cross_entropy_loss,
)

from focus.segment.matcher import LossWeights, assign, mask_costs, match, matching_cost, sample_at
from focus.segment.predictor import SegmentError


def blocks(size: int = 16) -> Tensor:
    """Four targets [1, 4, size, size]: the quadrants."""
    masks = torch.zeros(1, 4, size, size, dtype=torch.bool)
    half = size // 2
    for number in range(4):
        top, left = number // 2 * half, number % 2 * half
        masks[0, number, top : top + half, left : left + half] = True
    return masks


def test_costs_equal_transformers() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 5, 40), (torch.rand(2, 3, 40) > 0.5).float()
    bce, dice = mask_costs(logits, targets)
    for row in range(2):
        torch.testing.assert_close(
            bce[row], pair_wise_sigmoid_cross_entropy_loss(logits[row], targets[row])
        )
        torch.testing.assert_close(dice[row], pair_wise_dice_loss(logits[row], targets[row]))


def test_assign_equals_brute_force() -> None:
    torch.manual_seed(1)
    costs = torch.rand(2, 3, 5, 3)
    queries = assign(costs, torch.ones(3, 3, dtype=torch.bool))
    for step, row in itertools.product(range(2), range(3)):
        table = costs[step, row]
        best = min(
            itertools.permutations(range(5), 3),
            key=lambda chosen, table=table: sum(table[q, n] for n, q in enumerate(chosen)),
        )
        assert queries[step, row].tolist() == list(best)


def test_assign_ignores_padding_and_reports_the_unmatched() -> None:
    costs = torch.tensor([[[[5.0, 1.0, float("nan")], [1.0, 5.0, float("nan")]]]])
    present = torch.tensor([[True, True, False]])
    assert assign(costs, present).tolist() == [[[1, 0, -1]]]
    crowded = torch.tensor([[[[3.0, 1.0, 2.0]]]])
    assert assign(crowded, torch.ones(1, 3, dtype=torch.bool)).tolist() == [[[-1, 0, -1]]]
    assert assign(torch.zeros(1, 1, 2, 0), torch.ones(1, 0, dtype=torch.bool)).shape == (1, 1, 0)


def test_assign_refuses_overflow() -> None:
    costs = torch.tensor([[[[float("inf")]]]])
    with pytest.raises(SegmentError, match=r"finite matching costs .* lower the learning rate"):
        assign(costs, torch.ones(1, 1, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["class", "text", "region"])
def test_match_finds_the_query_that_drew_each_mask(kind: str) -> None:
    masks = blocks()
    order = torch.tensor([2, 0, 3, 1])
    logits = (masks[:, order].float() * 2 - 1) * 8
    logits = torch.cat([torch.full((1, 2, 16, 16), -8.0), logits], dim=1)  # two idle queries
    scores = torch.zeros(1, 6, 5)
    queries = match(
        [(logits, scores)],
        masks,
        torch.tensor([[0, 1, 2, 3]]),
        torch.tensor([4]),
        kind,  # type: ignore[arg-type]
        num_points=200,
    )
    assert queries.tolist() == [[[3, 5, 2, 4]]]  # 2 + position in `order`


def test_class_scores_decide_between_equal_masks_only_for_classes() -> None:
    logits = torch.zeros(1, 2, 8, 8)
    target, points = torch.ones(1, 1, 30), torch.rand(1, 30, 2)
    scores = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 4.0, 0.0]]])
    label, count = torch.tensor([[1]]), torch.tensor([2])
    arguments = (logits, scores, target, points, label, count)
    by_class = matching_cost(*arguments, "class", LossWeights())
    expected = 2 * (scores[0, 1].softmax(-1)[1] - scores[0, 0].softmax(-1)[1])
    torch.testing.assert_close(by_class[0, 0, 0] - by_class[0, 1, 0], expected)
    by_text = matching_cost(*arguments, "text", LossWeights())
    torch.testing.assert_close(by_text[0, 0], by_text[0, 1])


def test_absent_classes_take_no_probability() -> None:
    logits, target, points = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 30), torch.rand(1, 30, 2)
    label, count = torch.tensor([[0]]), torch.tensor([1])
    costs = [
        matching_cost(
            logits,
            torch.tensor([[[1.0, absent, 0.5]]]),
            target,
            points,
            label,
            count,
            "class",
            LossWeights(),
        )
        for absent in (-3.0, 30.0)
    ]
    torch.testing.assert_close(costs[0], costs[1])


def test_sample_at_reads_pixel_centres() -> None:
    image = torch.arange(12.0).view(1, 1, 3, 4)
    points = torch.tensor([[[2.5 / 4, 1.5 / 3], [0.5 / 4, 2.5 / 3]]])
    assert sample_at(image, points).tolist() == [[[6.0, 8.0]]]
