"""A contact sheet of a dataset: pictures with their masks tinted, and what is said about them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image as Pillow
from PIL import ImageDraw

from engine.data.guard import BadSample, decode_picture
from engine.data.manifest import Dataset
from engine.data.records import Image, Mask
from engine.data.schema import Item, decode

CELL = 160  # pixels of a thumbnail's longer side
LINES = 4
TINTS = ((230, 60, 60), (60, 120, 230), (60, 180, 90), (230, 180, 40), (170, 80, 200))


def draw_sheet(dataset: Dataset, count: int, seed: int, columns: int = 6) -> Pillow.Image:
    """Draw `count` samples of every task in rows of `columns`; broken ones show their reason."""
    cells: list[Pillow.Image] = []
    rng = np.random.default_rng(seed)
    for task in np.unique(dataset.rows["task"]):
        numbers = np.flatnonzero(dataset.rows["task"] == task)
        chosen = rng.permutation(numbers)[:count]
        cells += [_cell(dataset, int(number)) for number in np.sort(chosen)]
    height = CELL + 12 * LINES + 6
    rows = -(-len(cells) // columns)
    sheet = Pillow.new("RGB", (columns * (CELL + 8), max(1, rows) * height), "white")
    for place, cell in enumerate(cells):
        sheet.paste(cell, (place % columns * (CELL + 8) + 4, place // columns * height + 2))
    return sheet


def _cell(dataset: Dataset, number: int) -> Pillow.Image:
    cell = Pillow.new("RGB", (CELL, CELL + 12 * LINES), "white")
    try:
        item = decode(dataset.read(number))
        words = _words(item)
        for place, picture in enumerate(parts := _pictures(item)):
            thumb = Pillow.fromarray(picture)
            thumb.thumbnail((CELL // len(parts), CELL))
            cell.paste(thumb, (place * CELL // len(parts), 0))
    except BadSample as error:
        words = f"BROKEN {error}"
    told = "\n".join(textwrap.wrap(words, 26)[:LINES])
    plain = told.encode("latin-1", "replace").decode("latin-1")
    ImageDraw.Draw(cell).multiline_text((0, CELL), plain, fill="black", spacing=1)
    return cell


def _words(item: Item) -> str:
    said = item.text or (item.turns[0][1] if item.turns else ", ".join(item.classes))
    answer = item.answer or (item.turns[1][1] if len(item.turns) > 1 else "")
    return f"[{item.task}] {said}" + (f" -> {answer}" if answer else "")


def _pictures(item: Item) -> list[Image]:
    """Input with masks, then target; of a clip its first and its last frame."""
    if item.frames:
        ends = (0, len(item.frames) - 1) if len(item.frames) > 1 else (0,)
        return [
            tint(decode_picture(item.frames[n]), [t[n] for t in item.tracks if t[n] is not None])  # type: ignore[misc]
            for n in ends
        ]
    found = []
    if item.image is not None:
        found.append(tint(decode_picture(item.image), [*item.masks, *item.regions]))
    if item.target is not None:
        found.append(decode_picture(item.target))
    return found


def tint(image: Image, masks: Sequence[Mask]) -> Image:
    """Lay a colour over each mask."""
    out = image.astype(np.float32)
    for number, mask in enumerate(masks):
        out[mask] = 0.5 * out[mask] + 0.5 * np.array(TINTS[number % len(TINTS)], np.float32)
    return out.astype(np.uint8)
