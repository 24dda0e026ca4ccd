"""COCO and datasets written like it: panoptic, PACO-LVIS, PartImageNet, Pascal-Part."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow

from engine.data.convert.format import (
    BadSample,
    Item,
    Lazy,
    Options,
    find,
    join_names,
    pick_classes,
    read_bytes,
    read_json,
)
from engine.data.records import Mask
from engine.data.rle import decode_segmentation
from engine.data.schema import safe_key

Rename = Callable[[str], str]


def plain_name(name: str) -> str:
    """A category as words: "dog_(animal):front_leg" is "dog front leg"."""
    words = re.sub(r"_\([^)]*\)", "", name).replace(":", " ").replace("_", " ").replace("-", " ")
    return " ".join(words.split())


def instances(root: Path, options: Options) -> Iterator[Lazy]:
    """annotations/instances_SPLIT.json and SPLIT/*.jpg."""
    split = options.split or "train2017"
    told = read_json(find(root, f"annotations/instances_{split}.json", f"instances_{split}.json"))
    folder = options.images or find(root, split, f"images/{split}", "images")
    yield from _samples(told, folder, options, "instances")


def paco(root: Path, options: Options) -> Iterator[Lazy]:
    """annotations/paco_lvis_v1_SPLIT.json; pictures of COCO 2017, as train2017/N.jpg."""
    name = f"paco_lvis_v1_{options.split or 'train'}.json"
    told = read_json(find(root, f"annotations/{name}", name))
    yield from _samples(told, options.images or root, options, "parts")


def parts(root: Path, options: Options) -> Iterator[Lazy]:
    """SPLIT.json (PartImageNet, or Pascal-Part as VLPart wrote it) and pictures beside it."""
    split = options.split or "train"
    told = read_json(
        find(root, f"annotations/{split}.json", f"{split}.json", f"annotations/{split}_format.json")
    )
    folder = options.images or find(
        root, f"images/{split}", split, "images", "VOCdevkit/VOC2010/JPEGImages"
    )
    yield from _samples(told, folder, options, "parts")


def _samples(told: Any, folder: Path, options: Options, kind: str) -> Iterator[Lazy]:
    names = {c["id"]: plain_name(c["name"]) for c in told["categories"]}
    grouped: dict[Any, list[Any]] = defaultdict(list)
    for annotation in told["annotations"]:
        grouped[annotation["image_id"]].append(annotation)
    for image in told["images"]:
        own = grouped.get(image["id"], [])
        if own:
            make = partial(_instance_item, image, own, names, folder, options, kind)
            yield Lazy(file_name(image), make)


def _instance_item(
    image: Mapping[str, Any],
    annotations: list[Any],
    names: Mapping[Any, str],
    folder: Path,
    options: Options,
    kind: str,
) -> Item:
    size = int(image["height"]), int(image["width"])
    masks: list[Mask] = []
    found: list[str] = []
    ignore: Mask = np.zeros(size, np.bool_)
    for annotation in annotations:
        mask = decode_segmentation(annotation["segmentation"], *size)
        if annotation.get("iscrowd"):
            ignore |= mask
        elif mask.any():
            masks.append(mask)
            found.append(names[annotation["category_id"]])
    key = safe_key(f"{kind}-{image['id']}")
    classes = pick_classes(list(names.values()), found, options.classes, key)
    return Item(
        key=key,
        task="class",
        kind=kind,
        classes=tuple(classes),
        answer=join_names(found),
        image=read_bytes(folder, file_name(image)),
        masks=tuple(masks),
        labels=tuple(classes.index(name) for name in found),
        ignore=ignore if ignore.any() else None,
        source=file_name(image),
    )


def file_name(image: Mapping[str, Any]) -> str:
    """A picture's file; LVIS gives only an address that ends in split/number.jpg."""
    if "file_name" in image:
        return str(image["file_name"])
    return "/".join(str(image["coco_url"]).split("/")[-2:])


def panoptic(root: Path, options: Options) -> Iterator[Lazy]:
    """annotations/panoptic_SPLIT.json, its folder of PNGs (R + 256 G + 65536 B), SPLIT/*.jpg."""
    split = options.split or "train2017"
    told = read_json(find(root, f"annotations/panoptic_{split}.json", f"panoptic_{split}.json"))
    maps = find(root, f"annotations/panoptic_{split}", f"panoptic_{split}")
    folder = options.images or find(root, split, f"images/{split}", "images")
    names = {c["id"]: plain_name(c["name"]) for c in told["categories"]}
    images = {image["id"]: image for image in told["images"]}
    for annotation in told["annotations"]:
        image = images[annotation["image_id"]]
        make = partial(_panoptic_item, image, annotation, names, folder, maps, options)
        yield Lazy(file_name(image), make)


def _panoptic_item(
    image: Mapping[str, Any],
    annotation: Mapping[str, Any],
    names: Mapping[Any, str],
    folder: Path,
    maps: Path,
    options: Options,
) -> Item:
    ids = panoptic_ids(read_bytes(maps, str(annotation["file_name"])))
    masks: list[Mask] = []
    found: list[str] = []
    ignore = ids == 0
    for segment in annotation["segments_info"]:
        mask = ids == int(segment["id"])
        if segment.get("iscrowd"):
            ignore |= mask
        elif mask.any():
            masks.append(mask)
            found.append(names[segment["category_id"]])
    key = safe_key(f"panoptic-{image['id']}")
    classes = pick_classes(list(names.values()), found, options.classes, key)
    return Item(
        key=key,
        task="class",
        kind="panoptic",
        classes=tuple(classes),
        answer=join_names(found),
        image=read_bytes(folder, str(image["file_name"])),
        masks=tuple(masks),
        labels=tuple(classes.index(name) for name in found),
        ignore=ignore if ignore.any() else None,
        source=file_name(image),
    )


def panoptic_ids(data: bytes) -> np.ndarray:
    """Decode a panoptic PNG: id = R + 256 G + 65536 B, int64 [H, W]. Raises `BadSample`."""
    try:
        with Pillow.open(io.BytesIO(data)) as opened:
            colours = np.asarray(opened.convert("RGB")).astype(np.int64)
    except Exception as error:
        raise BadSample("undecodable", f"{type(error).__name__}: {error}") from error
    return np.asarray(colours @ np.array([1, 256, 65536]))
