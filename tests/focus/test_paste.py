"""Pasting: the edit under the mask and its rim, the source everywhere else."""

import numpy as np

from focus.paste import paste

SOURCE = np.zeros((40, 60, 3), np.uint8)
DRAWN = np.full((40, 60, 3), 200, np.uint8)


def test_an_object_is_pasted_with_a_rim_of_one_cell() -> None:
    mask = np.zeros((40, 60), np.bool_)
    mask[10:20, 30:40] = True
    wide = np.zeros_like(mask)
    wide[8:22, 28:42] = True
    assert np.array_equal(paste(SOURCE, DRAWN, mask, 2.0)[..., 0] == 200, wide)
    thin = np.zeros_like(mask)
    thin[9:21, 29:41] = True
    assert np.array_equal(paste(SOURCE, DRAWN, mask, 0.3)[..., 0] == 200, thin)


def test_a_backdrop_does_not_eat_what_stands_before_it() -> None:
    mask = np.ones((40, 60), np.bool_)
    mask[10:14, 30:34] = False
    assert np.array_equal(paste(SOURCE, DRAWN, mask, 4.0)[..., 0] == 200, mask)


def test_nothing_is_pasted_without_a_mask() -> None:
    assert np.array_equal(paste(SOURCE, DRAWN, np.zeros((40, 60), np.bool_), 2.0), SOURCE)
