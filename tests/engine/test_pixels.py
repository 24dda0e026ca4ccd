"""The rule on pixels: right on true pictures, also blurred and noisy, and hard to please."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import ndimage

from engine.data.scene_model import SHAPES, Background, Scene, SceneObject
from engine.data.scenes import render, requested, sample
from engine.evaluate.pixels import detect, present, share_present


def pairs(record_id: str) -> list[tuple[str, str]]:
    return [(r.colour, r.shape) for r in requested(record_id)]


@pytest.mark.parametrize(("split", "side"), [("val", 64), ("val", 128), ("test_unseen", 64)])
def test_true_pictures_show_what_was_requested(split: str, side: int) -> None:
    records = [sample("generation", split, 21, i, side) for i in range(12)]
    answers = [a for r in records if r.target is not None for a in present(r.target, pairs(r.id))]
    assert np.mean(answers) >= 0.95


def test_blur_and_noise_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    answers = []
    for index in range(10):
        r = sample("generation", "val", 22, index, 96)
        assert r.target is not None
        soft = ndimage.gaussian_filter(r.target.astype(float), (0.7, 0.7, 0))
        noisy = np.clip(soft + rng.normal(0, 10, soft.shape), 0, 255).astype(np.uint8)
        answers += present(noisy, pairs(r.id))
    assert np.mean(answers) >= 0.95


def test_wrong_pictures_do_not_score() -> None:
    records = [sample("generation", "val", 23, i, 64) for i in range(16)]
    answers = []
    for r, other in itertools.pairwise(records):
        assert other.target is not None
        absent = [p for p in pairs(r.id) if p not in pairs(other.id)]
        answers += present(other.target, absent)
    assert len(answers) > 20 and np.mean(answers) < 0.05
    rng = np.random.default_rng(1)
    for picture in (np.full((64, 64, 3), 190, np.uint8), rng.integers(0, 256, (64, 64, 3))):
        assert detect(picture.astype(np.uint8)) == []


def test_each_shape_is_told_and_measured() -> None:
    plain = Background(kind="plain", first="light grey", second="light grey")
    for shape in SHAPES:
        item = SceneObject(
            colour="blue", shape=shape, size="small", x=0.4, y=0.55, radius=0.1, depth=0, tilt=-0.15
        )
        image, _ = render(Scene(objects=(item,), background=plain), (64, 64))
        (found,) = detect(image)
        assert (found.colour, found.shape) == ("blue", shape)
        assert (found.x, found.y, found.radius) == pytest.approx((0.4, 0.55, 0.1), abs=0.02)


def test_every_patch_serves_one_request() -> None:
    r = sample("generation", "val", 24, 0, 128)
    assert r.target is not None
    pair = pairs(r.id)[0]
    num = pairs(r.id).count(pair)
    assert sum(present(r.target, [pair] * (num + 2))) == num
    assert share_present(r.target, [pair] * num) == 1.0
    assert share_present(r.target, []) == 1.0
