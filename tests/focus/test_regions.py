"""Region prompts: drawing, sampling and pooling."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from focus.config import HierarchicalConfig, RegionConfig
from focus.regions import (
    Box,
    Click,
    MaskRegion,
    Region,
    RegionError,
    RegionPooler,
    Scribble,
    fourier,
    pool_at,
    region_mask,
    sample_points,
)

SIZE = (40, 60)
CONFIG = RegionConfig(click_radius=5 / 60, scribble_radius=2 / 60)


def test_click_is_a_disc_even_at_the_corner() -> None:
    mask = region_mask(Click(30, 20), SIZE, CONFIG)
    rows, columns = np.nonzero(mask)
    assert np.hypot(rows - 20, columns - 30).max() <= 5
    assert mask.sum() == pytest.approx(np.pi * 25, rel=0.1)
    assert region_mask(Click(59.9, 39.9), SIZE, CONFIG)[39, 59]


def test_tiny_radius_still_marks_the_clicked_pixel() -> None:
    mask = region_mask(Click(7.6, 3.2), SIZE, RegionConfig(click_radius=0.0))
    assert np.argwhere(mask).tolist() == [[3, 7]]


def test_box_fills_its_pixels() -> None:
    mask = region_mask(Box(2, 3, 10, 5), SIZE)
    assert mask.sum() == 16
    assert mask[3:5, 2:10].all()
    assert region_mask(Box(2.4, 3.4, 2.6, 3.6), SIZE).sum() == 1


def test_scribble_points_and_scribble_mask_agree() -> None:
    points = region_mask(Scribble([(5, 5), (40, 5), (40, 30)]), SIZE, CONFIG)
    drawn = np.zeros(SIZE, np.uint8)
    drawn[5, 5:41] = 255
    drawn[5:31, 40] = 255
    np.testing.assert_array_equal(points, region_mask(Scribble(drawn), SIZE, CONFIG))
    assert points[5, 20]
    assert points[7, 20]
    assert not points[8, 20]


def test_mask_is_taken_as_it_is() -> None:
    given = np.zeros(SIZE, np.uint8)
    given[4:6, 8:9] = 1
    assert region_mask(MaskRegion(given), SIZE).sum() == 2


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (Click(60, 3), r"click: a point inside the picture .* got \(60, 3\)"),
        (Click(float("nan"), 3), "click: a point inside"),
        (Box(5, 5, 5, 9), r"box: 0 <= x0 < x1 <= 60"),
        (Box(-1, 5, 5, 9), "box: 0 <= x0"),
        (Scribble([(1, 1), (2, 41)]), r"scribble: a point inside .* got \(2, 41\)"),
        (Scribble([]), "at least one point"),
        (Scribble(np.zeros((4, 4), np.bool_)), r"scribble: a mask of the picture's size"),
        (MaskRegion(np.ones((60, 40), np.bool_)), r"size \(40, 60\).*got \(60, 40\)"),
        (MaskRegion(np.zeros(SIZE, np.bool_)), "got an empty mask"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(region: Region, message: str) -> None:
    with pytest.raises(RegionError, match=message):
        region_mask(region, SIZE)


def test_sampled_points_lie_inside_and_repeat_by_seed() -> None:
    mask = region_mask(Box(10, 8, 30, 12), SIZE)
    points = sample_points(mask, 50, seed=3)
    columns, rows = (points * (SIZE[1], SIZE[0])).astype(int).T
    assert mask[rows, columns].all()
    assert len({*zip(rows.tolist(), columns.tolist(), strict=True)}) == 50  # 80 pixels: no repeat
    np.testing.assert_array_equal(points, sample_points(mask, 50, seed=3))
    assert not np.array_equal(points, sample_points(mask, 50, seed=4))
    assert sample_points(mask, 200, seed=0).shape == (200, 2)


def test_points_without_seed_are_even_and_exact() -> None:
    mask = np.zeros((2, 4), np.bool_)
    mask[1] = True
    expected = [[0.125, 0.75], [0.375, 0.75], [0.625, 0.75], [0.875, 0.75]]
    assert sample_points(mask, 4).tolist() == expected
    with pytest.raises(RegionError, match="empty mask"):
        sample_points(np.zeros((2, 2), np.bool_), 4)


def test_pooling_averages_the_cells_under_the_points() -> None:
    feature = torch.arange(6.0).view(1, 1, 2, 3)
    points = torch.tensor([[[[0.5 / 3, 0.25], [2.5 / 3, 0.75]], [[0.5, 0.25], [0.5, 0.25]]]])
    assert pool_at(feature, points).tolist() == [[[2.5], [1.0]]]


HIERARCHICAL = HierarchicalConfig(dims=(4, 6, 8, 10))


def test_pooler_starts_as_the_plain_mean_and_can_learn_more() -> None:
    torch.manual_seed(0)
    config = RegionConfig(hierarchical_scale="res3", position=True)
    pooler = RegionPooler(config, HIERARCHICAL, llm_dim=5)
    image = torch.randn(2, 5, 3, 3)
    maps = [torch.randn(2, c, 16 >> i, 16 >> i) for i, c in enumerate(HIERARCHICAL.dims)]
    points = torch.rand(2, 4, 9, 2)
    torch.testing.assert_close(pooler(image, maps, points), pool_at(image, points))
    pooler(image, maps, points).square().sum().backward()
    assert pooler.fine is not None
    assert pooler.position is not None
    assert float(pooler.fine.weight.grad.abs().amax()) > 0  # type: ignore[union-attr]
    torch.nn.init.normal_(pooler.fine.weight)
    torch.nn.init.normal_(pooler.position.weight)
    expected = (
        pool_at(image, points)
        + pool_at(maps[1], points) @ pooler.fine.weight.T
        + fourier(points).mean(2) @ pooler.position.weight.T
    )
    torch.testing.assert_close(pooler(image, maps, points), expected)


def test_pooler_without_extras_has_no_parameters() -> None:
    config = dataclasses.replace(CONFIG, hierarchical_scale=None, position=False)
    assert not list(RegionPooler(config, HIERARCHICAL, llm_dim=5).parameters())
