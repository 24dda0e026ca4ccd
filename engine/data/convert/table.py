"""Parquet tables: edit triplets (six datasets) and instruction texts (OpenOrca, Magpie)."""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow

from engine.data.convert.chat import Turns, read_turns
from engine.data.convert.format import BadSample, DataError, Item, Lazy, Options
from engine.data.guard import check_picture
from engine.data.records import Mask
from engine.data.schema import safe_key

BATCH = 64  # rows read at a time


@dataclass(frozen=True, kw_only=True)
class EditColumns:
    """Names under which a dataset keeps a triplet; the first that a file has is taken."""

    source: Sequence[str]
    target: Sequence[str]
    text: Sequence[str]
    mask: Sequence[str] = ()
    key: Sequence[str] = ()
    kind: Sequence[str] = ()


EDITS: Mapping[str, EditColumns] = {
    "instructpix2pix": EditColumns(
        source=("original_image",), target=("edited_image",), text=("edit_prompt",)
    ),
    "magicbrush": EditColumns(
        source=("source_img",),
        target=("target_img",),
        text=("instruction",),
        mask=("mask_img",),
        key=("img_id", "turn_index"),
    ),
    "ultraedit": EditColumns(
        source=("source_image",),
        target=("edited_image",),
        text=("edit_prompt",),
        mask=("mask_image",),
    ),
    "anyedit": EditColumns(
        source=("image_file", "source_image"),
        target=("edited_file", "target_image"),
        text=("edit_instruction", "edit", "instruction"),
        kind=("edit_type",),
    ),
    "omniedit": EditColumns(
        source=("src_img",),
        target=("edited_img",),
        text=("edited_prompt_list",),
        key=("omni_edit_id",),
        kind=("task",),
    ),
    "seed_edit": EditColumns(
        source=("source_image",),
        target=("target_image", "edited_image"),
        text=("instruction", "edit_prompt"),
    ),
}


def edits(name: str, root: Path, options: Options) -> Iterator[Lazy]:
    """Parquet files of edit triplets, pictures as {bytes, path}."""
    columns = EDITS[name]
    for file, number, row in rows(root, options.split):
        label = f"{file.name} row {number}"
        yield Lazy(label, partial(_edit_item, name, columns, file, number, row))


class Row:
    """One row of a batch, its values read only when asked for."""

    def __init__(self, batch: Any, at: int) -> None:
        self._batch = batch
        self._at = at
        self.names: Sequence[str] = batch.schema.names

    def get(self, names: Sequence[str]) -> Any:
        """The value of the first of these columns that there is, or None."""
        for name in names:
            if name in self.names:
                return self._batch.column(name)[self._at].as_py()
        return None


def rows(root: Path, split: str) -> Iterator[tuple[Path, int, Row]]:
    """Every row of the parquet files below `root` (named SPLIT* when a split is given)."""
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError("pyarrow is needed to read parquet; `pip install pyarrow`") from error
    files = [root] if root.is_file() else sorted(root.rglob("*.parquet"))
    files = [file for file in files if not split or split in file.relative_to(root).as_posix()]
    if not files:
        raise DataError(f"{root}: *.parquet files expected (split {split!r})")
    for file in files:
        number = 0
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=BATCH):
                for at in range(batch.num_rows):
                    yield file, number, Row(batch, at)
                    number += 1


def _edit_item(name: str, columns: EditColumns, file: Path, number: int, row: Row) -> Item:
    source, target = (_picture(row.get(own), own) for own in (columns.source, columns.target))
    told = row.get(columns.text)
    texts = [str(t).strip() for t in (told if isinstance(told, list) else [told or ""])]
    texts = [text for text in dict.fromkeys(texts) if text]
    drawn = row.get(columns.mask)
    masks = () if drawn is None else (_mask(_picture(drawn, columns.mask)),)
    own = [str(row.get([column])) for column in columns.key]
    return Item(
        key=safe_key("-".join([name, *(own or [file.stem, str(number)])])),
        task="editing",
        kind=str(row.get(columns.kind) or ""),
        text=texts[0] if texts else "",
        texts=tuple(texts[1:]),
        image=source,
        target=_fit(target, source),
        masks=masks if masks and masks[0].any() else (),
        labels=(0,) if masks and masks[0].any() else (),
        source=f"{file.name}:{number}",
    )


def _picture(value: Any, columns: Sequence[str]) -> bytes:
    data = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(data, bytes):
        raise BadSample("missing_member", f"a picture in column {' or '.join(columns)} expected")
    return data


def _mask(data: bytes) -> Mask:
    """White, or transparent where there is alpha, is what may change."""
    check_picture(data)
    with Pillow.open(io.BytesIO(data)) as opened:
        if "A" in opened.getbands() and opened.getchannel("A").getextrema() != (255, 255):
            return np.asarray(opened.getchannel("A")) < 128
        return np.asarray(opened.convert("L")) > 127


def _fit(target: bytes, source: bytes) -> bytes:
    """Resize the target to the source's size where a dataset keeps them apart."""
    want, have = check_picture(source), check_picture(target)
    if (want.height, want.width) == (have.height, have.width):
        return target
    ratio = (want.width / want.height) / (have.width / have.height)
    if not 0.98 < ratio < 1.02:
        told = f"{want.height} x {want.width} against {have.height} x {have.width}"
        raise BadSample("wrong_size", f"source and target of one shape expected, got {told}")
    buffer = io.BytesIO()
    with Pillow.open(io.BytesIO(target)) as opened:
        size = want.width, want.height
        opened.convert("RGB").resize(size, Pillow.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def texts(root: Path, options: Options) -> Iterator[Lazy]:
    """OpenOrca (system_prompt, question, response) or Magpie (conversations, or pairs)."""
    for file, number, row in rows(root, options.split):
        yield Lazy(f"{file.name} row {number}", partial(_text_item, file, number, row))


def _text_item(file: Path, number: int, row: Row) -> Item:
    turns: Turns
    told = row.get(("conversations", "messages"))
    if told is not None:
        turns = read_turns(told)
    else:
        question = row.get(("question", "instruction", "input", "prompt"))
        response = row.get(("response", "output", "answer"))
        turns = (("user", str(question)), ("assistant", str(response))) if question else ()
    system = row.get(("system_prompt", "system"))
    if system and turns and turns[0][0] != "system":
        turns = (("system", str(system)), *turns)
    return Item(
        key=safe_key(f"{file.stem}-{number}"),
        task="text",
        turns=turns,
        source=f"{file.name}:{number}",
    )
