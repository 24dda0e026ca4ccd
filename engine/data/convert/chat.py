"""Conversations about pictures, and captions: LLaVA / ShareGPT JSON, img2dataset shards."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from engine.data.convert.format import (
    BadSample,
    DataError,
    Item,
    Lazy,
    Options,
    find,
    read_bytes,
    read_json,
)
from engine.data.schema import PICTURES, safe_key

Turns = tuple[tuple[str, str], ...]
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "system": "system",
}
DESCRIBE = "Describe the picture."


def read_turns(told: Any) -> Turns:
    """Read [{from, value}] or [{role, content}] as (role, text); "<image>" is taken out.

    Raises: BadSample for other forms, unknown roles, or a dialogue without an answer.
    """
    turns = []
    for turn in told:
        role = ROLES.get(str(turn.get("from") or turn.get("role") or "").lower())
        content = turn.get("value") if turn.get("value") is not None else turn.get("content")
        if isinstance(content, list):  # parts: [{"type": "text", "text": ..}, {"type": "image"}]
            content = " ".join(str(p.get("text", "")) for p in content if p.get("type") == "text")
        if role is None or not isinstance(content, str):
            raise BadSample("bad_schema", f"a turn with a role and a text expected, got {turn}")
        turns.append((role, content.replace("<image>", "").strip()))
    if not any(role == "assistant" and text for role, text in turns):
        raise BadSample("bad_schema", "a dialogue with an answer expected")
    return tuple(turns)


def chat(root: Path, options: Options) -> Iterator[Lazy]:
    """ROOT.json (or *.json, *.jsonl in ROOT) of dialogues; `images` is their pictures' folder."""
    files = [root] if root.is_file() else sorted([*root.glob("*.json"), *root.glob("*.jsonl")])
    files = [file for file in files if options.split in file.name]
    if not files:
        raise DataError(f"{root}: a JSON file of dialogues expected")
    folder = options.images or (root.parent if root.is_file() else root)
    for file in files:
        for number, row in enumerate(_rows(file)):
            yield Lazy(f"{file.name} {number}", partial(_chat_item, file, number, row, folder))


def _rows(file: Path) -> Iterator[Any]:
    if file.suffix == ".json":
        yield from read_json(file)
        return
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError:
                    yield line  # named broken when it is made


def _chat_item(file: Path, number: int, row: Any, folder: Path) -> Item:
    if not isinstance(row, Mapping):
        raise BadSample("bad_json", "an object per dialogue expected")
    images = row.get("images") or ([row["image"]] if row.get("image") else [])
    if len(images) > 1:
        raise BadSample("bad_schema", f"at most one picture expected, got {len(images)}")
    return Item(
        key=safe_key(f"{file.stem}-{number}"),
        task="vqa" if images else "text",
        kind="dialogue",
        turns=read_turns(row.get("conversations") or row.get("messages") or ()),
        image=read_bytes(folder, str(images[0])) if images else None,
        source=str(row.get("id", "")) or f"{file.name}:{number}",
    )


def web(root: Path, options: Options) -> Iterator[Lazy]:
    """NNNNN.tar of KEY.jpg, KEY.txt, KEY.json; `variant`: caption (default) or generation."""
    files = [root] if root.is_file() else sorted(find(root, ".").glob("*.tar"))
    if options.variant not in ("", "caption", "generation"):
        raise DataError(f"variant caption or generation expected, got {options.variant!r}")
    for file in files:
        for key, members in _groups(file):
            yield Lazy(f"{file.name} {key}", partial(_web_item, file, key, members, options))


def _groups(file: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Samples of a tar in order: key and, by ending, where each member's bytes lie."""
    key, members = "", dict[str, tuple[int, int]]()
    try:
        with tarfile.open(file, "r:") as tar:
            for info in tar:
                own, _, ending = info.name.partition(".")
                if not info.isfile() or not ending:
                    continue
                if own != key and members:
                    yield key, members
                    members = {}
                key = own
                members[ending.lower()] = (info.offset_data, info.size)
    except tarfile.ReadError as error:
        yield key or "?", {"broken": (0, len(str(error)))}
        return
    if members:
        yield key, members


def _web_item(
    file: Path, key: str, members: Mapping[str, tuple[int, int]], options: Options
) -> Item:
    def read(ending: str) -> bytes:
        offset, size = members[ending]
        with file.open("rb") as opened:
            opened.seek(offset)
            data = opened.read(size)
        if len(data) < size:
            raise BadSample("shard_truncated", f"{file.name} ends inside {key}.{ending}")
        return data

    if "broken" in members:
        raise BadSample("shard_truncated", f"{file.name} is no whole tar (after {key})")
    told = json.loads(read("json")) if "json" in members else {}
    if told.get("status", "success") != "success":
        raise BadSample("missing_member", f"img2dataset says {told.get('status')}")
    ending = next((e for e in (*PICTURES, "jpeg") if e in members), None)
    if ending is None:
        raise BadSample("missing_member", "a picture")
    caption = told.get("caption") or (read("txt").decode() if "txt" in members else "")
    caption = " ".join(str(caption).split())
    if not caption:
        raise BadSample("missing_member", "a caption")
    drawn = options.variant == "generation"
    return Item(
        key=safe_key(f"{file.stem}-{key}"),
        task="generation" if drawn else "vqa",
        kind="caption",
        text=caption if drawn else DESCRIBE,
        answer="" if drawn else caption,
        image=None if drawn else read(ending),
        target=read(ending) if drawn else None,
        source=str(told.get("url", "")),
    )
