"""Safetensors checkpoints of one or many files: read tensor by tensor, written shard by shard.

The layout is Hugging Face's: one file, or `<stem>-00001-of-0000N.safetensors` with an index
`<stem>.safetensors.index.json` that says which tensor lies where. Memory stays near one shard.

Files are written by a stream of ordinary writes: the library's writer may map the file into memory,
where a full disk is a bus error; here it is an `OSError` that the caller can report.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from focus.errors import CheckpointMismatch

INDEX = ".safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
STEMS = ("model", "diffusion_pytorch_model", "diffusion_pytorch_model.fp16", "open_clip_model")
MAX_SHARD = 5_000_000_000  # bytes
OWN_WEIGHTS = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors")

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Weights(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name; each is read from disk when it is asked for."""

    def __init__(self, path: Path, files: Mapping[str, Path]) -> None:
        self.path = path
        self._files = dict(files)
        self._open: dict[Path, Any] = {}

    @classmethod
    def open(cls, path: str | Path) -> Weights:
        """Open a safetensors file, an index, or a directory that holds either.

        Raises `CheckpointMismatch` when there is none, when files of the index are missing or
        broken, and when there are pickles only.
        """
        path = Path(path)
        index = path.with_name(path.name + ".index.json")
        if path.suffix == ".safetensors" and not path.is_file() and index.is_file():
            path = index
        if path.is_dir():
            path = _find(path)
        if path.name.endswith(".index.json"):
            return cls(path, _indexed(path))
        if path.suffix in PICKLES:
            raise CheckpointMismatch(f"{path}: safetensors expected; {pickle_advice(path.name)}")
        return cls(path, dict.fromkeys(_names(path), path))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor. Raises `CheckpointMismatch` if its file is broken."""
        file = self._files[name]
        try:
            tensor: Tensor = self._handle(file).get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise broken(file, error) from error
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        file = self._files[name]
        try:
            return tuple(self._handle(file).get_slice(name).get_shape())
        except (OSError, SafetensorError) as error:
            raise broken(file, error) from error

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            self._open.clear()  # one file mapped at a time
            self._open[file] = safe_open(file, "pt")
        return self._open[file]


class ShardWriter:
    """Writes tensors in the order they come, a new file whenever one would exceed `max_bytes`."""

    def __init__(self, directory: Path, *, stem: str = "model", max_bytes: int = MAX_SHARD) -> None:
        if max_bytes < 1:
            raise CheckpointMismatch(f"a shard size of at least 1 byte expected, got {max_bytes}")
        self.directory, self.stem, self.max_bytes = directory, stem, max_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._written: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Queue one tensor; raises `CheckpointMismatch` if the name came before."""
        if name in self._pending or any(name in names for names in self._written):
            raise CheckpointMismatch(f"{name} comes twice; two sources give the same tensor")
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_bytes:
            self._flush()
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += size
        self._total += size

    def finish(self) -> list[Path]:
        """Write what is left and, with several files, the index; returns the files."""
        if self._pending or not self._written:
            self._flush()
        count = len(self._written)
        if count == 1:
            path = self.directory / f"{self.stem}.safetensors"
            os.replace(self._temporary(0), path)
            return [path]
        paths = [
            self.directory / f"{self.stem}-{number + 1:05d}-of-{count:05d}.safetensors"
            for number in range(count)
        ]
        for number, path in enumerate(paths):
            os.replace(self._temporary(number), path)
        where = {
            name: path.name
            for path, names in zip(paths, self._written, strict=True)
            for name in names
        }
        index = {"metadata": {"total_size": self._total}, "weight_map": where}
        (self.directory / f"{self.stem}{INDEX}").write_text(json.dumps(index, indent=2) + "\n")
        return paths

    def _flush(self) -> None:
        path = self._temporary(len(self._written))
        write_tensors(path, self._pending, {"format": "pt"})
        self._written.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _temporary(self, number: int) -> Path:
        return self.directory / f"{self.stem}.part-{number + 1:05d}"


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file: wide numbers first, so that all lie aligned, then by name.

    Raises `OSError` with the file's name, and `CheckpointMismatch` for a dtype that the format
    lacks.
    """
    odd = sorted(name for name, tensor in tensors.items() if tensor.dtype not in DTYPES)
    if odd:
        raise CheckpointMismatch(
            f"{path}: tensors of {', '.join(DTYPES.values())} expected, got "
            f"{tensors[odd[0]].dtype} for {odd[0]}; convert it first"
        )
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for name in order:
                flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
                file.write(flat.view(torch.uint8).numpy().data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def pickle_advice(name: str) -> str:
    """Say why a pickle is not read and how to get rid of it."""
    return (
        f"{name} is a pickle, which can run code when it is read: convert it where you trust it, "
        "with the library that wrote it (save_pretrained, safetensors.torch.save_file)"
    )


def broken(path: Path, error: Exception) -> CheckpointMismatch:
    """Describe a file that is not a whole safetensors file."""
    return CheckpointMismatch(
        f"{path}: a whole safetensors file expected, got {error}; copy or download it again"
    )


def is_weights(name: str) -> bool:
    """Whether a file name of a model directory is one of its weight files."""
    return name == f"model{INDEX}" or OWN_WEIGHTS.fullmatch(name) is not None


def narrow(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Convert a floating tensor to `dtype`, if given."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _find(directory: Path) -> Path:
    for stem in STEMS:
        for name in (f"{stem}{INDEX}", f"{stem}.safetensors"):
            if (directory / name).is_file():
                return directory / name
    found = sorted(p for p in directory.iterdir() if p.suffix == ".safetensors")
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointMismatch(
            f"{directory}: one safetensors file or an index expected, got "
            f"{[p.name for p in found[:4]]}; give the path of the file itself"
        )
    pickled = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLES)
    advice = f"; {pickle_advice(pickled[0])}" if pickled else "; is this the right directory?"
    raise CheckpointMismatch(f"{directory}: safetensors expected, found none{advice}")


def _indexed(path: Path) -> dict[str, Path]:
    try:
        where: dict[str, str] = json.loads(path.read_text())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointMismatch(f"{path}: an index with a weight_map expected: {error}") from error
    files = {name: path.with_name(file) for name, file in where.items()}
    for file in sorted(set(files.values())):
        if not file.is_file():
            raise CheckpointMismatch(f"{file}: listed in {path.name}, but there is no such file")
        held = set(_names(file))
        lost = sorted(name for name, home in files.items() if home == file and name not in held)
        if lost:
            raise CheckpointMismatch(f"{file}: {lost[:3]} expected according to {path.name}")
    return files


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, "pt") as handle:
            return list(handle.keys())
    except (OSError, SafetensorError) as error:
        raise broken(file, error) from error
