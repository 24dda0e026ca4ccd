"""Clips: follow objects through frames, find what an expression means, edit with one instruction.

A clip is a sequence of pictures of one size, any size. Nothing here needs the frames in time order
but the memory of what was last seen, so an object may be marked on any frame: masks spread from
there forwards and backwards.
"""

# T frames, I objects, R regions, H W picture

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from focus.geometry import Letterbox
from focus.inputs import fit_mask, to_pictures
from focus.model import Features
from focus.pipeline import Session
from focus.regions import MaskRegion, Region, region_mask, sample_points
from focus.request import Bitmap, EditResult, Pixels, Request, RequestError
from focus.segment.infer import Instances, Thresholds, decode, guide_of, interactive, row_of
from focus.segment.tracker import NEW, Tracker, TrackerConfig, propagate

if TYPE_CHECKING:
    from focus.api import Focus

CHUNK = 4  # frames that are segmented or edited as one batch


@dataclass(frozen=True, kw_only=True)
class Tracks:
    """Objects through a clip.

    masks: bool [H, W] per object and frame, empty where the object is not seen. names, scores: of
    each object, and per frame. start: the frame from which masks spread; None when every frame was
    segmented by itself.
    """

    masks: list[list[Bitmap]]
    names: list[str]
    scores: list[list[float]]
    start: int | None = None

    def __len__(self) -> int:
        return len(self.masks)


@dataclass(kw_only=True)
class _Seen:
    """The frame that the next one is compared with, and every object's last region vector."""

    index: int
    features: Features
    vectors: Tensor  # [R, D]


def track_regions(
    model: Focus,
    frames: Sequence[Pixels],
    regions: Sequence[Region],
    start: int = 0,
    *,
    lost: float = 0.25,
    seed: int = 0,
) -> Tracks:
    """Follow what regions of frame `start` point at, forwards and backwards.

    A `MaskRegion` is taken as the object's mask; any other region is segmented first. From frame to
    frame each object's vector is pooled from the previous frame under its mask there and stands at
    its <region> token; objects choose their queries greedily, each query once. lost: score below
    which an object is not seen in a frame; it is then looked for by its last vector. Raises
    `RequestError`, `RegionError`, `SegmentError`.
    """
    check_frames(frames, start)
    if not regions:
        raise RequestError("at least one region to follow expected, got none")
    size = (frames[start].shape[0], frames[start].shape[1])
    drawn = [region_mask(region, size, model.config.region) for region in regions]
    found = model.segment_batch(
        [Request(task="interactive", image=frames[start], regions=tuple(drawn), seed=seed)]
    )[0]
    first = [
        drawn[number] if isinstance(region, MaskRegion) else _mask_of(found.masks, number, size)
        for number, region in enumerate(regions)
    ]
    scores = [[1.0] * len(frames) for _ in regions]
    spread = _Spread(model, frames, start, lost, seed, scores)
    masks = propagate(range(len(frames)), start, torch.from_numpy(np.stack(first)), spread.step)
    return Tracks(
        masks=[[masks[t][i].numpy() for t in range(len(frames))] for i in range(len(regions))],
        names=list(found.names),
        scores=scores,
        start=start,
    )


def track_text(
    model: Focus,
    frames: Sequence[Pixels],
    text: str,
    *,
    task: str = "referring",
    spread: bool = False,
    seed: int = 0,
) -> Tracks:
    """Find what an expression or a description means in every frame.

    Every frame is asked by itself; with `spread` only the frame with the best score is, and its
    mask spreads to the others (one object even where the words fit several). Raises `RequestError`.
    """
    check_frames(frames, 0)
    if not text.strip():
        raise RequestError("an expression expected, got an empty text")
    requests = [Request(task=task, text=text, image=frame, seed=seed) for frame in frames]
    found = [
        result
        for at in range(0, len(requests), CHUNK)
        for result in model.segment_batch(requests[at : at + CHUNK])
    ]
    if spread:
        best = max(range(len(found)), key=lambda t: found[t].scores[0])
        if found[best].masks[0].any():
            region = MaskRegion(found[best].masks[0])
            tracks = track_regions(model, frames, [region], best, seed=seed)
            return replace(tracks, names=[found[best].names[0]])
    return Tracks(
        masks=[[result.masks[0] for result in found]],
        names=[max(found, key=lambda result: result.scores[0]).names[0]],
        scores=[[result.scores[0] for result in found]],
    )


def track_classes(
    model: Focus,
    frames: Sequence[Pixels],
    classes: Sequence[str],
    *,
    thresholds: Thresholds | None = None,
    config: TrackerConfig | None = None,
    seed: int = 0,
) -> Tracks:
    """Segment every frame by class names and give each object one number through the clip.

    Identity is by the embeddings e_j (eq. 5): objects may leave, come back and cross. Raises
    `RequestError`.
    """
    check_frames(frames, 0)
    names = tuple(name.strip() for name in classes if name.strip())
    if not names:
        raise RequestError("at least one class name expected, got none")
    tracker = Tracker(config=config or TrackerConfig())
    size = (frames[0].shape[0], frames[0].shape[1])
    masks: dict[int, list[Bitmap]] = {}
    scores: dict[int, list[float]] = {}
    labels: dict[int, int] = {}
    for index, found in enumerate(_class_instances(model, frames, names, thresholds, seed)):
        numbers = tracker.update(found.embeddings, found.scores, found.masks, found.labels)
        for row, number in enumerate(numbers.tolist()):
            if number == NEW:
                continue
            empty = [np.zeros(size, np.bool_) for _ in frames]
            masks.setdefault(number, empty)[index] = found.masks[row].numpy()
            scores.setdefault(number, [0.0] * len(frames))[index] = float(found.scores[row])
            labels[number] = int(found.labels[row])
    order = sorted(masks)
    return Tracks(
        masks=[masks[number] for number in order],
        names=[names[labels[number]] for number in order],
        scores=[scores[number] for number in order],
    )


def edit_clip(
    model: Focus,
    frames: Sequence[Pixels],
    text: str,
    region: Region | None = None,
    start: int = 0,
    *,
    seed: int = 0,
    steps: int | None = None,
) -> list[EditResult]:
    """Edit every frame with one instruction.

    All frames share the seed: the visual tokens are drawn with the same noise and the decoder
    starts from the same latents, so what does not move stays still. A region of frame `start` is
    followed first, and each frame is edited at its own mask; a frame in which the object is not
    seen stays as it is. Raises `RequestError`, `RegionError`.
    """
    from focus.api import point

    check_frames(frames, start)
    if not text.strip():
        raise RequestError("an instruction expected, got an empty text")
    if region is None:
        requests: dict[int, Request] = {
            t: Request(task="editing", text=text, image=frame, seed=seed)
            for t, frame in enumerate(frames)
        }
    else:
        masks = track_regions(model, frames, [region], start, seed=seed).masks[0]
        requests = {
            t: Request(
                task="editing", text=point(text), image=frame, regions=(masks[t],), seed=seed
            )
            for t, frame in enumerate(frames)
            if masks[t].any()
        }
    order = sorted(requests)
    results: dict[int, EditResult] = {}
    for at in range(0, len(order), CHUNK):
        chunk = order[at : at + CHUNK]
        edited = model.edit_batch([requests[t] for t in chunk], steps)
        results.update(zip(chunk, edited, strict=True))
    return [results.get(t) or _unchanged(frame) for t, frame in enumerate(frames)]


def check_frames(frames: Sequence[Pixels], start: int) -> None:
    """Raise `RequestError` unless there are frames of one size, `start` among them."""
    if not len(frames):
        raise RequestError("a clip of at least one frame expected, got none")
    shapes = {frame.shape for frame in frames}
    if len(shapes) != 1:
        raise RequestError(f"frames of one size expected, got {sorted(shapes)[:3]}")
    if not 0 <= start < len(frames):
        raise RequestError(f"a start frame between 0 and {len(frames) - 1} expected, got {start}")


class _Spread:
    """Carries masks from frame to frame; what was last seen starts anew at the marked frame."""

    def __init__(
        self,
        model: Focus,
        frames: Sequence[Pixels],
        start: int,
        lost: float,
        seed: int,
        scores: list[list[float]],
    ) -> None:
        self.model, self.frames, self.start = model, frames, start
        self.lost, self.seed, self.scores = lost, seed, scores
        self.pipeline = model.pipeline()
        self.seen: _Seen | None = None

    def step(self, before: int, masks: Tensor, after: int) -> Tensor:
        """Masks [I, H, W] of frame `after` from those of frame `before`."""
        if before == self.start or self.seen is None or self.seen.index != before:
            self.seen = None
        vectors = self._vectors(before, masks)
        session = self._open(after, vectors)
        assert session.features is not None
        self.pipeline.say(session)
        prediction = self.pipeline.segment(session)
        guide = guide_of(session.frames, 0, self.model.settings.refinement)
        row = row_of(prediction, 0, len(masks), "region", guide)
        found = interactive(row, _box(self.model, self.frames[after]), unique=True)
        for number, score in enumerate(found.scores.tolist()):
            self.scores[number][after] = score
        self.seen = _Seen(index=after, features=session.features, vectors=vectors)
        return found.masks & (found.scores >= self.lost)[:, None, None]

    def _vectors(self, before: int, masks: Tensor) -> Tensor:
        """Region vectors [I, D] pooled from frame `before`; an unseen object keeps its last."""
        front, config = self.model.model.front, self.model.config
        with torch.no_grad():
            features = (
                front.encode(to_pictures([self.frames[before]], config))
                if self.seen is None
                else self.seen.features
            )
            whole = np.ones(config.hierarchical.image_size, np.bool_)
            fitted = [fit_mask(m, config.hierarchical.image_size) for m in masks.numpy()]
            points = np.stack(
                [
                    sample_points(mask if mask.any() else whole, config.region.num_points)
                    for mask in fitted
                ]
            )
            pooled = front.pool_regions(features, torch.from_numpy(points)[None])[0]
        visible = torch.tensor([bool(mask.any()) for mask in fitted])
        if self.seen is not None:
            pooled = torch.where(visible[:, None], pooled, self.seen.vectors)
        return pooled

    def _open(self, index: int, vectors: Tensor) -> Session:
        frame = self.frames[index]
        stand_in: Bitmap = np.ones(frame.shape[:2], np.bool_)  # its vector is given, not pooled
        request = Request(
            task="interactive", image=frame, regions=(stand_in,) * len(vectors), seed=self.seed
        )
        return self.pipeline.open([request], region_vectors=vectors[None])


def _class_instances(
    model: Focus,
    frames: Sequence[Pixels],
    classes: tuple[str, ...],
    thresholds: Thresholds | None,
    seed: int,
) -> list[Instances]:
    pipeline = model.pipeline()
    found: list[Instances] = []
    for at in range(0, len(frames), CHUNK):
        requests = [
            Request(task="class", classes=classes, image=frame, seed=seed)
            for frame in frames[at : at + CHUNK]
        ]
        session = pipeline.open(requests)
        pipeline.say(session)
        boxes = [_box(model, frame) for frame in frames[at : at + CHUNK]]
        counts = [len(classes)] * len(requests)
        limits = thresholds or Thresholds(object=model.settings.object_score)
        found += decode(
            pipeline.segment(session),
            "class",
            counts,
            boxes,
            thresholds=limits,
            pictures=session.frames,
            refinement=model.settings.refinement,
        )
    return found


def _box(model: Focus, frame: Pixels) -> Letterbox:
    size = (frame.shape[0], frame.shape[1])
    return Letterbox.fit(size, model.config.hierarchical.image_size)


def _mask_of(masks: Sequence[Bitmap], number: int, size: tuple[int, int]) -> Bitmap:
    return masks[number] if number < len(masks) else np.zeros(size, np.bool_)


def _unchanged(frame: Pixels) -> EditResult:
    from PIL import Image

    picture = Image.fromarray(frame)
    nothing: Bitmap = np.zeros(frame.shape[:2], np.bool_)
    return EditResult(image=picture, mask=nothing, text="", raw=picture)
