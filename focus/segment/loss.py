"""Losses of the segmentation predictor: scores, point-sampled cross-entropy and Dice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from focus.segment.matcher import (
    LossWeights,
    absent_candidates,
    hide_absent,
    match,
    sample_at,
)
from focus.segment.predictor import Kind, Prediction, SegmentError
from focus.segment.tracker import contrastive_loss

# S prediction sets, B batch, Q queries, N targets (padded), M targets (real, of the whole batch),
# P points, K candidates, h w mask grid, H W picture

OVERSAMPLE = 3.0  # candidates per kept point
IMPORTANCE = 0.75  # share of points kept for being uncertain
NEGATIVES = 10  # queries of the other frame, per object, that an embedding must differ from


def segmentation_losses(
    prediction: Prediction,
    masks: Tensor,
    mask_labels: Tensor,
    num_conditions: Tensor,
    kind: Kind,
    *,
    num_points: int = 12_544,
    weights: LossWeights | None = None,
    num_masks: Tensor | float | None = None,
    left_out: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Weighted losses, summed over the prediction sets (deep supervision).

        L = sum_sets 2 cls + 5 bce + 5 dice

    prediction: the predictor's output. masks: [B, N, H, W] bool, any size with the picture's
    aspect. mask_labels: [B, N] candidate of each mask, -1 padding; several masks may share one.
    num_conditions: [B] real candidates per row. `num_masks` normalises bce and dice: the number of
    target masks of this batch unless given (data parallel passes the mean over ranks). left_out:
    [B, N] a candidate that the query matched with a mask is not scored against, -1 none.
    Returns fp32 scalars "cls", "bce", "dice"; their sum is the loss. All three are connected to the
    graph when there is no mask at all. Raises `SegmentError` on a label without candidate.
    """
    weights = weights or LossWeights()
    predictions = [*prediction.auxiliary, (prediction.masks, prediction.scores)]
    with torch.autocast(masks.device.type, enabled=False):
        queries = match(
            predictions,
            masks,
            mask_labels,
            num_conditions,
            kind,
            num_points=num_points,
            weights=weights,
            generator=generator,
        )
        labels = mask_labels.cpu()
        _check_labels(labels, prediction.scores.shape[-1] - (kind == "class"))
        row, column = (labels >= 0).nonzero(as_tuple=True)
        matched = queries[:, row, column]
        target = _score_targets(predictions, matched, row, labels[row, column], kind)
        scores = torch.stack([scores.float() for _, scores in predictions])
        if left_out is not None:
            scores = _leave_out(scores, matched, row, left_out.cpu()[row, column])
        cls = _score_loss(scores, target.to(scores.device), num_conditions, kind, weights)
        count = max(float(len(row)), 1.0) if num_masks is None else num_masks
        bce, dice = _mask_losses(
            [logits for logits, _ in predictions],
            masks,
            (row, column, matched),
            num_points,
            generator,
        )
    return {
        "cls": weights.cls * cls,
        "bce": weights.bce * bce / count,
        "dice": weights.dice * dice / count,
    }


def tracking_loss(
    prediction: Prediction,
    masks: Tensor,
    mask_labels: Tensor,
    mask_objects: Tensor,
    num_conditions: Tensor,
    kind: Kind,
    *,
    num_points: int = 12_544,
    generator: torch.Generator | None = None,
) -> Tensor:
    """What makes e_j a track embedding (eq. 5): the contrast of matched queries between frames.

    Rows that share an object are frames of one clip. The query of each of a frame's objects is
    compared with the queries of the other frame: the same object's attracts, all others' repel, and
    so do unmatched queries, 10 for each object at most (IDOL, arXiv:2207.10661).
    mask_objects: [B, N], -1 padding or unknown; the rest as in `segmentation_losses`.
    Returns a fp32 scalar, the mean over ordered pairs of frames; zero, connected to the graph, when
    no two frames share an object.
    """
    last = [(prediction.masks, prediction.scores)]
    with torch.autocast(masks.device.type, enabled=False):
        queries = match(
            last,
            masks,
            mask_labels,
            num_conditions,
            kind,
            num_points=num_points,
            generator=generator,
        )[0]
        embeddings, objects = prediction.embeddings.float(), mask_objects.cpu()
        found = [(objects[row] >= 0) & (queries[row] >= 0) for row in range(len(objects))]
        losses = []
        for key in range(len(objects)):
            for reference in range(len(objects)):
                shared = set(objects[key, found[key]].tolist())
                if key == reference or not shared & set(objects[reference].tolist()):
                    continue
                own, other = queries[key, found[key]], queries[reference, found[reference]]
                others = _with_unmatched(other, embeddings.shape[1], NEGATIVES * len(own))
                same = torch.zeros(len(own), len(others), dtype=torch.bool)
                alike = objects[key, found[key]][:, None] == objects[reference, found[reference]]
                same[:, : len(other)] = alike
                losses.append(
                    contrastive_loss(
                        embeddings[key, own.to(embeddings.device)],
                        embeddings[reference, others.to(embeddings.device)],
                        same.to(embeddings.device),
                    )
                )
        if not losses:
            return embeddings.sum() * 0.0
        return torch.stack(losses).mean()


def _with_unmatched(matched: Tensor, num_queries: int, most: int) -> Tensor:
    """The matched queries, then others, so many that the repelling ones stay within `most`."""
    free = torch.ones(num_queries, dtype=torch.bool)
    free[matched] = False
    rest = free.nonzero()[:, 0]
    room = max(0, most - max(0, len(matched) - 1))
    chosen = rest[torch.randperm(len(rest))[:room]] if len(rest) > room else rest
    return torch.cat([matched, chosen])


def _check_labels(labels: Tensor, num_candidates: int) -> None:
    if labels.numel() and int(labels.max()) >= num_candidates:
        raise SegmentError(
            f"mask labels below {num_candidates} (the number of candidates) expected, got "
            f"{int(labels.max())}; check that the prompt lists every candidate"
        )


def _score_targets(
    predictions: list[tuple[Tensor, Tensor]],
    matched: Tensor,
    row: Tensor,
    label: Tensor,
    kind: Kind,
) -> Tensor:
    """Targets on the CPU: class indices [S, B, Q] for "class", else 0/1 floats [S, B, Q, K]."""
    batch, num_queries, width = predictions[0][1].shape
    num_sets = len(predictions)
    step = torch.arange(num_sets)[:, None].expand_as(matched)
    keep = matched >= 0
    index = (step[keep], row.expand_as(matched)[keep], matched[keep])
    if kind == "class":
        target = torch.full((num_sets, batch, num_queries), width - 1, dtype=torch.int64)
        target[index] = label.expand_as(matched)[keep].long()
        return target
    target = torch.zeros(num_sets, batch, num_queries, width)
    target[(*index, label.expand_as(matched)[keep].long())] = 1.0
    return target


def _leave_out(scores: Tensor, matched: Tensor, row: Tensor, candidate: Tensor) -> Tensor:
    """Lowest scores [S, B, Q, K] for a candidate [M] of each query matched [S, M] in a row [M]."""
    step = torch.arange(len(scores))[:, None].expand_as(matched)
    keep = (matched >= 0) & (candidate >= 0)
    places = (step, row.expand_as(matched), matched, candidate.expand_as(matched))
    index = tuple(place[keep].to(scores.device) for place in places)
    lowest = scores.new_tensor(torch.finfo(scores.dtype).min)
    return scores.index_put(index, lowest)


def _score_loss(
    scores: Tensor, target: Tensor, num_conditions: Tensor, kind: Kind, weights: LossWeights
) -> Tensor:
    """Cross-entropy over candidates, or balanced binary cross-entropy; summed over sets.

    For text and regions pos_weight = (n - n_pos) / n_pos over all real (query, candidate) pairs,
    1 where all or none are positive.
    """
    if kind == "class":
        scores = hide_absent(scores, num_conditions, kind)
        balance = torch.ones(scores.shape[-1], device=scores.device)
        balance[-1] = weights.no_object
        losses = [
            F.cross_entropy(s.flatten(0, 1), t.flatten(), weight=balance)
            for s, t in zip(scores, target, strict=True)
        ]
        return torch.stack(losses).sum()
    present = ~absent_candidates(scores.shape[-1], num_conditions, kind)[:, None]
    present = present.expand(scores.shape[1:]).float()
    count = present.sum().clamp(min=1.0)
    positives = target.sum(dim=(1, 2, 3), keepdim=True)
    mixed = (positives > 0) & (positives < count)
    balance = torch.where(mixed, (count - positives) / positives.clamp(min=1.0), 1.0)
    loss = F.binary_cross_entropy_with_logits(
        scores, target, weight=present, pos_weight=balance, reduction="sum"
    )
    return loss / count


def _mask_losses(
    logits: list[Tensor],
    masks: Tensor,
    pairs: tuple[Tensor, Tensor, Tensor],
    num_points: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Sums over sets and targets of point-sampled cross-entropy (mean over points) and Dice.

    pairs: row [M], column [M] and matched query [S, M] on the CPU. Every target is sampled once for
    all sets, so that the full-size masks are never copied per set.
    """
    row, column, matched = (index.to(masks.device) for index in pairs)
    num_sets, num_targets = matched.shape
    if not num_targets:
        zero = sum((x.float().sum() * 0.0 for x in logits), torch.zeros((), device=masks.device))
        return zero, zero
    query = matched.clamp(min=0)
    chosen = torch.stack([x[row, q] for x, q in zip(logits, query, strict=True)]).float()
    chosen = chosen.flatten(0, 1)[:, None]
    points = uncertain_points(chosen.detach(), num_points, generator)
    sampled = sample_at(chosen, points)[:, 0].view(num_sets, num_targets, num_points)
    points = points.view(num_sets, num_targets, num_points, 2).transpose(0, 1).flatten(1, 2)
    target = sample_at(masks[row, column][:, None].float(), points)
    target = target.view(num_targets, num_sets, num_points).transpose(0, 1)
    weight = (matched >= 0).float()
    bce = F.binary_cross_entropy_with_logits(sampled, target, reduction="none").mean(-1)
    probability = sampled.sigmoid()
    overlap = 2.0 * (probability * target).sum(-1)
    dice = 1.0 - (overlap + 1.0) / (probability.sum(-1) + target.sum(-1) + 1.0)
    return (bce * weight).sum(), (dice * weight).sum()


@torch.no_grad()
def uncertain_points(
    logits: Tensor, num_points: int, generator: torch.Generator | None = None
) -> Tensor:
    """Choose points [M, P, 2] in [0, 1] where logits [M, 1, h, w] are nearest to zero (PointRend).

    Of 3 P uniform points the 0.75 P most uncertain are kept; the other 0.25 P are uniform.
    """
    count = logits.shape[0]
    num_candidates = int(num_points * OVERSAMPLE)
    num_uncertain = int(num_points * IMPORTANCE)
    shape = (count, num_candidates + num_points - num_uncertain, 2)
    points = torch.rand(shape, device=logits.device, generator=generator)
    candidates, uniform = points[:, :num_candidates], points[:, num_candidates:]
    uncertainty = -sample_at(logits, candidates)[:, 0].abs()
    index = uncertainty.topk(num_uncertain, dim=1).indices
    kept = candidates.gather(1, index[..., None].expand(-1, -1, 2))
    return torch.cat([kept, uniform], dim=1)
