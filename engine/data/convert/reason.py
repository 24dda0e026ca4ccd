"""Segmentation by indirect words and by prompts: ReasonSeg, COCO-Interactive (PSALM's files)."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow
from PIL import ImageDraw

from engine.data.convert.format import (
    BadSample,
    Item,
    Lazy,
    Options,
    find,
    read_bytes,
    read_json,
)
from engine.data.guard import check_picture
from engine.data.records import REGION_KINDS, Mask, RegionKind
from engine.data.rle import decode_rle, decode_segmentation
from engine.data.schema import safe_key

PSALM_NAMES: Mapping[RegionKind, str] = {
    "click": "point_visual_prompt_mask",
    "scribble": "scribble_visual_prompt_mask",
    "box": "box_visual_prompt_mask",
    "mask": "mask_visual_prompt_mask",
}


def reasonseg(root: Path, options: Options) -> Iterator[Lazy]:
    """SPLIT/NAME.jpg with NAME.json; explanatory/train.json, where it exists, gives answers."""
    folder = find(root, options.split or "train")
    told = root / "explanatory" / "train.json"
    answers = {row["image"]: row["outputs"] for row in read_json(told)} if told.exists() else {}
    for path in sorted(folder.glob("*.json")):
        yield Lazy(path.name, partial(_reason_item, folder, path, answers))


def _reason_item(folder: Path, path: Path, answers: Mapping[str, str]) -> Item:
    told = read_json(path)
    name = path.with_suffix(".jpg").name
    data = read_bytes(folder, name)
    header = check_picture(data)
    mask, ignore = draw_shapes(told["shapes"], header.height, header.width)
    texts = [text.strip() for text in told["text"] if text.strip()]
    return Item(
        key=safe_key(f"reason-{path.stem}"),
        task="reasoning",
        kind="sentence" if told.get("is_sentence") else "phrase",
        text=texts[0] if texts else "",
        texts=tuple(texts[1:]),
        answer=str(answers.get(name, "")),
        image=data,
        masks=(mask,),
        labels=(0,),
        ignore=ignore if ignore.any() else None,
        source=name,
    )


def draw_shapes(shapes: Any, height: int, width: int) -> tuple[Mask, Mask]:
    """Target and ignored pixels of ReasonSeg: largest polygon first, outlines included."""
    drawn = []
    for shape in shapes:
        label = str(shape["label"]).lower()
        points = [(float(x), float(y)) for x, y in shape["points"]]
        if label == "flag" or not points:
            continue
        canvas = Pillow.new("L", (width, height))
        if len(points) > 1:
            ImageDraw.Draw(canvas).polygon(points, fill=1, outline=1)
        pixels = np.asarray(canvas) > 0
        drawn.append((int(pixels.sum()), "ignore" in label, pixels))
    levels = np.zeros((height, width), np.uint8)
    for _, ignored, pixels in sorted(drawn, key=lambda one: -one[0]):
        levels[pixels] = 255 if ignored else 1
    return levels == 1, levels == 255


def interactive(root: Path, options: Options) -> Iterator[Lazy]:
    """coco_interactive_SPLIT_psalm.json; `variant` fixes the kind of prompt, else mixed."""
    split = options.split or "train"
    told = read_json(find(root, f"coco_interactive_{split}_psalm.json"))
    folder = options.images or find(root, f"{split}2017", "images", "train2017")
    for number, row in enumerate(told):
        yield Lazy(str(row["image"]), partial(_interactive_item, row, number, folder, options))


def _interactive_item(row: Mapping[str, Any], number: int, folder: Path, options: Options) -> Item:
    info = row["image_info"]
    size = int(info["height"]), int(info["width"])
    key = safe_key(f"interactive-{row.get('new_img_id', number)}")
    masks, regions, kinds = [], [], []
    for place, annotation in enumerate(row["anns"]):
        seed = zlib.crc32(f"{key}-{place}".encode())
        kind = options.variant or REGION_KINDS[seed % len(REGION_KINDS)]
        prompt = annotation.get(PSALM_NAMES[kind])  # type: ignore[index]
        mask = decode_segmentation(annotation["segmentation"], *size)
        if prompt is None or not mask.any():
            continue
        region = decode_rle(prompt)
        if region.any():
            masks.append(mask)
            regions.append(region)
            kinds.append(kind)
    if not masks:
        raise BadSample("bad_schema", "no annotation with a prompt", key)
    return Item(
        key=key,
        task="interactive",
        image=read_bytes(folder, str(row["image"]).split("/")[-1]),
        masks=tuple(masks),
        labels=tuple(range(len(masks))),
        regions=tuple(regions),
        region_kinds=tuple(kinds),
        source=str(row["image"]),
    )
