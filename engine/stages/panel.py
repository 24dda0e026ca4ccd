"""Contact sheets of what a model does in training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from torch import Tensor


def tile(rows: Sequence[Tensor], zoom: int = 2) -> npt.NDArray[np.uint8]:
    """Stack rows of pictures [n, 3, h, w] in [0, 1] into one picture, enlarged without smoothing.

    Every row is brought to the size of the first.
    """
    height, width = rows[0].shape[-2:]
    lines = []
    for row in rows:
        fitted = row.detach().float().clamp(0, 1).cpu()
        if fitted.shape[-2:] != (height, width):
            fitted = F.interpolate(fitted, (height, width), mode="area")
        framed = F.pad(fitted, (1, 1, 1, 1), value=1.0)
        lines.append(np.concatenate(list(framed.permute(0, 2, 3, 1).numpy()), axis=1))
    sheet = np.concatenate(lines, axis=0)
    enlarged = sheet.repeat(zoom, 0).repeat(zoom, 1)
    return np.asarray((enlarged * 255).round(), np.uint8)


def tint(pictures: Tensor, masks: Tensor) -> Tensor:
    """Lay masks [n, h, w] in [0, 1] over pictures [n, 3, h, w] in orange."""
    colour = pictures.new_tensor([0.9, 0.6, 0.0])[:, None, None]
    share = 0.6 * masks.to(pictures.dtype)[:, None]
    return pictures * (1 - share) + colour * share
