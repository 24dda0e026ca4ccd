"""Clips: DAVIS-2017, YouTube-VIS, Ref-YouTube-VOS, ReVOS. A long video becomes several clips."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.convert.coco import plain_name
from engine.data.convert.format import (
    BadSample,
    Item,
    Lazy,
    Options,
    find,
    join_names,
    read_bytes,
    read_ids,
    read_json,
)
from engine.data.records import Mask
from engine.data.rle import decode_rle
from engine.data.schema import safe_key

VOID = 255
REVOS_KINDS = {0: "referring", 1: "reasoning", 2: "no_target"}
Track = tuple[Mask | None, ...]


def chunks(names: Sequence[str], most: int) -> Iterator[tuple[int, list[str]]]:
    """Cut a video into clips of at most `most` frames: (first frame, names)."""
    for first in range(0, len(names), most):
        yield first, list(names[first : first + most])


def davis(root: Path, options: Options) -> Iterator[Lazy]:
    """ImageSets/2017/SPLIT.txt, JPEGImages/480p/SEQ/*.jpg, palette Annotations/480p/SEQ/*.png."""
    resolution = options.variant or "480p"
    listed = find(root, f"ImageSets/2017/{options.split or 'train'}.txt").read_text().split()
    pictures, maps = root / "JPEGImages" / resolution, root / "Annotations" / resolution
    for sequence in listed:
        names = sorted(path.name for path in (pictures / sequence).glob("*.jpg"))
        for first, own in chunks(names, options.frames):
            make = partial(_indexed_clip, "davis", sequence, first, own, pictures, maps, None, "")
            yield Lazy(f"{sequence} from {first}", make)


def ref_youtube(root: Path, options: Options) -> Iterator[Lazy]:
    """meta_expressions/SPLIT/meta_expressions.json, SPLIT/JPEGImages, SPLIT/Annotations."""
    split = options.split or "train"
    told = read_json(
        find(
            root,
            f"meta_expressions/{split}/meta_expressions.json",
            f"{split}/meta_expressions.json",
        )
    )
    pictures, maps = find(root, f"{split}/JPEGImages"), root / split / "Annotations"
    for video, about in told["videos"].items():
        names = [f"{frame}.jpg" for frame in about["frames"]]
        for number, expression in about["expressions"].items():
            target = expression.get("obj_id")
            objects = [] if target is None else [int(target)]
            name = f"{video}-{number}"
            for first, own in chunks(names, options.frames):
                text = str(expression["exp"])
                where = (name, video, first, own, pictures, maps)
                make = partial(_indexed_clip, *where, objects, text)
                yield Lazy(f"{video} {number} from {first}", make)


def _indexed_clip(
    name: str,
    video: str,
    first: int,
    names: Sequence[str],
    pictures: Path,
    maps: Path,
    objects: Sequence[int] | None,
    text: str,
) -> Item:
    """A clip whose masks are palette pictures; `objects` None takes every number found."""
    ids = []
    for frame in names if objects is None or objects else ():
        file = Path(frame).with_suffix(".png").name
        ids.append(read_ids(read_bytes(maps / video, file)))
    if objects is None:
        objects = sorted({int(n) for one in ids for n in np.unique(one)} - {0, VOID})
    tracks = tuple(_track([one == number for one in ids]) for number in objects)
    return Item(
        key=safe_key(f"{name}-{video}-{first}"),
        task="video",
        kind="referring" if text else "objects",
        text=text,
        frames=tuple(read_bytes(pictures / video, frame) for frame in names),
        tracks=tracks,
        source=f"{video}/{names[0]}",
    )


def _track(masks: Sequence[Mask]) -> Track:
    return tuple(mask if mask.any() else None for mask in masks)


def youtube_vis(root: Path, options: Options) -> Iterator[Lazy]:
    """SPLIT.json (or SPLIT/instances.json) and SPLIT/JPEGImages/VIDEO/*.jpg."""
    split = options.split or "train"
    told = read_json(
        find(root, f"{split}.json", f"{split}/instances.json", f"annotations/{split}.json")
    )
    folder = options.images or find(root, f"{split}/JPEGImages", "JPEGImages", split)
    names = {c["id"]: plain_name(c["name"]) for c in told["categories"]}
    grouped: dict[Any, list[Any]] = defaultdict(list)
    for annotation in told.get("annotations") or ():
        grouped[annotation["video_id"]].append(annotation)
    for video in told["videos"]:
        files = video["file_names"]
        for first, own in chunks(files, options.frames):
            make = partial(_vis_clip, video, first, own, grouped[video["id"]], names, folder)
            yield Lazy(f"video {video['id']} from {first}", make)


def _vis_clip(
    video: Mapping[str, Any],
    first: int,
    files: Sequence[str],
    annotations: Sequence[Any],
    names: Mapping[Any, str],
    folder: Path,
) -> Item:
    tracks: list[Track] = []
    found: list[str] = []
    for annotation in annotations:
        runs = annotation["segmentations"][first : first + len(files)]
        track = _track_of_runs([runs], len(files))
        if any(mask is not None for mask in track):
            tracks.append(track)
            found.append(names[annotation["category_id"]])
    if not tracks:
        raise BadSample("bad_schema", "no object in the clip")
    return Item(
        key=safe_key(f"vis-{video['id']}-{first}"),
        task="video",
        kind="instances",
        classes=tuple(found),
        answer=join_names(found),
        frames=tuple(read_bytes(folder, name) for name in files),
        tracks=tuple(tracks),
        source=str(files[0]),
    )


def _track_of_runs(objects: Sequence[Sequence[Any]], frames: int) -> Track:
    """The union of several objects' RLEs in every frame."""
    track: list[Mask | None] = []
    for number in range(frames):
        union: Mask | None = None
        for runs in objects:
            if number < len(runs) and runs[number]:
                mask = decode_rle(runs[number])
                union = mask if union is None else union | mask
        track.append(union if union is not None and union.any() else None)
    return tuple(track)


def revos(root: Path, options: Options) -> Iterator[Lazy]:
    """meta_expressions_SPLIT_.json, mask_dict.json, VIDEO/*.jpg (or JPEGImages/VIDEO)."""
    split = options.split or "train"
    told = read_json(
        find(root, f"meta_expressions_{split}_.json", f"meta_expressions_{split}.json")
    )
    masks = read_json(find(root, "mask_dict.json"))
    folder = options.images or find(root, "JPEGImages", ".")
    for video, about in told["videos"].items():
        for number, expression in about["expressions"].items():
            runs = [masks[str(i)] for i in expression["anno_id"]]
            names = [f"{frame}.jpg" for frame in about["frames"]]
            for first, own in chunks(names, options.frames):
                cut = [one[first : first + len(own)] for one in runs]
                key = safe_key(f"revos-{video}-{number}-{first}")
                make = partial(_revos_clip, key, folder / video, own, expression, cut)
                yield Lazy(f"{video} {number} from {first}", make)


def _revos_clip(
    key: str, folder: Path, names: Sequence[str], expression: Mapping[str, Any], runs: Any
) -> Item:
    track = _track_of_runs(runs, len(names))
    return Item(
        key=key,
        task="video",
        kind=REVOS_KINDS.get(int(expression.get("type_id", 0)), "referring"),
        text=str(expression["exp"]),
        frames=tuple(read_bytes(folder, name) for name in names),
        tracks=(track,) if any(mask is not None for mask in track) else (),
        source=f"{folder.name}/{names[0]}",
    )
