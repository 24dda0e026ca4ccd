"""Offline codes: the token ids that a frozen tokenizer gives the pictures of a dataset.

    NNNNN.codes.safetensors   "semantic/NUMBER" and "pixel/NUMBER", int32 [rows, columns], by the
                              sample's number in the shard; metadata: fingerprint of the tokenizer

The shards themselves stay as they are; the manifest names the fingerprint, so that codes of another
tokenizer are never mixed in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from engine.data.guard import BadSample
from engine.data.manifest import Dataset
from engine.data.pil import Copies, Decoder, Work
from engine.data.scene_model import DataError
from engine.data.shards import write_atomic
from engine.data.views import Sizes, bucket_sizes, make_view

ENDING = ".codes.safetensors"
Ids = npt.NDArray[np.int32]


class SampleCodes(NamedTuple):
    """Codes of one picture: semantic [hs, ws] and pixel [hp, wp] ids."""

    semantic: Ids
    pixel: Ids


Tokenize = Callable[[Sequence[Copies]], Sequence[SampleCodes]]


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How pictures are prepared for the tokenizer: the loader's geometry without augmentation."""

    fingerprint: str
    frame: tuple[int, int]
    sizes: Sizes | None = None
    crop: bool = True
    batch: int = 8


def fingerprint_of(weights: Path) -> str:
    """Fingerprint of a model: its weights' and its config's bytes."""
    digest = hashlib.sha256()
    for path in sorted([*weights.glob("*.safetensors"), *weights.glob("config.json")]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:24]


def encode_shard(
    dataset: Dataset, shard: int, tokenize: Tokenize, decoder: Decoder, how: Encoding
) -> int:
    """Write the codes of one shard unless they are there; return how many samples have codes."""
    info = dataset.manifest.shards[shard]
    path = dataset.folder / f"{info.name}{ENDING}"
    if path.exists() and read_header(path)[1].get("fingerprint") == how.fingerprint:
        return len(read_header(path)[0]) // 2
    start = sum(s.samples for s in dataset.manifest.shards[:shard])
    found: dict[str, Ids] = {}
    rows = dataset.rows[start : start + info.samples]
    for bucket in np.unique(rows["bucket"]):
        if bucket < 0:
            continue
        members = np.flatnonzero(rows["bucket"] == bucket)
        for first in range(0, len(members), how.batch):
            numbers = members[first : first + how.batch].tolist()
            done = _decode(dataset, start, numbers, int(bucket), decoder, how)
            for number, codes in zip(done, tokenize(list(done.values())), strict=True):
                found[f"semantic/{number}"] = np.ascontiguousarray(codes.semantic, np.int32)
                found[f"pixel/{number}"] = np.ascontiguousarray(codes.pixel, np.int32)
    write_atomic(path, _dump(found, how.fingerprint))
    return len(found) // 2


def _decode(
    dataset: Dataset,
    start: int,
    numbers: Sequence[int],
    bucket: int,
    decoder: Decoder,
    how: Encoding,
) -> dict[int, Copies]:
    """Decode the pictures to tokenise: the target, or the input where there is none."""
    works: dict[int, Work] = {}
    for number in numbers:
        try:
            encoded = dataset.read(start + number)
            data = encoded.member("target") or encoded.member("")
            if data is not None:
                height, width = encoded.says["size"]
                sizes = how.sizes or bucket_sizes(bucket, how.frame)
                works[number] = Work(data, make_view((height, width), sizes, crop=how.crop))
        except BadSample:
            continue  # training counts it; here it merely has no codes
    done = zip(works, decoder.decode(list(works.values())), strict=True)
    return {number: copies for number, copies in done if isinstance(copies, Copies)}


def _dump(tensors: Mapping[str, Ids], fingerprint: str) -> bytes:
    from safetensors.numpy import save

    written: bytes = save(dict(tensors), metadata={"fingerprint": fingerprint})
    return written


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors of a code file by name, and its metadata. Raises: DataError."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 0 < size < 1 << 28:
                raise ValueError(f"a header of {size} bytes")
            told = json.loads(file.read(size))
        return {k: v for k, v in told.items() if k != "__metadata__"}, told["__metadata__"]
    except (ValueError, KeyError, OSError) as error:
        raise DataError(f"{path}: a file of codes expected: {error}") from error


class CodeReader:
    """Reads codes by sample number; keeps the header of the shard read last.

    Raises: DataError when the manifest names no tokenizer, or a shard's codes are of another.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        told = dataset.manifest.codes.get(ENDING)
        if told is None:
            raise DataError(f"{dataset.folder}: no codes here; run `focus data encode` first")
        self.fingerprint = told
        self._shard = ""
        self._tensors: dict[str, Any] = {}
        self._data: npt.NDArray[np.uint8] = np.zeros(0, np.uint8)

    def read(self, number: int) -> SampleCodes | None:
        """Codes of a sample, None when it has none (broken picture, or cropped away)."""
        shard, own = self.dataset.place(number)
        if shard != self._shard:
            self._open(shard)
        if f"pixel/{own}" not in self._tensors:
            return None
        return SampleCodes(self._ids(f"semantic/{own}"), self._ids(f"pixel/{own}"))

    def _open(self, shard: str) -> None:
        path = self.dataset.folder / f"{shard}{ENDING}"
        self._tensors, metadata = read_header(path)
        if metadata.get("fingerprint") != self.fingerprint:
            raise DataError(
                f"{path}: codes of tokenizer {self.fingerprint} expected, got "
                f"{metadata.get('fingerprint')}; run `focus data encode` anew"
            )
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
        self._data = np.memmap(path, np.uint8, "r", offset=8 + size)
        self._shard = shard

    def _ids(self, name: str) -> Ids:
        told = self._tensors[name]
        low, high = told["data_offsets"]
        flat = np.frombuffer(self._data[low:high].tobytes(), np.int32)
        return flat.reshape(told["shape"])
