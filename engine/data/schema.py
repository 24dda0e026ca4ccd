"""What one sample of a shard is: the members of a task, read, written and checked.

    KEY.json         what the sample says (below)
    KEY.jpg|png|webp the input picture, its original bytes
    KEY.target.*     the picture to produce (generation, editing)
    KEY.fNNNN.*      the frames of a clip
    KEY.map.png      index map of masks, regions and ignored pixels (8- or 16-bit grey, no palette)
    KEY.fNNNN.map.png  the same of one frame

The JSON: schema, task, kind, text, texts (other wordings), answer, classes, labels, region_kinds,
turns ([role, text]), size [H, W], masks and regions (each {"cells": [..]} of the map or
{"rle": {..}}), boxes ([x0, y0, x1, y1] of each mask), ignore (cells), frames, tracks (one list per
object: the cells in each frame, null where it is absent), source. Empty fields are left out.

| task | picture | target | masks | must say |
|---|---|---|---|---|
| class | yes | - | any, label = number of its class | classes |
| referring, reasoning | yes | - | any (none: no such object) | text |
| interactive | yes | - | one per region, label = its region | regions, region_kinds |
| generation | - | yes | - | text |
| editing | yes | yes | at most one: what changes | text |
| vqa | yes | - | - | text and answer, or turns |
| text | - | - | - | turns |
| video | frames | - | tracks (classes: their names) | text or tracks |
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.data.guard import BadSample, Header, check_picture, decode_map, extension
from engine.data.layers import Cells, encode_map, from_cells, to_cells
from engine.data.records import REGION_KINDS, TASKS, Mask
from engine.data.rle import decode_rle, encode_rle
from engine.data.scene_model import DataError

SCHEMA = 1
SHARD_TASKS = (*TASKS, "text", "video")
KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
MAX_JSON = 16 << 20
PICTURES = ("jpg", "png", "webp")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One sample with its pictures still encoded and its masks decoded."""

    key: str
    task: str
    kind: str = ""
    text: str = ""
    texts: tuple[str, ...] = ()
    answer: str = ""
    classes: tuple[str, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    image: bytes | None = None
    target: bytes | None = None
    frames: tuple[bytes, ...] = ()
    masks: tuple[Mask, ...] = ()
    labels: tuple[int, ...] = ()
    regions: tuple[Mask, ...] = ()
    region_kinds: tuple[str, ...] = ()
    ignore: Mask | None = None
    tracks: tuple[tuple[Mask | None, ...], ...] = ()
    source: str = ""

    @property
    def picture(self) -> bytes | None:
        """The picture that decides the sample's size: input, first frame or target."""
        return self.image or (self.frames[0] if self.frames else self.target)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One sample as it lies in a shard: what it says, and its members undecoded."""

    key: str
    says: Mapping[str, Any]
    members: Mapping[str, bytes]

    def member(self, name: str) -> bytes | None:
        """The picture called `name` ("" = the input picture), whatever its format."""
        for ending in PICTURES:
            data = self.members.get(f"{name}.{ending}" if name else ending)
            if data is not None:
                return data
        return None

    def need(self, name: str) -> bytes:
        """The same, or BadSample("missing_member")."""
        data = self.member(name)
        if data is None:
            raise BadSample("missing_member", f"the picture {name or 'input'!r}", self.key)
        return data


def safe_key(text: str) -> str:
    """Turn any identifier into a key: letters, digits, "_" and "-"."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")[:80] or "x"


def check(item: Item) -> None:
    """Raise `BadSample` when the item lacks what its task needs (the table above)."""

    def need(condition: bool, text: str, reason: str = "bad_schema") -> None:
        if not condition:
            raise BadSample(reason, f"{item.task}: {text}", item.key)

    need(item.task in SHARD_TASKS, f"a task of {', '.join(SHARD_TASKS)} expected")
    need(KEY.fullmatch(item.key) is not None, "a key of letters, digits, _ and - expected")
    need(len(item.masks) == len(item.labels), "one label per mask expected")
    need(len(item.regions) == len(item.region_kinds), "one kind per region expected")
    need(set(item.region_kinds) <= set(REGION_KINDS), f"kinds of {REGION_KINDS} expected")
    drawn = item.task == "generation"
    pictured = not drawn and item.task not in ("text", "video")
    need((item.image is not None) == pictured, f"{'an' if pictured else 'no'} input picture")
    wants = item.task in ("generation", "editing")
    need((item.target is not None) == wants, f"{'a' if wants else 'no'} target picture")
    need(bool(item.frames) == (item.task == "video"), "frames belong to video, and only there")
    candidates = {"class": len(item.classes), "interactive": len(item.regions)}
    limit = candidates.get(item.task, 1)
    need(all(0 <= label < limit for label in item.labels), f"labels below {limit} expected")
    if item.task in candidates:
        need(limit > 0, "candidates (classes or regions) expected")
    elif item.task in ("vqa", "text"):
        need(bool(item.turns or (item.text and item.answer)), "turns, or text and answer, expected")
    elif item.task == "video":
        need(bool(item.text.strip() or item.tracks), "a text or tracks expected")
    else:
        need(bool(item.text.strip()), "a text expected")
    need(item.task != "editing" or len(item.masks) <= 1, "at most one mask expected")
    need(
        all(len(track) == len(item.frames) for track in item.tracks),
        "a track has one entry per frame",
    )


def encode(item: Item, *, rle: bool = False) -> tuple[list[tuple[str, bytes]], Header | None]:
    """Check an item and return its members (ending, bytes), JSON first, and its picture's header.

    `rle` stores masks and regions as RLE in the JSON instead of in the map.
    Raises: BadSample for what `check` or `check_picture` refuses and for masks of another size.
    """
    check(item)
    picture = item.picture
    header = None if picture is None else check_picture(picture)
    says = _plain(item)
    members: list[tuple[str, bytes]] = []
    for name, data in (("", item.image), ("target", item.target)):
        if data is not None:
            _add_picture(members, name, data, header, item)
    if header is not None:
        size = (header.height, header.width)
        says["size"] = list(size)
        try:
            members += _layers(item, says, size, rle)
        except BadSample:
            raise
        except DataError as error:
            raise BadSample("wrong_size", str(error), item.key) from error
    return [("json", json.dumps(says, ensure_ascii=False).encode()), *members], header


def _add_picture(
    members: list[tuple[str, bytes]], name: str, data: bytes, header: Header | None, item: Item
) -> None:
    own = check_picture(data)
    if header is not None and (own.height, own.width) != (header.height, header.width):
        raise BadSample(
            "wrong_size",
            f"{name or 'picture'} of {header.height} x {header.width} expected, "
            f"got {own.height} x {own.width}",
            item.key,
        )
    ending = extension(data)
    members.append((f"{name}.{ending}" if name else ending, data))


def _plain(item: Item) -> dict[str, Any]:
    says: dict[str, Any] = {"schema": SCHEMA, "task": item.task}
    for name in ("kind", "text", "texts", "answer", "classes", "turns", "labels", "region_kinds"):
        if getattr(item, name):
            says[name] = getattr(item, name)
    if item.source:
        says["source"] = item.source
    return says


def _layers(
    item: Item, says: dict[str, Any], size: tuple[int, int], rle: bool
) -> list[tuple[str, bytes]]:
    """Describe masks in `says`; return the maps."""
    if item.task == "video":
        return _track_maps(item, says, size)
    flat = [*item.masks, *item.regions, *([] if item.ignore is None else [item.ignore])]
    if not flat:
        return []
    if item.masks:
        says["boxes"] = [box_of(mask) for mask in item.masks]
    found, cells = to_cells(flat if not rle else flat[len(item.masks) + len(item.regions) :], size)
    if rle:
        told: list[dict[str, Any]] = [{"rle": encode_rle(m)} for m in (*item.masks, *item.regions)]
        if any(mask.shape != size for mask in flat):
            raise BadSample("wrong_size", "a mask of another size than its picture", item.key)
    else:
        told = [{"cells": list(own)} for own in cells]
    if item.ignore is not None:
        says["ignore"] = list(cells[-1])
    says["masks"] = told[: len(item.masks)]
    says["regions"] = told[len(item.masks) : len(item.masks) + len(item.regions)]
    return [("map.png", encode_map(found))] if cells else []


def _track_maps(item: Item, says: dict[str, Any], size: tuple[int, int]) -> list[tuple[str, bytes]]:
    members: list[tuple[str, bytes]] = []
    says["frames"] = len(item.frames)
    tracks: list[list[list[int] | None]] = [[] for _ in item.tracks]
    header = Header(format="", height=size[0], width=size[1], bits=8)
    for number, data in enumerate(item.frames):
        _add_picture(members, f"f{number:04d}", data, header, item)
        present = [track[number] for track in item.tracks]
        found, cells = to_cells([mask for mask in present if mask is not None], size)
        remaining = iter(cells)
        for track, mask in zip(tracks, present, strict=True):
            track.append(None if mask is None else list(next(remaining)))
        if cells:
            members.append((f"f{number:04d}.map.png", encode_map(found)))
    says["tracks"] = tracks
    return members


def box_of(mask: Mask) -> list[int]:
    """Tight box [x0, y0, x1, y1] of a mask, ends excluded; zeros when it is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return [0, 0, 0, 0]
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def parse(key: str, members: Mapping[str, bytes]) -> Encoded:
    """Read a sample's JSON and check its form; pictures stay as they are. Raises `BadSample`."""
    raw = members.get("json")
    if raw is None:
        raise BadSample("missing_member", "the JSON", key)
    try:
        if len(raw) > MAX_JSON:
            raise ValueError(f"at most {MAX_JSON} bytes expected, got {len(raw)}")
        says = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", str(error), key) from error
    if not isinstance(says, dict) or says.get("task") not in SHARD_TASKS:
        raise BadSample("bad_schema", "an object with a known task expected", key)
    if says.get("schema") != SCHEMA:
        told = f"schema {SCHEMA} expected, got {says.get('schema')!r}; convert the data anew"
        raise BadSample("bad_schema", told, key)
    return Encoded(key=key, says=says, members=members)


def decode(encoded: Encoded) -> Item:
    """Decode masks of a sample and check all of it (pictures by header). Raises `BadSample`."""
    says, key = encoded.says, encoded.key
    try:
        item = Item(
            key=key,
            task=says["task"],
            image=encoded.member(""),
            target=encoded.member("target"),
            turns=tuple((str(role), str(text)) for role, text in says.get("turns", ())),
            labels=tuple(int(label) for label in says.get("labels", ())),
            frames=tuple(encoded.need(f"f{n:04d}") for n in range(int(says.get("frames", 0)))),
            kind=str(says.get("kind", "")),
            text=str(says.get("text", "")),
            answer=str(says.get("answer", "")),
            source=str(says.get("source", "")),
            texts=tuple(map(str, says.get("texts", ()))),
            classes=tuple(map(str, says.get("classes", ()))),
            region_kinds=tuple(map(str, says.get("region_kinds", ()))),
        )
        item = dataclasses.replace(item, **_decode_masks(encoded))
        check(item)
        _check_sizes(item, tuple(says.get("size", ())))
    except BadSample as error:
        raise error.named(key) from error
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise BadSample("bad_schema", f"{type(error).__name__}: {error}", key) from error
    return item


def _check_sizes(item: Item, size: tuple[int, ...]) -> None:
    for data in (item.image, item.target, *item.frames):
        if data is not None:
            header = check_picture(data)
            if (header.height, header.width) != size:
                raise BadSample("wrong_size", f"{size} expected, got {header}")
    masks = [m for track in item.tracks for m in track if m is not None]
    masks += [*item.masks, *item.regions, *([] if item.ignore is None else [item.ignore])]
    for mask in masks:
        if mask.shape != size:
            raise BadSample("wrong_size", f"a mask of {size} expected, got {mask.shape}")


def _decode_masks(encoded: Encoded) -> dict[str, Any]:
    says = encoded.says
    if says["task"] == "video":
        maps = [encoded.members.get(f"f{n:04d}.map.png") for n in range(int(says["frames"]))]
        return {"tracks": tuple(_decode_track(track, maps) for track in says["tracks"])}
    told = [*says.get("masks", ()), *says.get("regions", ())]
    found = decode_layers(encoded)
    masks = [decode_rle(one["rle"]) if "rle" in one else _pick(found, one["cells"]) for one in told]
    count = len(says.get("masks", ()))
    ignore = _pick(found, says["ignore"]) if "ignore" in says else None
    return {"masks": tuple(masks[:count]), "regions": tuple(masks[count:]), "ignore": ignore}


def decode_layers(encoded: Encoded) -> np.ndarray | None:
    """Decode the index map of a sample, None when it has none."""
    data = encoded.members.get("map.png")
    return None if data is None else decode_map(data)


def _pick(found: np.ndarray | None, cells: Any) -> Mask:
    if found is None:
        raise BadSample("missing_member", "the index map")
    own: Cells = tuple(int(cell) for cell in cells)
    if any(not 0 < cell <= 65_535 for cell in own):
        raise BadSample("bad_mask", "cells from 1 to 65535 expected")
    return from_cells(found, [own])[0]


def _decode_track(track: Any, maps: list[bytes | None]) -> tuple[Mask | None, ...]:
    return tuple(
        None if cells is None else _pick(None if data is None else decode_map(data), cells)
        for cells, data in zip(track, maps, strict=True)
    )
