"""Clips: masks spread from any frame, objects come back, one instruction edits all frames."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.data.scenes import Clip, clip
from engine.data.words import tiny_vocabulary
from focus import Box, Focus, MaskRegion
from focus.model import FocusModel
from focus.presets import focus_tiny
from focus.request import RequestError
from focus.segment.predictor import Prediction
from focus.settings import Settings
from focus.video import track_regions


class ColourPipeline:
    """A predictor that finds the pixels whose colour is nearest to a region's, over all regions."""

    def open(self, requests: Sequence[Any], region_vectors: Tensor) -> Any:
        picture = torch.from_numpy(requests[0].image.copy()).permute(2, 0, 1)[None] / 255
        return SimpleNamespace(features=picture, frames=picture, vectors=region_vectors[0])

    def say(self, session: Any) -> None:
        return None

    def segment(self, session: Any) -> Prediction:
        distance = (session.features - session.vectors[:, :, None, None]).abs().amax(1)
        masks = torch.where(distance < 0.12, 8.0, -8.0)
        seen = (masks > 0).flatten(1).any(1)
        scores = torch.where(seen, 8.0, -8.0).diag()
        scores[scores == 0] = -8.0
        return Prediction(masks=masks[None], scores=scores[None], embeddings=session.vectors[None])


class ColourFront:
    def encode(self, pictures: Any) -> Tensor:
        return pictures.hierarchical

    def pool_regions(self, features: Tensor, points: Tensor) -> Tensor:
        size = torch.tensor(features.shape[-1:] + features.shape[-2:-1])
        column, row = (points[0] * size).long().unbind(-1)
        return features[0][:, row, column].median(dim=-1).values.T[None]


def oracle() -> Any:
    config = dataclasses.replace(focus_tiny(), name="oracle")
    return SimpleNamespace(
        config=config,
        settings=Settings(),
        model=SimpleNamespace(front=ColourFront()),
        pipeline=ColourPipeline,
        segment_batch=lambda requests: [
            SimpleNamespace(masks=list(requests[0].regions), names=["thing"] * 9)
        ],
    )


def colourful(num: int = 6) -> tuple[Clip, list[int]]:
    """A clip in which every object has its own colour, and the objects seen in all its frames."""
    for index in range(200):
        found = clip("train", 0, index, num, (128, 128))
        scene = found.scenes[0]
        backdrop = {scene.background.first, scene.background.second}
        colours = [o.colour for o in scene.objects] + sorted(backdrop)
        areas = np.array([[m.sum() for m in found.masks(i)] for i in range(len(scene.objects))])
        if len(set(colours)) == len(colours) and len(scene.objects) > 2 and areas.min() > 200:
            return found, list(range(len(scene.objects)))
    raise AssertionError("no such clip")


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))


@pytest.mark.parametrize("start", [0, 3, 5])
def test_masks_spread_from_any_frame_in_both_directions(start: int) -> None:
    found, objects = colourful()
    regions = [MaskRegion(found.masks(i)[start]) for i in objects]
    tracks = track_regions(oracle(), found.frames, regions, start)
    assert tracks.start == start and len(tracks) == len(objects)
    for i in objects:
        for t, truth in enumerate(found.masks(i)):
            assert iou(tracks.masks[i][t], truth) > 0.75, (i, t)


def test_spreading_from_the_middle_equals_a_forward_and_a_backward_run() -> None:
    found, objects = colourful()
    regions = [MaskRegion(found.masks(i)[3]) for i in objects]
    whole = track_regions(oracle(), found.frames, regions, 3)
    forward = track_regions(oracle(), found.frames[3:], regions, 0)
    backward = track_regions(oracle(), found.frames[3::-1], regions, 0)
    for i in objects:
        joined = [*backward.masks[i][:0:-1], *forward.masks[i]]
        for mine, other in zip(whole.masks[i], joined, strict=True):
            assert np.array_equal(mine, other)


def test_an_object_that_disappears_is_found_again() -> None:
    found, objects = colourful()
    target = objects[0]
    frames = [frame.copy() for frame in found.frames]
    background = np.median(frames[2][found.instances[2] == 0], axis=0).astype(np.uint8)
    for t in (2, 3):
        frames[t][found.masks(target)[t]] = background
    region = MaskRegion(found.masks(target)[0])
    tracks = track_regions(oracle(), frames, [region])
    assert not tracks.masks[0][2].any() and not tracks.masks[0][3].any()
    assert tracks.scores[0][2] < 0.25 < tracks.scores[0][4]
    assert iou(tracks.masks[0][4], found.masks(target)[4]) > 0.75


@pytest.fixture(scope="module")
def model() -> Focus:
    torch.manual_seed(0)
    config = focus_tiny()
    settings = Settings(words=2, steps=1)
    return Focus(FocusModel(config), tiny_vocabulary(config), settings)


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    return [np.asarray(frame) for frame in clip("train", 0, 0, 3, (48, 64)).frames]


def test_given_vectors_stand_for_pooled_regions(model: Focus, frames: list[np.ndarray]) -> None:
    from focus.request import Request

    mask = np.zeros((48, 64), bool)
    mask[10:30, 10:40] = True
    request = Request(task="interactive", image=frames[0], regions=(mask,))
    pipeline = model.pipeline()
    pooled = pipeline.open([request])
    assert pooled.features is not None and pooled.batch.region_points is not None
    vectors = model.model.front.pool_regions(pooled.features, pooled.batch.region_points)
    given = pipeline.open([request], region_vectors=vectors.detach())
    assert torch.equal(given.hidden, pooled.hidden)
    other = pipeline.open([request], region_vectors=vectors.detach() + 1)
    assert not torch.equal(other.hidden, pooled.hidden)


def test_real_model_follows_regions_words_and_classes(
    model: Focus, frames: list[np.ndarray]
) -> None:
    tracks = model.track(frames, regions=[Box(5, 5, 30, 30), Box(20, 10, 60, 40)], start=1)
    assert [len(masks) for masks in tracks.masks] == [3, 3]
    assert all(mask.shape == (48, 64) for masks in tracks.masks for mask in masks)
    named = model.track(frames, "the red circle")
    alone = model.segment(frames[2], "the red circle")
    assert np.array_equal(named.masks[0][2], alone.masks[0])
    classes = model.track(frames, classes=["red circle", "star"])
    assert all(name in ("red circle", "star") for name in classes.names)


def test_frames_of_a_still_clip_are_edited_alike(model: Focus, frames: list[np.ndarray]) -> None:
    still = [frames[0]] * 3
    edited = model.edit_clip(still, "make it red", seed=5)
    assert len(edited) == 3
    for result in edited[1:]:
        assert np.array_equal(np.asarray(result.raw), np.asarray(edited[0].raw))
    other = model.edit_clip(still[:1], "make it red", seed=6)
    assert not np.array_equal(np.asarray(other[0].raw), np.asarray(edited[0].raw))


def test_wrong_clips_are_named(model: Focus, frames: list[np.ndarray]) -> None:
    with pytest.raises(RequestError, match="exactly one"):
        model.track(frames)
    with pytest.raises(RequestError, match="at least one frame"):
        model.track([], "a circle")
    with pytest.raises(RequestError, match="frames of one size"):
        model.track([frames[0], frames[0][:20]], "a circle")
    with pytest.raises(RequestError, match="between 0 and 2"):
        model.track(frames, regions=[Box(0, 0, 9, 9)], start=3)
