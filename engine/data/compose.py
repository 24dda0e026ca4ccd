"""What a shard says of a sample, and its decoded pictures, as a record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from engine.data.guard import BadSample
from engine.data.layers import encode_map, from_cells, to_cells
from engine.data.pil import Copies, Levels
from engine.data.records import Record
from engine.data.rle import decode_rle
from engine.data.schema import Encoded


def turns_of(encoded: Encoded) -> tuple[tuple[str, str], ...]:
    """The [role, text] pairs of a dialogue."""
    return tuple((str(role), str(text)) for role, text in encoded.says.get("turns", ()))


def pair_turns(turns: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """The (question, answer) pairs of a dialogue; what the system says is left out.

    A last question without an answer keeps an empty one when it is the only one.
    """
    pairs: list[tuple[str, str]] = []
    asked: list[str] = []
    for role, said in turns:
        if role == "assistant":
            pairs.append(("\n".join(asked), said))
            asked = []
        elif role != "system":
            asked.append(said)
    if asked and not pairs:
        pairs.append(("\n".join(asked), ""))
    return tuple(pairs)


def read_layers(
    encoded: Encoded, size: tuple[int, int]
) -> tuple[bytes | None, list[tuple[int, ...]]]:
    """The map of a sample and the cells of its masks, then its regions; RLEs become a map."""
    told = [*encoded.says.get("masks", ()), *encoded.says.get("regions", ())]
    if not told:
        return None, []
    if any("rle" in one for one in told):
        found, cells = to_cells([decode_rle(one["rle"]) for one in told], size)
        return encode_map(found), list(cells)
    data = encoded.members.get("map.png")
    if data is None:
        raise BadSample("missing_member", "the index map")
    return data, [tuple(int(cell) for cell in one["cells"]) for one in told]


def still(encoded: Encoded, frame: int) -> Encoded:
    """One frame of a clip as a sample: referring to its track, or its objects by class."""
    says = encoded.says
    name = f"f{frame:04d}"
    ending = next(e for e in ("jpg", "png", "webp") if f"{name}.{e}" in encoded.members)
    members = {ending: encoded.members[f"{name}.{ending}"]}
    present = [(n, track[frame]) for n, track in enumerate(says["tracks"]) if track[frame]]
    if present:
        data = encoded.members.get(f"{name}.map.png")
        if data is None:
            raise BadSample("missing_member", f"the map of frame {frame}")
        members["map.png"] = data
    new: dict[str, Any] = {**says, "masks": [{"cells": cells} for _, cells in present]}
    new["objects"] = [number for number, _ in present]
    if says.get("text"):
        reasons = says.get("kind") == "reasoning"
        new |= {"task": "reasoning" if reasons else "referring", "labels": [0] * len(present)}
    elif says.get("classes"):
        names = list(dict.fromkeys(says["classes"]))
        labels = [names.index(says["classes"][n]) for n, _ in present]
        new |= {"task": "class", "classes": names, "labels": labels}
    else:
        new |= {"task": "interactive", "labels": list(range(len(present)))}
        new |= {"regions": new["masks"], "region_kinds": ["mask"] * len(present)}
        if not present:
            raise BadSample("bad_schema", f"no object in frame {frame}")
    return Encoded(key=encoded.key, says=json.loads(json.dumps(new)), members=members)


def make_record(
    encoded: Encoded,
    texts: tuple[str, str],
    turns: Sequence[tuple[str, str]],
    picture: Copies | None,
    target: Copies | None,
    cells: Sequence[Sequence[int]],
) -> Record:
    """A record in the frame. Masks that the crop cut away leave their sample with their labels.

    A dialogue gives its first pair as text and answer, the others as turns.

    Raises: BadSample when a prompt region was cut away.
    """
    says = encoded.says
    levels: Levels | None = picture.map if picture is not None else None
    masks = from_cells(levels, cells) if levels is not None else ()
    count = len(says.get("masks", ()))
    labels = [int(label) for label in says.get("labels", ())]
    regions = masks[count:]
    if any(not region.any() for region in regions):
        raise BadSample("bad_mask", "a region lies outside the crop")
    objects = [int(number) for number in says.get("objects", ())]
    seen = [number for number, mask in enumerate(masks[:count]) if mask.any()]
    if len(labels) != count or len(objects) not in (0, count):
        told = f"one label per mask expected, got {len(labels)} for {count}"
        raise BadSample("bad_schema", told, encoded.key)
    text, answer = texts
    pairs = pair_turns(turns)
    if not text and pairs:
        text, answer = pairs[0]
    return Record(
        id=encoded.key,
        task=says["task"],
        text=text,
        answer=answer,
        classes=tuple(map(str, says.get("classes", ()))),
        image=None if picture is None else picture.frame,
        masks=tuple(masks[number] for number in seen),
        labels=tuple(labels[number] for number in seen),
        objects=tuple(objects[number] for number in seen) if objects else (),
        regions=tuple(regions),
        region_kinds=tuple(says.get("region_kinds", ())),
        target=None if target is None else target.frame,
        turns=pairs[1:],
        kind=str(says.get("kind", "")),
    )
