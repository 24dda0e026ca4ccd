"""An edit goes back into its picture: every pixel outside the mask is the source's own."""

# H, W picture

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.ndimage import maximum_filter

FEATHER = 1  # cells of the decoder by which an edit reaches over its mask, so that no seam shows
BACKDROP = 0.5  # share of a picture above which a mask is what lies behind the rest


def paste(
    source: npt.NDArray[np.uint8],
    drawn: npt.NDArray[np.uint8],
    mask: npt.NDArray[np.bool_],
    cell: float,
) -> npt.NDArray[np.uint8]:
    """Return `drawn` [H, W, 3] under the mask [H, W] and a little over its rim, else `source`.

    cell: pixels of the picture per pixel that the decoder drew. A mask of what lies behind does not
    reach over its rim: it would eat into what stands in front.
    """
    if mask.mean() <= BACKDROP:
        reach = max(1, round(FEATHER * cell))
        mask = maximum_filter(mask, 2 * reach + 1)  # separable: a large reach costs no more
    return np.where(mask[..., None], drawn, source)
