"""Segmentation losses against their formulas, computed by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from focus.segment.loss import segmentation_losses, uncertain_points
from focus.segment.predictor import Kind, Prediction, SegmentError

SIZE = 16
SHARP = 6.0  # logit of a confident mask


def halves() -> Tensor:
    """Two targets [2, SIZE, SIZE]: left and right half."""
    masks = torch.zeros(2, SIZE, SIZE, dtype=torch.bool)
    masks[0, :, : SIZE // 2] = True
    masks[1] = ~masks[0]
    return masks


def predicted(masks: Tensor, scores: Tensor, copies: int = 0) -> Prediction:
    """A prediction that draws `masks` [B, Q, ...] with logit SHARP, in 1 + copies sets."""
    logits = (masks.float() * 2 - 1) * SHARP
    auxiliary = [(logits.clone(), scores.clone()) for _ in range(copies)]
    return Prediction(
        masks=logits,
        scores=scores,
        embeddings=torch.zeros(*scores.shape[:2], 1),
        auxiliary=auxiliary,
    )


def losses(prediction: Prediction, *arguments: object, **options: object) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return segmentation_losses(prediction, *arguments, generator=generator, **options)  # type: ignore[arg-type]


def test_constant_masks_give_the_closed_form() -> None:
    points = 32
    full = torch.ones(1, 1, SIZE, SIZE, dtype=torch.bool)
    logits = torch.full((1, 1, SIZE, SIZE), 0.7)
    prediction = Prediction(
        masks=logits, scores=torch.zeros(1, 1, 1), embeddings=torch.zeros(1, 1, 1)
    )
    found = losses(
        prediction, full, torch.tensor([[0]]), torch.tensor([1]), "text", num_points=points
    )
    assert found["cls"].item() == pytest.approx(2 * F.softplus(torch.tensor(0.0)).item())
    assert found["bce"].item() == pytest.approx(5 * F.softplus(torch.tensor(-0.7)).item())
    share = torch.tensor(0.7).sigmoid().item() * points
    exact = 5 * (1 - (2 * share + 1) / (share + points + 1))
    assert found["dice"].item() == pytest.approx(exact, rel=1e-4)


def test_bce_and_dice_equal_the_formula_at_the_sampled_points() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 1, SIZE, SIZE)
    target = torch.rand(1, 1, SIZE, SIZE) > 0.5
    prediction = Prediction(
        masks=logits, scores=torch.zeros(1, 1, 1), embeddings=torch.zeros(1, 1, 1)
    )
    found = losses(
        prediction, target, torch.tensor([[0]]), torch.tensor([1]), "text", num_points=40
    )
    generator = torch.Generator().manual_seed(0)
    torch.rand(1, 40, 2, generator=generator)  # the matcher's draw
    points = uncertain_points(logits, 40, generator)
    grid = (points * 2 - 1)[:, None]
    options = {"padding_mode": "border", "align_corners": False}
    x = F.grid_sample(logits, grid, **options).flatten()
    t = F.grid_sample(target.float(), grid, **options).flatten()
    bce = F.binary_cross_entropy_with_logits(x, t)
    s = x.sigmoid()
    dice = 1 - (2 * (s * t).sum() + 1) / (s.sum() + t.sum() + 1)
    torch.testing.assert_close(found["bce"], 5 * bce)
    torch.testing.assert_close(found["dice"], 5 * dice)


def test_class_loss_is_weighted_cross_entropy_over_real_candidates() -> None:
    torch.manual_seed(0)
    masks = halves()[None]
    scores = torch.randn(1, 4, 4)  # 3 candidates, of which 2 exist, and the background
    drawn = torch.cat([masks, torch.zeros(1, 2, SIZE, SIZE, dtype=torch.bool)], dim=1)
    found = losses(
        predicted(drawn, scores),
        masks,
        torch.tensor([[1, 0]]),
        torch.tensor([2]),
        "class",
        num_points=100,
    )
    logits = scores[0][:, [0, 1, 3]]
    target = torch.tensor([1, 0, 2, 2])
    expected = F.cross_entropy(logits, target, weight=torch.tensor([1.0, 1.0, 0.1]))
    torch.testing.assert_close(found["cls"], 2 * expected)


def test_a_candidate_left_out_is_none_for_the_query_of_that_mask_alone() -> None:
    torch.manual_seed(0)
    masks = halves()[None]
    scores = torch.randn(1, 4, 4, requires_grad=True)  # 3 candidates and the background
    drawn = torch.cat([masks, torch.zeros(1, 2, SIZE, SIZE, dtype=torch.bool)], dim=1)
    found = losses(
        predicted(drawn, scores, copies=1),
        masks,
        torch.tensor([[1, 0]]),
        torch.tensor([3]),
        "class",
        num_points=100,
        left_out=torch.tensor([[2, -1]]),
    )
    kept = scores.detach()[0].clone()
    kept[0, 2] = -torch.inf
    weight = torch.tensor([1.0, 1.0, 1.0, 0.1])
    expected = F.cross_entropy(kept, torch.tensor([1, 0, 3, 3]), weight=weight)
    torch.testing.assert_close(found["cls"].detach(), 2 * 2 * expected)  # of two sets
    found["cls"].backward()
    assert scores.grad is not None
    assert float(scores.grad[0, 0, 2]) == 0 and float(scores.grad[0, 1, 2]) > 0


def test_text_loss_balances_positives_and_lets_masks_share_a_label() -> None:
    torch.manual_seed(0)
    masks = halves()[None]
    scores = torch.randn(1, 5, 1)
    idle = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.bool)
    found = losses(
        predicted(torch.cat([idle, masks], dim=1), scores),
        masks,
        torch.tensor([[0, 0]]),
        torch.tensor([1]),
        "text",
        num_points=100,
    )
    target = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0])
    expected = F.binary_cross_entropy_with_logits(
        scores[0, :, 0], target, pos_weight=torch.tensor(3 / 2)
    )
    torch.testing.assert_close(found["cls"], 2 * expected)


def test_region_loss_counts_only_real_regions() -> None:
    torch.manual_seed(0)
    masks = halves().expand(2, -1, -1, -1)
    scores = torch.randn(2, 2, 2)
    labels, counts = torch.tensor([[0, 1], [0, -1]]), torch.tensor([2, 1])
    found = losses(predicted(masks, scores), masks, labels, counts, "region", num_points=100)
    x = torch.stack([*scores[0].flatten(), *scores[1, :, 0]])
    target = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    expected = F.binary_cross_entropy_with_logits(x, target, pos_weight=torch.tensor(1.0))
    torch.testing.assert_close(found["cls"], 2 * expected)


@pytest.mark.parametrize("kind", ["class", "text", "region"])
def test_losses_do_not_depend_on_the_order_of_queries(kind: Kind) -> None:
    torch.manual_seed(0)
    masks = halves()[None]
    scores, logits = torch.randn(1, 5, 3), torch.randn(1, 5, SIZE, SIZE)
    order = torch.tensor([3, 1, 4, 0, 2])
    found = []
    for index in (torch.arange(5), order):
        prediction = Prediction(
            masks=logits[:, index], scores=scores[:, index], embeddings=torch.zeros(1, 5, 1)
        )
        labels, counts = torch.tensor([[1, 0]]), torch.tensor([2])
        found.append(losses(prediction, masks, labels, counts, kind, num_points=50))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


def test_deep_supervision_adds_up_and_the_normaliser_divides() -> None:
    masks = halves()[None]
    arguments = (masks, torch.tensor([[0, 1]]), torch.tensor([2]), "class")
    scores = torch.zeros(1, 2, 3)
    once = losses(predicted(masks, scores), *arguments, num_points=2000)
    thrice = losses(predicted(masks, scores, copies=2), *arguments, num_points=2000)
    torch.testing.assert_close(thrice["cls"], 3 * once["cls"])
    assert thrice["dice"].item() == pytest.approx(3 * once["dice"].item(), rel=0.1)
    halved = losses(predicted(masks, scores), *arguments, num_points=2000, num_masks=4.0)
    torch.testing.assert_close(halved["bce"], once["bce"] / 2)
    torch.testing.assert_close(halved["cls"], once["cls"])


def test_only_matched_queries_receive_mask_gradient() -> None:
    masks = halves()[None]
    idle = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.bool)
    prediction = predicted(torch.cat([idle, masks], dim=1), torch.zeros(1, 3, 2))
    prediction.masks.requires_grad_()
    found = losses(
        prediction,
        masks,
        torch.tensor([[0, -1]]),
        torch.tensor([1]),
        "class",
        num_points=50,
    )
    (found["bce"] + found["dice"]).backward()
    reached = prediction.masks.grad.abs().amax(dim=(-2, -1))[0] > 0  # type: ignore[union-attr]
    assert reached.tolist() == [False, True, False]


def test_batches_without_masks_stay_connected() -> None:
    prediction = predicted(halves()[None], torch.zeros(1, 2, 2))
    prediction.masks.requires_grad_()
    prediction.scores.requires_grad_()
    none = torch.tensor([[-1, -1]])
    found = losses(prediction, halves()[None], none, torch.tensor([1]), "class", num_points=50)
    torch.stack(list(found.values())).sum().backward()
    assert found["bce"].item() == found["dice"].item() == 0.0
    assert float(prediction.masks.grad.abs().sum()) == 0.0  # type: ignore[union-attr]
    assert float(prediction.scores.grad.abs().sum()) > 0.0  # type: ignore[union-attr]


def test_labels_without_candidate_are_refused() -> None:
    prediction = predicted(halves()[None], torch.zeros(1, 2, 3))
    with pytest.raises(SegmentError, match=r"labels below 2 .* got 2"):
        losses(prediction, halves()[None], torch.tensor([[0, 2]]), torch.tensor([2]), "class")


def test_uncertain_points_crowd_at_the_edge() -> None:
    logits = torch.linspace(-8, 8, 64).expand(1, 1, 64, 64)
    points = uncertain_points(logits, 400, torch.Generator().manual_seed(0))
    assert points.shape == (1, 400, 2)
    near = ((points[0, :, 0] - 0.5).abs() < 0.2).float().mean().item()
    assert near > 0.75  # uniform points: 0.4
