"""A bundle: a model directory that also holds its parts, exported, and a manifest over all files.

    bundle/
      config.json, model.safetensors, tokenizer files      as in any model directory
      manifest.json                                        parts, tensors, profiles, hashes
      <part>.onnx, <part>.data                             graphs; weights refer to the safetensors

A bundle is a checkpoint: whatever takes a model directory takes a bundle and runs it eagerly. What
a bundle refers to lies inside it; a path that leads out of it is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.export.errors import BundleError
from engine.export.part import Dim, Part, TensorSpec

MANIFEST = "manifest.json"
FORMAT = "focus-bundle"
SCHEMA_VERSION = 1
HASHED_AT_OPEN = 64 << 20  # larger files are compared by size when a bundle is opened


@dataclass(frozen=True, kw_only=True)
class BundlePart:
    """One part as the manifest describes it; `files` are by backend, the file to load first."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: tuple[Dim, ...]
    opset: int
    files: Mapping[str, tuple[str, ...]]

    @property
    def spec(self) -> Part:
        """The part without its module: names, shapes and profile."""
        return Part(
            name=self.name,
            module=torch.nn.Identity(),
            inputs=self.inputs,
            outputs=self.outputs,
            dims=self.dims,
            opset=self.opset,
        )


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """An opened bundle."""

    folder: Path
    precision: str
    parts: Mapping[str, BundlePart]
    files: Mapping[str, Mapping[str, Any]]
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str | Path, *, whole: bool = False) -> Bundle:
        """Read the manifest and compare the files with it; `whole` hashes large files too.

        Raises `BundleError`: no bundle, corrupt, another schema version, a file that is missing,
        changed, or outside the bundle.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        try:
            files = dict(manifest["files"])
            parts = {name: _part(name, values) for name, values in dict(manifest["parts"]).items()}
            precision = str(manifest["precision"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(
                f"{folder / MANIFEST}: a manifest of schema {SCHEMA_VERSION} expected, got one "
                f"with {type(error).__name__}: {error}; export the model again"
            ) from error
        bundle = cls(
            folder=folder, precision=precision, parts=parts, files=files, manifest=manifest
        )
        bundle._check_files(whole)
        return bundle

    def part(self, name: str) -> BundlePart:
        """Return a part; raises `BundleError` when the bundle lacks it."""
        if name not in self.parts:
            raise BundleError(
                f"{self.folder}: a part {name!r} expected, got {sorted(self.parts)}; export again "
                "with this part"
            )
        return self.parts[name]

    def file(self, part: str, backend: str) -> Path:
        """Return the file by which a backend starts a part; raises `BundleError` without one."""
        held = self.part(part).files
        if backend not in held:
            raise BundleError(
                f"{self.folder}: {part} for {backend} expected, got {sorted(held)}; run `focus "
                f"export` with --backends {backend}"
            )
        return self.inside(held[backend][0])

    def inside(self, name: str) -> Path:
        """Return the path of one of the bundle's files; raises `BundleError` for any other."""
        if name not in self.files:
            raise BundleError(
                f"{self.folder}: a file of the manifest expected, got {name!r}; a bundle refers to "
                "its own files only"
            )
        return _plain(self.folder, name)

    def _check_files(self, whole: bool) -> None:
        for part in self.parts.values():
            for names in part.files.values():
                for name in names:
                    self.inside(name)
        for name, entry in self.files.items():
            path = _plain(self.folder, name)
            if not path.is_file():
                raise BundleError(f"{path}: listed in {MANIFEST}, but there is no such file")
            size = path.stat().st_size
            if size != entry.get("bytes"):
                raise BundleError(
                    f"{path}: {entry.get('bytes')} bytes expected, got {size}; copy the bundle "
                    "again or export it again"
                )
            if whole or size <= HASHED_AT_OPEN:
                got = sha256(path)
                if got != entry.get("sha256"):
                    raise BundleError(
                        f"{path}: sha256 {entry.get('sha256')} expected, got {got}; the file was "
                        "changed after the export: copy it again or export again"
                    )


def is_bundle(folder: str | Path) -> bool:
    """Whether a directory holds a manifest."""
    return (Path(folder) / MANIFEST).is_file()


def sha256(path: Path) -> str:
    """Return the hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(folder: Path, name: str) -> Path:
    """Return folder/name; raises `BundleError` unless the file lies directly in the folder."""
    path = folder / name
    if Path(name).name != name or path.resolve().parent != folder.resolve():
        raise BundleError(
            f"{folder}: a file inside the bundle expected, got {name!r}, which leads to "
            f"{path.resolve()}; do not trust this bundle"
        )
    return path


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(f"{folder}: a bundle with {MANIFEST} expected; make one by focus export")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: JSON expected: {error}; export the model again") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise BundleError(f"{path}: the manifest of a {FORMAT} expected, got something else")
    if values.get("schema_version") != SCHEMA_VERSION:
        raise BundleError(
            f"{path}: schema version {SCHEMA_VERSION} expected, got "
            f"{values.get('schema_version')!r}; export again with this release"
        )
    return values


def _part(name: str, values: Mapping[str, Any]) -> BundlePart:
    return BundlePart(
        name=name,
        inputs=tuple(_spec(entry) for entry in values["inputs"]),
        outputs=tuple(_spec(entry) for entry in values["outputs"]),
        dims=tuple(Dim(**entry) for entry in values["dims"]),
        opset=int(values["opset"]),
        files={backend: tuple(names) for backend, names in values["files"].items()},
    )


def _spec(entry: Mapping[str, Any]) -> TensorSpec:
    dtype = getattr(torch, entry["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a dtype expected, got {entry['dtype']!r}")
    return TensorSpec(name=entry["name"], shape=tuple(entry["shape"]), dtype=dtype)


def describe_part(part: Part, dtype: torch.dtype, files: Mapping[str, list[str]]) -> dict[str, Any]:
    """Return what the manifest says about a part."""

    def describe(spec: TensorSpec) -> dict[str, Any]:
        kind = str(spec.dtype or dtype).removeprefix("torch.")
        return {"name": spec.name, "shape": list(spec.shape), "dtype": kind}

    return {
        "inputs": [describe(spec) for spec in part.inputs],
        "outputs": [describe(spec) for spec in part.outputs],
        "dims": [
            {"name": dim.name, "min": dim.min, "opt": dim.opt, "max": dim.max} for dim in part.dims
        ],
        "opset": part.opset,
        "files": {backend: list(names) for backend, names in files.items()},
    }
