"""Contact sheets of the built-in world: what a person looks at before trusting it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from engine.data.records import TASKS, Mask, Record
from engine.data.scene_tasks import as_size, sample
from engine.data.scene_video import Clip, clip
from engine.pictures import write_json, write_picture
from engine.show import overlay

_SIDE = 192  # pixels of a panel
_GAP, _LINE = 8, 15
_PAPER, _INK = (250, 249, 246), (30, 30, 34)

Panel = tuple[list[Image.Image], str]


def _fit(image: Image.Image) -> Image.Image:
    return image.resize((_SIDE, round(_SIDE * image.height / image.width)), Image.Resampling.BOX)


def _shown(picture: np.ndarray, masks: Sequence[Mask]) -> Image.Image:
    image = Image.fromarray(picture).resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
    return overlay(image, masks, enlarge=False) if masks else image


def _panel(record: Record) -> Panel:
    """Pictures of a record (regions, truth, target) and its words."""
    pictures = []
    if record.image is not None:
        if record.regions:
            pictures.append(_shown(record.image, record.regions))
        pictures.append(_shown(record.image, record.masks))
    if record.target is not None:
        pictures.append(_shown(record.target, ()))
    words = [record.kind, record.text, "/".join(record.classes), f"-> {record.answer}"]
    return pictures, "  ".join(w for w in words if w not in ("", "-> "))


def contact_sheet(panels: Sequence[Panel], width: int = 1400) -> Image.Image:
    """Panels in rows, as many as fit, each with its words below."""
    font = ImageFont.load_default(11)
    cells = [(len(p) * (_SIDE + 2), p, words) for p, words in panels]
    height = max(p.height for _, pictures, _ in cells for p in map(_fit, pictures))
    wrapped = {words: textwrap.wrap(words, max(10, span // 6)) for span, _, words in cells}
    step = height + max(map(len, wrapped.values())) * _LINE + _GAP
    rows: list[list[tuple[int, list[Image.Image], str]]] = [[]]
    for cell in cells:
        if rows[-1] and sum(c[0] + _GAP for c in rows[-1]) + cell[0] + 2 * _GAP > width:
            rows.append([])
        rows[-1].append(cell)
    wide = max(sum(c[0] + _GAP for c in row) for row in rows) + _GAP
    sheet = Image.new("RGB", (wide, step * len(rows) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        left, top = _GAP, _GAP + number * step
        for span, pictures, words in row:
            for k, picture in enumerate(pictures):
                sheet.paste(_fit(picture), (left + k * (_SIDE + 2), top))
            text = "\n".join(wrapped[words])
            draw.text((left, top + height + 2), text, fill=_INK, font=font)
            left += span + _GAP
    return sheet


def _truth(record: Record) -> dict[str, Any]:
    return {
        "id": record.id,
        "task": record.task,
        "kind": record.kind,
        "text": record.text,
        "answer": record.answer,
        "classes": record.classes,
        "labels": record.labels,
        "mask_pixels": [int(m.sum()) for m in record.masks],
        "region_kinds": record.region_kinds,
    }


def _clip_panel(found: Clip) -> Panel:
    shown = zip(found.frames, found.masks(), strict=True)
    return [_shown(frame, (mask,)) for frame, mask in shown], f"{found.text}  -> {found.answer}"


def write_samples(
    out_dir: str | Path,
    num: int = 12,
    seed: int = 0,
    size: int | tuple[int, int] = (128, 128),
    split: str = "val",
) -> list[Path]:
    """Write one PNG sheet per task and one of clips, with truth drawn in, and `samples.json`.

    num: samples per task. Every file is written atomically. Returns the paths.
    """
    out = Path(out_dir)
    size = as_size(size)
    written, truth = [], []
    for task in TASKS:
        records = [sample(task, split, seed, i, size) for i in range(num)]
        truth += [_truth(r) for r in records]
        sheet = contact_sheet([_panel(r) for r in records])
        written.append(write_picture(sheet, out / f"{task}.png"))
    clips = [clip(split, seed, i, 7, size) for i in range(max(1, num // 4))]
    written.append(write_picture(contact_sheet([_clip_panel(c) for c in clips]), out / "clip.png"))
    shown = [
        {"id": c.id, "task": "clip", "text": c.text, "answer": c.answer, "tracks": c.tracks}
        for c in clips
    ]
    report = {"split": split, "seed": seed, "size": size, "samples": truth + shown}
    written.append(write_json(report, out / "samples.json"))
    return written
