"""From predictions to masks of the picture: the decoding rule of each task, thresholds in the open.

Every rule works on one row of a batch; `decode` applies the right one to all rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from focus.geometry import Letterbox
from focus.segment.predictor import Kind, Prediction, SegmentError
from focus.segment.refine import Refinement, refine

# N queries, K candidates, I instances, h w mask grid, H W picture


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Every number that decides what is kept.

    mask: probability from which a pixel belongs to a mask. union: score from which a query joins
    the union of a generalised referring expression. object: score from which a query is an object
    (panoptic). overlap: share of a mask that must survive its rivals (panoptic). background:
    probability below which a pixel of a semantic map belongs to no class; None: never.
    """

    mask: float = 0.5
    union: float = 0.6
    object: float = 0.8
    overlap: float = 0.8
    background: float | None = 0.5


@dataclass(frozen=True, kw_only=True)
class Instances:
    """Masks found in one picture, best first.

    masks: [I, H, W] bool at the picture's own size. probabilities: [I, H, W] before thresholding.
    scores: [I] in [0, 1]. labels: [I] candidate number. queries: [I] the query of each (for the
    union rule, its best). embeddings: [I, D], for tracking.
    """

    masks: Tensor
    probabilities: Tensor
    scores: Tensor
    labels: Tensor
    queries: Tensor
    embeddings: Tensor

    def __len__(self) -> int:
        return len(self.scores)


class Guide(NamedTuple):
    """A picture [3, H, W] in [0, 1] as it lies in the frame, and how it refines masks."""

    picture: Tensor
    how: Refinement


def guide_of(pictures: Tensor | None, index: int, how: Refinement | None) -> Guide | None:
    """Return the guide of one of the pictures [B, 3, h, w]; None where either is missing."""
    return None if pictures is None or how is None else Guide(pictures[index], how)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a `Prediction`: mask logits [N, h, w], scores [N, K (+1)], embeddings [N, D].

    guide: the picture in its frame and how masks are refined by it, see `refine.py`; None: not.
    """

    masks: Tensor
    scores: Tensor
    embeddings: Tensor
    guide: Guide | None = None


def row_of(
    prediction: Prediction,
    index: int,
    num_conditions: int,
    kind: Kind,
    guide: Guide | None = None,
) -> Row:
    """Cut one row out of a prediction, without the scores of padding candidates, in fp32."""
    scores = prediction.scores[index].float()
    kept = scores[:, :num_conditions]
    if kind == "class":
        kept = torch.cat([kept, scores[:, -1:]], dim=1)
    return Row(
        masks=prediction.masks[index].float(),
        scores=kept,
        embeddings=prediction.embeddings[index].float(),
        guide=guide,
    )


def picture_masks(masks: Tensor, letterbox: Letterbox | None, guide: Guide | None = None) -> Tensor:
    """Probabilities [I, H, W] at the picture's size of mask logits [I, h, w] at stride 4.

    Logits are interpolated, then squashed: the edge lies where the logit crosses zero. With a guide
    they are refined in its frame first. Without a letterbox the result has the frame's size, four
    times the grid.
    """
    if guide is not None:
        refined = refine(_grown(masks, guide.picture.shape[1:]).sigmoid(), *guide)
        return refined if letterbox is None else letterbox.mask_back(refined)
    if letterbox is not None:
        return letterbox.mask_back(masks).sigmoid()
    return _grown(masks, (masks.shape[-2] * 4, masks.shape[-1] * 4)).sigmoid()


def _grown(masks: Tensor, size: Sequence[int]) -> Tensor:
    if not len(masks):
        return masks.new_zeros(0, *size)
    return F.interpolate(masks[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


def mask_quality(masks: Tensor) -> Tensor:
    """Mean probability inside each mask [N, h, w] of logits: [N], 0 for an empty mask."""
    inside = masks > 0
    total = (masks.sigmoid() * inside).sum(dim=(-2, -1))
    return total / inside.sum(dim=(-2, -1)).clamp(min=1)


def collect(
    row: Row,
    queries: Tensor,
    scores: Tensor,
    labels: Tensor,
    letterbox: Letterbox | None,
    thresholds: Thresholds,
) -> Instances:
    """Bring the chosen queries' masks to the picture."""
    probabilities = picture_masks(row.masks[queries], letterbox, row.guide)
    return Instances(
        masks=probabilities >= thresholds.mask,
        probabilities=probabilities,
        scores=scores,
        labels=labels,
        queries=queries,
        embeddings=row.embeddings[queries],
    )


def referring(
    row: Row,
    letterbox: Letterbox | None = None,
    *,
    rule: Literal["top1", "union"] = "top1",
    thresholds: Thresholds | None = None,
) -> Instances:
    """Mask of an expression: one instance.

    top1: the query with the largest sigmoid(z) times mean probability inside its mask.
    union: the union of all queries with that score's sigmoid(z) above `thresholds.union`
    (expressions of several objects), the top one when none is.
    """
    thresholds = thresholds or Thresholds()
    confidence = row.scores[:, 0].sigmoid()
    ranked = confidence * mask_quality(row.masks)
    best = ranked.argmax()[None]
    label = torch.zeros_like(best)
    top = collect(row, best, ranked[best], label, letterbox, thresholds)
    if rule == "top1":
        return top
    members = (confidence > thresholds.union).nonzero()[:, 0]
    if not len(members):
        return top
    joined = picture_masks(row.masks[members], letterbox, row.guide).amax(dim=0, keepdim=True)
    first = members[ranked[members].argmax()][None]
    return Instances(
        masks=joined >= thresholds.mask,
        probabilities=joined,
        scores=ranked[first],
        labels=label,
        queries=first,
        embeddings=row.embeddings[first],
    )


def interactive(
    row: Row,
    letterbox: Letterbox | None = None,
    *,
    points: Tensor | None = None,
    unique: bool = False,
    candidates: int = 10,
    thresholds: Thresholds | None = None,
) -> Instances:
    """One instance per region, in the order of the regions (labels are the region numbers).

    Each region takes its best query; with `unique`, regions choose greedily, best score first, a
    query not yet taken among their `candidates` best (video: one query per object). `points`
    [R, P, 2], x and y in [0, 1] of the frame, are the region's own: a query counts for sigmoid(z)
    times its mask's mean probability inside and at the points, so that a mask beside the prompt
    loses. (For a clip's next frame the points are the last frame's: leave them out.)
    """
    thresholds = thresholds or Thresholds()
    confidence = row.scores.sigmoid()
    if points is not None:
        confidence = confidence * mask_quality(row.masks)[:, None] * _hits(row.masks, points)
    queries = _greedy(confidence, candidates) if unique else confidence.argmax(dim=0)
    labels = torch.arange(confidence.shape[1], device=queries.device)
    scores = row.scores.sigmoid()[queries, labels] * mask_quality(row.masks[queries])
    return collect(row, queries, scores, labels, letterbox, thresholds)


def _hits(masks: Tensor, points: Tensor) -> Tensor:
    """Mean probability of masks [N, h, w] of logits at each region's points [R, P, 2]: [N, R]."""
    grid = (2.0 * points.to(masks) - 1.0).expand(len(masks), -1, -1, -1)
    at = F.grid_sample(masks[:, None], grid, padding_mode="border", align_corners=False)
    return at[:, 0].sigmoid().mean(-1)


def _greedy(confidence: Tensor, candidates: int) -> Tensor:
    """Choose one query per column of [N, R], no query twice while a column has others to offer."""
    top = confidence.topk(min(candidates, confidence.shape[0]), dim=0)
    order = top.values[0].argsort(descending=True).tolist()
    taken: set[int] = set()
    chosen = top.indices[0].clone()
    for region in order:
        for query in top.indices[:, region].tolist():
            if query not in taken:
                chosen[region] = query
                taken.add(query)
                break
    return chosen


def semantic(
    row: Row, letterbox: Letterbox | None = None, *, thresholds: Thresholds | None = None
) -> Tensor:
    """Class number of every pixel, [H, W] int64, -1 where no class is.

    s_k(p) = sum_q softmax(z_q)_k sigmoid(m_q(p)); the largest wins unless it is below
    `thresholds.background`.
    """
    thresholds = thresholds or Thresholds()
    weight = row.scores.softmax(dim=-1)[:, :-1]
    masks = picture_masks(row.masks, letterbox, row.guide)
    best = torch.einsum("nk,nhw->khw", weight, masks).max(dim=0)
    if thresholds.background is None:
        return best.indices
    return best.indices.masked_fill(best.values < thresholds.background, -1)


def panoptic(
    row: Row, letterbox: Letterbox | None = None, *, thresholds: Thresholds | None = None
) -> Instances:
    """Objects of all classes whose masks do not overlap.

    A query is an object when its best class is not background and scores above
    `thresholds.object`. Each pixel goes to the object with the largest score times probability; an
    object that keeps less than `thresholds.overlap` of its mask is dropped. Warns when everything
    falls below the threshold while something was seen.
    """
    thresholds = thresholds or Thresholds()
    probability = row.scores.softmax(dim=-1)
    scores, labels = probability.max(dim=-1)
    seen = labels < probability.shape[1] - 1
    kept = (seen & (scores > thresholds.object)).nonzero()[:, 0]
    if not len(kept) and bool(seen.any()):
        warnings.warn(
            f"no object above the score {thresholds.object:g} (best {float(scores[seen].max()):.2f}"
            "); lower thresholds.object to see weaker ones",
            stacklevel=2,
        )
    kept = kept[scores[kept].argsort(descending=True)]
    found = collect(row, kept, scores[kept], labels[kept], letterbox, thresholds)
    if not len(kept):
        return found
    owner = (found.probabilities * found.scores[:, None, None]).argmax(dim=0)
    number = torch.arange(len(kept), device=owner.device)[:, None, None]
    masks = found.masks & (owner == number)
    area = found.masks.sum(dim=(-2, -1))
    alive = (masks.sum(dim=(-2, -1)) >= thresholds.overlap * area) & (area > 0)
    return Instances(
        masks=masks[alive],
        probabilities=found.probabilities[alive],
        scores=found.scores[alive],
        labels=found.labels[alive],
        queries=found.queries[alive],
        embeddings=found.embeddings[alive],
    )


def instances(
    row: Row,
    letterbox: Letterbox | None = None,
    *,
    top: int = 100,
    thresholds: Thresholds | None = None,
) -> Instances:
    """The `top` best (query, class) pairs, overlaps allowed: what average precision ranks.

    Score = softmax(z)_k times the mean probability inside the mask.
    """
    thresholds = thresholds or Thresholds()
    probability = row.scores.softmax(dim=-1)[:, :-1] * mask_quality(row.masks)[:, None]
    best = probability.flatten().topk(min(top, probability.numel()))
    queries = best.indices // probability.shape[1]
    labels = best.indices % probability.shape[1]
    return collect(row, queries, best.values, labels, letterbox, thresholds)


def decode(
    prediction: Prediction,
    kind: Kind,
    num_conditions: Sequence[int] | Tensor,
    letterboxes: Sequence[Letterbox | None] | None = None,
    *,
    rule: Literal["top1", "union"] = "top1",
    thresholds: Thresholds | None = None,
    points: Tensor | None = None,
    pictures: Tensor | None = None,
    refinement: Refinement | None = None,
) -> list[Instances]:
    """Apply the default rule of a kind to every row: panoptic, referring or interactive.

    letterboxes: how each picture entered the frame; masks come back at its size. points: of the
    prompts [B, R, P, 2], see `interactive`. pictures: [B, 3, h, w] in [0, 1], as they lie in the
    frame; refinement: how masks follow their edges, see `refine.py`. Raises `SegmentError` when the
    numbers of rows differ.
    """
    counts = [int(count) for count in num_conditions]
    boxes = list(letterboxes) if letterboxes is not None else [None] * len(counts)
    if not len(counts) == len(boxes) == len(prediction.masks):
        raise SegmentError(
            f"one candidate count and one letterbox per row expected ({len(prediction.masks)} "
            f"rows), got {len(counts)} and {len(boxes)}"
        )
    found = []
    for index, (count, box) in enumerate(zip(counts, boxes, strict=True)):
        row = row_of(prediction, index, count, kind, guide_of(pictures, index, refinement))
        if kind == "class":
            found.append(panoptic(row, box, thresholds=thresholds))
        elif kind == "text":
            found.append(referring(row, box, rule=rule, thresholds=thresholds))
        else:
            own = None if points is None else points[index, :count]
            found.append(interactive(row, box, points=own, thresholds=thresholds))
    return found
