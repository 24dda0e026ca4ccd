"""Clips of the built-in world: tracks are where the pixels are."""

from __future__ import annotations

import numpy as np
import pytest

from engine.data.scenes import DataError, clip


def test_tracks_are_the_centres_of_the_drawn_objects() -> None:
    for index in range(4):
        found = clip("val", 1, index, 6, (128, 128))
        assert len(found.frames) == len(found.instances) == 6
        for t, instances in enumerate(found.instances):
            for i, item in enumerate(found.scenes[t].objects):
                rows, columns = np.nonzero(instances == i + 1)
                x, y = found.tracks[t, i]
                assert (x, y) == pytest.approx((item.x, item.y), abs=1e-6)
                if item.shape in ("circle", "ring", "square", "cross") and len(rows):
                    reach = 128 * item.radius
                    assert abs(columns.mean() + 0.5 - 128 * x) < 0.4 * reach
                    assert abs(rows.mean() + 0.5 - 128 * y) < 0.4 * reach


def test_objects_move_smoothly_and_bounce() -> None:
    bounced = 0
    for index in range(20):
        tracks = clip("train", 0, index, 24, 16).tracks
        step = np.diff(tracks, axis=0)
        assert np.abs(step).max() <= 0.0501 and np.hypot(*step[0].T).max() > 0
        assert tracks.min() > 0.09 and tracks.max() < 0.91
        bounced += int((np.sign(step[1:]) != np.sign(step[:-1])).any())
    assert bounced > 10


def test_target_is_named_alone_in_every_frame() -> None:
    for index in range(10):
        found = clip("test_unseen", 2, index, 8, 64)
        item = found.scenes[0].objects[found.target]
        assert found.answer.endswith(f"{item.colour} {item.shape}")
        assert found.masks()[0].any()
        assert all((m == (f == found.target + 1)).all() for m, f in zip(
            found.masks(), found.instances, strict=True
        ))  # fmt: skip


def test_objects_of_one_colour_never_touch() -> None:
    for index in range(15):
        found = clip("val", 3, index, 12, 16)
        for scene in found.scenes:
            for i, a in enumerate(scene.objects):
                for b in scene.objects[:i]:
                    if a.colour == b.colour:
                        assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


def test_clips_repeat_and_refuse_no_frames() -> None:
    first, again = clip("test", 4, 5, 3, 48), clip("test", 4, 5, 3, 48)
    assert first.text == again.text and (first.tracks == again.tracks).all()
    assert all((a == b).all() for a, b in zip(first.frames, again.frames, strict=True))
    with pytest.raises(DataError, match="expected at least one frame, got 0"):
        clip("test", 0, 0, 0)
