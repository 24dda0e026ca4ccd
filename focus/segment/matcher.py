"""Which query answers for which target mask: Hungarian matching on point-sampled costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from focus.segment.predictor import Kind, SegmentError

# S prediction sets, B batch, Q queries, N target masks, P points, K candidates, H W picture


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the terms, in the matching cost and in the loss alike (Mask2Former, PSALM)."""

    cls: float = 2.0
    bce: float = 5.0
    dice: float = 5.0
    no_object: float = 0.1


def sample_at(maps: Tensor, points: Tensor) -> Tensor:
    """Sample `maps` [B, C, H, W] bilinearly at `points` [B, P, 2] (x, y in [0, 1]): [B, C, P].

    Beyond the outermost centres the edge repeats. (Mask2Former reads zeros there, which pulls every
    logit within half a cell of the edge towards 0.)
    """
    grid = (2.0 * points - 1.0)[:, None]
    sampled = F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled[:, :, 0]


def mask_costs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Pairwise cross-entropy and Dice of logits [B, Q, P] and targets [B, N, P] in {0, 1}.

        bce_qn = mean_p softplus(x_qp) - x_qp t_np
        dice_qn = 1 - (2 sum_p s_qp t_np + 1) / (sum_p s_qp + sum_p t_np + 1),   s = sigmoid(x)

    Returns two [B, Q, N]. No gradients are needed: the caller runs it under no_grad.
    """
    targets_t = targets.transpose(1, 2)
    bce = F.softplus(logits).mean(-1, keepdim=True) - logits @ targets_t / logits.shape[-1]
    probability = logits.sigmoid()
    overlap = 2.0 * (probability @ targets_t)
    total = probability.sum(-1, keepdim=True) + targets.sum(-1)[:, None]
    return bce, 1.0 - (overlap + 1.0) / (total + 1.0)


def hide_absent(scores: Tensor, num_conditions: Tensor, kind: Kind) -> Tensor:
    """Fill the scores [..., B, Q, K (+1)] of padding candidates with the lowest number.

    Candidate k of row b exists when k < num_conditions[b]; the background of kind "class", last,
    always does.
    """
    absent = absent_candidates(scores.shape[-1], num_conditions, kind)
    return scores.masked_fill(absent[:, None], torch.finfo(scores.dtype).min)


def absent_candidates(width: int, num_conditions: Tensor, kind: Kind) -> Tensor:
    """True [B, width] where the column of `scores` is padding."""
    num_columns = width - 1 if kind == "class" else width
    column = torch.arange(width, device=num_conditions.device)
    return (column >= num_conditions[:, None]) & (column < num_columns)


def matching_cost(
    masks: Tensor,
    scores: Tensor,
    target_points: Tensor,
    points: Tensor,
    mask_labels: Tensor,
    num_conditions: Tensor,
    kind: Kind,
    weights: LossWeights,
) -> Tensor:
    """Cost [B, Q, N] of one prediction set.

        cost = w_bce bce + w_dice dice - w_cls p(label)      (the last term for kind "class" only)

    masks: [B, Q, h, w] logits. scores: [B, Q, K (+1)]. target_points: [B, N, P], the targets
    sampled at `points` [B, P, 2]. mask_labels: [B, N], -1 padding (its cost is meaningless).
    Text and region prompts have no class cost: which mask answers is decided by the mask alone.
    """
    bce, dice = mask_costs(sample_at(masks.float(), points), target_points)
    cost = weights.bce * bce + weights.dice * dice
    if kind == "class":
        probability = hide_absent(scores.float(), num_conditions, kind).softmax(-1)
        index = mask_labels.clamp(min=0)[:, None].expand(-1, scores.shape[1], -1)
        cost = cost - weights.cls * probability.gather(-1, index)
    return cost


def assign(costs: Tensor, present: Tensor) -> Tensor:
    """Solve the assignments; returns on the CPU the query of each target, [S, B, N], -1 for none.

    costs: [S, B, Q, N] on the CPU. present: [B, N] bool on the CPU, False for padding. A target is
    left without query only when a row has more targets than queries.
    Raises `SegmentError` when a cost is not finite.
    """
    num_sets, batch, _, num_targets = costs.shape
    queries = torch.full((num_sets, batch, num_targets), -1, dtype=torch.int64)
    if not torch.isfinite(costs.masked_fill(~present[None, :, None], 0.0)).all():
        raise SegmentError(
            "finite matching costs expected, got inf or nan: the predicted masks or scores have "
            "overflowed; lower the learning rate or look at the last logged gradient norm"
        )
    table = costs.double().numpy()
    for row in range(batch):
        column = present[row].nonzero()[:, 0]
        if not len(column):
            continue
        for step in range(num_sets):
            query, target = linear_sum_assignment(table[step, row][:, column.numpy()])
            queries[step, row, column[torch.from_numpy(target)]] = torch.from_numpy(query)
    return queries


@torch.no_grad()
def match(
    predictions: list[tuple[Tensor, Tensor]],
    masks: Tensor,
    mask_labels: Tensor,
    num_conditions: Tensor,
    kind: Kind,
    *,
    num_points: int = 12_544,
    weights: LossWeights | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Match every target mask to one query, for each prediction set: [S, B, N] on the CPU, -1 none.

    predictions: S pairs (masks [B, Q, h, w] logits, scores [B, Q, K (+1)]). masks: [B, N, H, W]
    bool. mask_labels: [B, N], -1 padding. The random points are shared by all masks of a row, drawn
    anew per prediction set. One device-to-host copy in all.
    """
    weights = weights or LossWeights()
    device, batch = masks.device, masks.shape[0]
    targets = masks.float()
    costs = []
    with torch.autocast(device.type, enabled=False):
        for mask_logits, scores in predictions:
            points = torch.rand(batch, num_points, 2, device=device, generator=generator)
            sampled = sample_at(targets, points)
            costs.append(
                matching_cost(
                    mask_logits,
                    scores,
                    sampled,
                    points,
                    mask_labels,
                    num_conditions,
                    kind,
                    weights,
                )
            )
    return assign(torch.stack(costs).cpu(), (mask_labels >= 0).cpu())
