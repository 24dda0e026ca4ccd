"""The guided filter against its definition, and what it does to masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.data.scenes import sample
from focus.geometry import Letterbox
from focus.segment.infer import Guide, picture_masks
from focus.segment.refine import GuidedFilter, Refinement, refine


def by_definition(picture: np.ndarray, p: np.ndarray, radius: int, eps: float) -> np.ndarray:
    """Least squares window by window, in float64; windows are cut off at the edge."""
    height, width = p.shape
    slope, offset = np.zeros((height, width, 3)), np.zeros((height, width))

    def window(i: int, j: int) -> tuple[slice, slice]:
        return (
            slice(max(0, i - radius), i + radius + 1),
            slice(max(0, j - radius), j + radius + 1),
        )

    for i in range(height):
        for j in range(width):
            colours = picture[:, *window(i, j)].reshape(3, -1)
            values = p[window(i, j)].reshape(-1)
            centred = colours - colours.mean(1, keepdims=True)
            spread = centred @ centred.T / values.size + eps * np.eye(3)
            slope[i, j] = np.linalg.solve(spread, centred @ values / values.size)
            offset[i, j] = values.mean() - slope[i, j] @ colours.mean(1)
    found = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            near = slope[window(i, j)].reshape(-1, 3).mean(0)
            found[i, j] = near @ picture[:, i, j] + offset[window(i, j)].mean()
    return found


@pytest.mark.parametrize(("shape", "radius"), [((9, 13), 2), ((6, 5), 4), ((7, 7), 1)])
def test_the_filter_is_a_least_squares_fit_in_every_window(
    shape: tuple[int, int], radius: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(3, *shape, generator=generator, dtype=torch.float64)
    maps = torch.rand(2, *shape, generator=generator, dtype=torch.float64)
    found = GuidedFilter(picture, radius, 1e-2)(maps)
    for own, given in zip(found, maps, strict=True):
        expected = by_definition(picture.numpy(), given.numpy(), radius, 1e-2)
        np.testing.assert_allclose(own.numpy(), expected, rtol=0, atol=1e-12)
    single = GuidedFilter(picture.float(), radius, 1e-2)(maps.float())
    torch.testing.assert_close(single.double(), found, rtol=0, atol=1e-4)


def coarse(mask: np.ndarray) -> torch.Tensor:
    """Logits [1, h, w] at a quarter of the sides, as a predictor that knows each cell gives."""
    height, width = mask.shape
    share = mask.reshape(height // 4, 4, width // 4, 4).mean((1, 3))
    return torch.from_numpy(np.clip(8 * (share - 0.5), -4, 4)).float()[None]


def test_coarse_masks_of_scenes_come_to_fit_their_objects() -> None:
    before, after = [], []
    for index in range(12):
        record = sample("referring", "val", 2, index, 128)
        truth, logits = record.masks[0], coarse(record.masks[0])
        picture = torch.from_numpy(record.image).permute(2, 0, 1) / 255
        for found, guide in ((before, None), (after, Guide(picture, Refinement()))):
            mask = (picture_masks(logits, None, guide)[0] >= 0.5).numpy()
            found.append((mask & truth).sum() / (mask | truth).sum())
    assert np.mean(before) < 0.95
    assert np.mean(after) > 0.99 and min(after) > 0.97


def test_refined_masks_come_back_at_the_size_of_the_picture() -> None:
    box = Letterbox.fit((60, 100), (128, 128))
    picture = torch.full((3, 128, 128), 1.0)
    picture[0, 40:80, 30:70] = 0.0
    truth = np.zeros((128, 128), bool)
    truth[40:80, 30:70] = True
    found = picture_masks(coarse(truth), box, Guide(picture, Refinement()))
    assert found.shape == (1, 60, 100) and 0 <= found.min() and found.max() <= 1
    back = box.mask_back(truth)
    assert int(((found[0] >= 0.5).numpy() ^ back).sum()) <= 0.02 * back.sum()


def test_nothing_is_refined_to_nothing_and_a_flat_picture_only_smooths() -> None:
    flat = torch.full((3, 16, 16), 0.3)
    assert refine(torch.zeros(0, 16, 16), flat, Refinement()).shape == (0, 16, 16)
    constant = torch.full((1, 16, 16), 0.25)
    smooth = refine(constant, flat, Refinement(rounds=1))
    torch.testing.assert_close(smooth, constant, rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"radius": 0.0}, {"eps": 0.0}, {"rounds": 0}, {"sharpness": -1}])
def test_what_cannot_be_meant_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="radius between"):
        Refinement(**wrong)  # type: ignore[arg-type]
