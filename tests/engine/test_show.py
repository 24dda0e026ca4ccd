"""What people are shown: the right pixels tinted, sizes that fit, texts that fit."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from engine.show import (
    COLOURS,
    MAX_SIDE,
    MIN_SIDE,
    before_after,
    overlay,
    presentable,
    spotlight,
    strip,
)


def square(side: int = 64) -> tuple[Image.Image, np.ndarray]:
    mask = np.zeros((side, side), bool)
    mask[side // 4 : side // 2, side // 4 : side // 2] = True
    return Image.new("RGB", (side, side), (20, 20, 20)), mask


def test_overlay_tints_the_mask_and_nothing_else() -> None:
    image, mask = square()
    found = np.asarray(overlay(image, [mask])).astype(int)
    factor = found.shape[0] // 64
    centre = found[24 * factor, 24 * factor]
    expected = 0.5 * 20 + 0.5 * np.asarray(COLOURS[0])
    assert np.abs(centre - expected).max() <= 1
    assert found[60 * factor, 60 * factor].tolist() == [20, 20, 20]


def test_overlay_outlines_each_mask_in_its_colour() -> None:
    image, mask = square()
    other = np.roll(mask, 24, axis=1)
    found = np.asarray(overlay(image, [mask, other])).reshape(-1, 3)
    for colour in COLOURS[:2]:
        assert (found == colour).all(1).sum() > 100


def test_overlay_takes_full_empty_and_one_pixel_masks() -> None:
    image, mask = square()
    for edge in (np.ones_like(mask), np.zeros_like(mask)):
        assert overlay(image, [edge]).size == (384, 384)
    dot = overlay(Image.new("RGB", (1, 1), (20, 20, 20)), [np.ones((1, 1), bool)])
    assert dot.size == (384, 384)
    assert dot.getpixel((192, 192)) != (20, 20, 20)


def test_overlay_adds_one_line_per_caption() -> None:
    image, mask = square()
    bare = overlay(image, [mask])
    one, two = overlay(image, [mask], ["a"]), overlay(image, [mask, mask], ["a", "b" * 500])
    assert bare.height < one.height < two.height
    assert bare.width == one.width == two.width
    np.testing.assert_array_equal(np.asarray(bare), np.asarray(one)[: bare.height])


def test_spotlight_keeps_the_mask_and_fades_the_rest() -> None:
    image, mask = square()
    found = np.asarray(spotlight(image, [mask]))
    assert found.shape == (64, 64, 3)
    assert found[24, 24].tolist() == [20, 20, 20]
    assert found[60, 60].min() > 180
    assert np.asarray(spotlight(image, []))[24, 24].min() > 180


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1, 1), (384, 384)),
        ((100, 50), (400, 200)),
        ((800, 600), (800, 600)),
        ((6400, 2), (1600, 1)),
    ],
)
def test_presentable_fits_a_screen(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert presentable(Image.new("RGB", size)).size == expected
    assert MIN_SIDE <= max(expected) <= MAX_SIDE


def test_before_after_shows_both_pictures() -> None:
    image, mask = square()
    sheet = np.asarray(before_after(image, Image.new("RGB", (64, 64), (0, 99, 0)), mask, "t" * 999))
    flat = sheet.reshape(-1, 3)
    assert (flat == (0, 99, 0)).all(1).sum() == 384 * 384
    inside_mask_and_before = (flat == (20, 20, 20)).all(1).sum()
    assert 384 * 384 < inside_mask_and_before < 1.1 * 384 * 384
    assert sheet.shape[1] > 3 * 384


def test_strip_scales_to_the_first_height() -> None:
    tall = strip(
        [("a", Image.new("RGB", (10, 400))), ("b", Image.new("RGB", (10, 200), (9, 9, 9)))]
    )
    assert (np.asarray(tall).reshape(-1, 3) == (9, 9, 9)).all(1).sum() == 20 * 400
