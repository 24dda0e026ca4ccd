"""Any number of overlapping masks as one index map: pixels of equal membership share a cell.

A sample's masks, prompt regions and ignored pixels are stored as one greyscale picture and, for
each mask, the list of cells it is made of. One nearest-neighbour resize then resizes them all.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow

from engine.data.records import Mask
from engine.data.scene_model import DataError

Map = npt.NDArray[np.uint16]  # [H, W], 0 = in no mask
Cells = tuple[int, ...]
MAX_CELLS = 65_535
FEW = 16  # cells


def to_cells(masks: Iterable[Mask], size: tuple[int, int]) -> tuple[Map, list[Cells]]:
    """Return the index map of `size` and each mask's cells; an empty mask has none.

    Raises: DataError for a mask of another size, or more than 65,535 distinct overlaps.
    """
    found: npt.NDArray[np.int64] = np.zeros(size, np.int64)
    cells: list[list[int]] = []
    count = 1
    for mask in masks:
        if mask.shape != tuple(size):
            raise DataError(f"a mask of {size} expected, got {mask.shape}")
        inside = np.bincount(found[mask], minlength=count)
        whole = np.bincount(found.reshape(-1), minlength=count) if count > 1 else inside
        table = np.arange(count)
        own: list[int] = []
        for cell in np.flatnonzero(inside).tolist():
            if cell and inside[cell] == whole[cell]:
                own.append(cell)
                continue
            table[cell] = count
            own.append(count)
            for other in cells:
                if cell in other:
                    other.append(count)
            count += 1
        found[mask] = table[found[mask]]
        cells.append(own)
    if count > MAX_CELLS + 1:
        raise DataError(f"at most {MAX_CELLS} overlaps of masks expected, got {count - 1}")
    return found.astype(np.uint16), [tuple(sorted(own)) for own in cells]


def from_cells(found: npt.NDArray[np.integer], cells: Sequence[Sequence[int]]) -> tuple[Mask, ...]:
    """Return the bool mask of each list of cells."""
    masks: list[Mask] = []
    for own in cells:
        if len(own) <= FEW:  # comparing takes a fortieth of the time of a table
            mask = np.zeros(found.shape, np.bool_) if not own else found == own[0]
            for cell in own[1:]:
                mask |= found == cell
        else:
            table = np.zeros(max(int(found.max(initial=0)), *own) + 1, np.bool_)
            table[list(own)] = True
            mask = table[found]
        masks.append(mask)
    return tuple(masks)


def encode_map(found: Map) -> bytes:
    """Encode as an 8-bit greyscale PNG where the cells allow it, else as a 16-bit one."""
    buffer = io.BytesIO()
    small = int(found.max(initial=0)) < 256
    Pillow.fromarray(found.astype(np.uint8) if small else found).save(buffer, "PNG")
    return buffer.getvalue()
