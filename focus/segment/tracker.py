"""Objects through video: embeddings e_j keep identities, masks lead from frame to frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from focus.segment.predictor import SegmentError

# I instances of the current frame, T tracks in memory, D embedding width, H W picture

NEW = -1


@dataclass(frozen=True, kw_only=True)
class TrackerConfig:
    """Thresholds of instance matching (IDOL's): shares and scores in [0, 1].

    nms: IoU above which the weaker of two masks is dropped. first: score that starts a track on the
    first frame. new: score that starts one later. match: bi-softmax similarity that continues one.
    momentum: weight of the newest embedding in a track's own. memory: frames that a lost track is
    remembered.
    """

    nms: float = 0.7
    first: float = 0.2
    new: float = 0.5
    match: float = 0.5
    momentum: float = 0.5
    memory: int = 10


@dataclass(kw_only=True)
class Track:
    """One object: its number, its running embedding [D], its label and when it was last seen."""

    number: int
    embedding: Tensor
    label: int
    last: int
    score: float


@dataclass(kw_only=True)
class Tracker:
    """Gives every instance of a frame the number of its object.

    Call `update` once per frame, in order. Matching is by embedding alone: objects may leave, come
    back within `memory` frames, and cross.
    """

    config: TrackerConfig = field(default_factory=TrackerConfig)
    tracks: list[Track] = field(default_factory=list)
    frame: int = 0
    _next: int = 0

    def update(
        self, embeddings: Tensor, scores: Tensor, masks: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Return the object number of each instance, [I] int64, -1 where it is dropped.

        embeddings: [I, D]. scores: [I]. masks: [I, H, W] bool. labels: [I]; instances of different
        labels are never the same object. Raises `SegmentError` if the counts differ.
        """
        if not len(embeddings) == len(scores) == len(masks):
            raise SegmentError(
                f"as many embeddings, scores and masks expected, got {len(embeddings)}, "
                f"{len(scores)} and {len(masks)}"
            )
        if labels is None:
            labels = torch.zeros(len(scores), dtype=torch.int64)
        numbers = torch.full((len(scores),), NEW, dtype=torch.int64)
        kept = suppress(masks, scores, self.config.nms)
        matched = self._match(embeddings[kept], scores[kept], labels[kept])
        for index, track in zip(kept.tolist(), matched, strict=True):
            score, label = float(scores[index]), int(labels[index])
            if track is None:
                track = self._start(embeddings[index], score, label)
            else:
                self._continue(track, embeddings[index], score)
            if track is not None:
                numbers[index] = track.number
        self.frame += 1
        self.tracks = [t for t in self.tracks if self.frame - t.last <= self.config.memory]
        return numbers

    def _match(self, embeddings: Tensor, scores: Tensor, labels: Tensor) -> list[Track | None]:
        """Give each instance, best score first, the unclaimed track it resembles most."""
        matched: list[Track | None] = [None] * len(embeddings)
        if not self.tracks or not len(embeddings):
            return matched
        memory = torch.stack([track.embedding for track in self.tracks])
        known = torch.tensor([track.label for track in self.tracks])
        similarity = bi_softmax(embeddings.float(), memory)
        similarity = similarity.cpu().masked_fill(labels.cpu()[:, None] != known, -1.0)
        for index in scores.argsort(descending=True).tolist():
            best = int(similarity[index].argmax())
            if float(similarity[index, best]) > self.config.match:
                matched[index] = self.tracks[best]
                similarity[:, best] = -1.0
        return matched

    def _start(self, embedding: Tensor, score: float, label: int) -> Track | None:
        threshold = self.config.first if self.frame == 0 else self.config.new
        if score < threshold:
            return None
        track = Track(
            number=self._next,
            embedding=embedding.float(),
            label=label,
            last=self.frame,
            score=score,
        )
        self._next += 1
        self.tracks.append(track)
        return track

    def _continue(self, track: Track, embedding: Tensor, score: float) -> None:
        share = self.config.momentum
        track.embedding = (1 - share) * track.embedding + share * embedding.float()
        track.last, track.score = self.frame, score


def bi_softmax(embeddings: Tensor, memory: Tensor) -> Tensor:
    """Similarity [I, T] of embeddings [I, D] and [T, D]: mean of the row and the column softmax.

        s = (softmax_T(e m^T) + softmax_I(e m^T)) / 2

    Only a pair that prefer each other reaches a half and more.
    """
    logits = embeddings @ memory.t()
    return (logits.softmax(dim=1) + logits.softmax(dim=0)) / 2


def mask_iou(masks: Tensor) -> Tensor:
    """Intersection over union of every pair of masks [I, H, W] bool: [I, I], 0 for empty masks."""
    flat = masks.flatten(1).float()
    overlap = flat @ flat.t()
    area = flat.sum(dim=1)
    return overlap / (area[:, None] + area - overlap).clamp(min=1.0)


def suppress(masks: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Indices, best score first, of the masks that no better mask overlaps by more than IoU."""
    if not len(scores):
        return torch.zeros(0, dtype=torch.int64)
    overlaps = mask_iou(masks).cpu()
    kept: list[int] = []
    for index in scores.argsort(descending=True).tolist():
        if not kept or float(overlaps[index, kept].max()) <= threshold:
            kept.append(index)
    return torch.tensor(kept)


def contrastive_loss(key: Tensor, reference: Tensor, same: Tensor) -> Tensor:
    """Loss that makes e_j a track embedding, from two frames of a video (IDOL).

        L = mean_i log(1 + sum_pos sum_neg exp(e_i . r_neg - e_i . r_pos)) + A,
        A = mean of (cos(e_i, r_j) - same_ij)^2 over all pairs

    key: [I, D]. reference: [J, D]. same: [I, J] bool, True for one object. A fp32 scalar, zero for
    keys without a positive or a negative.
    """
    logits = key.float() @ reference.float().t()
    lowest = torch.finfo(logits.dtype).min / 2
    negatives = logits.masked_fill(same, lowest).logsumexp(dim=1)
    positives = (-logits).masked_fill(~same, lowest).logsumexp(dim=1)
    usable = same.any(dim=1) & (~same).any(dim=1)
    losses = F.softplus((negatives + positives).where(usable, torch.zeros_like(negatives)))
    contrast = (losses * usable).sum() / usable.sum().clamp(min=1)
    cosine = F.cosine_similarity(key.float()[:, None], reference.float()[None], dim=-1)
    return contrast + F.mse_loss(cosine, same.float())


Frame = TypeVar("Frame")


def propagate(
    frames: Sequence[Frame],
    start: int,
    masks: Tensor,
    step: Callable[[Frame, Tensor, Frame], Tensor],
) -> list[Tensor]:
    """Carry the masks of one annotated frame to all others, forwards and backwards in time.

    masks: [I, H, W], the objects of frame `start`. step(previous frame, its masks, frame) returns
    the masks of the frame: it pools one region vector per object from the previous frame and
    segments the next by those regions. Returns one tensor of masks per frame, in frame order.
    """
    if not 0 <= start < len(frames):
        raise SegmentError(f"a start between 0 and {len(frames) - 1} expected, got {start}")
    found: dict[int, Tensor] = {start: masks}
    for index in range(start + 1, len(frames)):
        found[index] = step(frames[index - 1], found[index - 1], frames[index])
    for index in range(start - 1, -1, -1):
        found[index] = step(frames[index + 1], found[index + 1], frames[index])
    return [found[index] for index in range(len(frames))]
