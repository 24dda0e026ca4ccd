"""Referring expressions on still pictures: RefCOCO/+/g, RefClef, gRefCOCO."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.convert.coco import plain_name
from engine.data.convert.format import (
    Item,
    Lazy,
    Options,
    find,
    join_names,
    read_bytes,
    read_json,
    read_pickle,
)
from engine.data.rle import decode_segmentation
from engine.data.schema import safe_key

COCO_PICTURES = ("images/mscoco/images/train2014", "images/train2014", "train2014")
CLEF_PICTURES = ("images/saiapr_tc-12", "saiapr_tc-12", "images")


def single(name: str, splitter: str, root: Path, options: Options) -> Iterator[Lazy]:
    """NAME/refs(SPLITTER).p and NAME/instances.json; `variant` is another splitter."""
    splitter = options.variant or splitter
    base = find(root, name, ".")
    refs = read_pickle(find(base, f"refs({splitter}).p"))
    pictures = CLEF_PICTURES if name == "refclef" else COCO_PICTURES
    yield from _samples(name, refs, base, options.images or find(root, *pictures), options)


def grouped(root: Path, options: Options) -> Iterator[Lazy]:
    """grefcoco/grefs(unc).json (or .p) and its instances.json; several or no targets."""
    base = find(root, "grefcoco", "gRefCOCO", ".")
    path = find(base, "grefs(unc).json", "grefs(unc).p")
    refs = read_json(path) if path.suffix == ".json" else read_pickle(path)
    folder = options.images or find(root, *COCO_PICTURES)
    yield from _samples("grefcoco", refs, base, folder, options)


def _samples(name: str, refs: Any, base: Path, folder: Path, options: Options) -> Iterator[Lazy]:
    told = read_json(find(base, "instances.json"))
    images = {image["id"]: image for image in told["images"]}
    annotations = {a["id"]: a for a in told["annotations"]}
    names = {c["id"]: plain_name(c["name"]) for c in told["categories"]}
    split = options.split or "train"
    for ref in refs:
        if ref["split"] != split:
            continue
        ids = ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]
        image = images[ref["image_id"]]
        targets = [annotations[i] for i in ids if i != -1]
        make = partial(_item, name, ref, image, targets, names, folder)
        yield Lazy(f"{name} ref {ref['ref_id']}", make)


def _item(
    name: str,
    ref: Mapping[str, Any],
    image: Mapping[str, Any],
    targets: Sequence[Mapping[str, Any]],
    names: Mapping[Any, str],
    folder: Path,
) -> Item:
    size = int(image["height"]), int(image["width"])
    texts = [str(s.get("sent") or s["raw"]).strip() for s in ref["sentences"]]
    texts = [text for text in dict.fromkeys(texts) if text]
    mask = np.zeros(size, np.bool_)
    for target in targets:
        mask |= decode_segmentation(target["segmentation"], *size)
    return Item(
        key=safe_key(f"{name}-{ref['ref_id']}"),
        task="referring",
        kind="no_target" if not targets else "single" if len(targets) == 1 else "several",
        text=texts[0] if texts else "",
        texts=tuple(texts[1:]),
        answer=join_names([names[target["category_id"]] for target in targets]),
        image=read_bytes(folder, str(image["file_name"])),
        masks=(mask,) if targets else (),
        labels=(0,) if targets else (),
        source=str(image["file_name"]),
    )
