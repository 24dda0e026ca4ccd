"""From a model to a bundle, all or nothing."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from engine.export.bundle import (
    FORMAT,
    MANIFEST,
    SCHEMA_VERSION,
    describe_part,
    is_bundle,
    sha256,
)
from engine.export.errors import BackendUnavailable, ExportError
from engine.export.part import Part
from engine.export.parts import list_parts, part_names
from focus.config import FocusConfig
from focus.folder import fresh_folder
from focus.model import FocusModel
from focus.vocabulary import Vocabulary

BACKENDS = ("onnx", "aoti", "tensorrt")
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Say = Callable[[str], None]


class Source(Protocol):
    """What can be exported: a `Focus`, or an `Untrained` model whose weights lie on disk."""

    @property
    def config(self) -> FocusConfig:
        """Sizes."""

    @property
    def model(self) -> FocusModel:
        """The model; asked for after `save_pretrained`."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Ids of texts and codes."""

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the model folder."""


def export_bundle(
    focus: Source,
    out: str | Path,
    *,
    backends: Sequence[str] = ("onnx",),
    precision: str = "fp32",
    source: str = "",
    only: Sequence[str] | None = None,
    say: Say = lambda line: None,
) -> Path:
    """Write a bundle atomically; a failed export leaves nothing behind.

    source: what the model was loaded from, for the record. only: names of the parts to export
    (default: all). say: told each part as it is done.

    Raises:
        ExportError: an unknown backend or precision, a part that does not export, or an `out` that
            holds something else.
        BackendUnavailable: a backend whose libraries are not here.
    """
    out = Path(out)
    _check(out, backends, precision)
    chosen_names(part_names(focus.config), only)
    with fresh_folder(out) as temporary:
        dtype = PRECISIONS[precision]
        focus.save_pretrained(temporary, dtype=None if precision == "fp32" else dtype)
        model, described = focus.model, {}
        for part in chosen(list_parts(model), only):
            files = {
                backend: _exporter(backend)(part, model, temporary, precision)
                for backend in backends
            }
            described[part.name] = describe_part(part, dtype, files)
            gc.collect()  # graphs hold their constants in cycles
            say(f"{part.name}: {', '.join(f'{b} {files[b][0]}' for b in backends)}")
        write_manifest(
            temporary, focus, described, backends=backends, precision=precision, source=source
        )
    return out


def write_manifest(
    folder: Path,
    focus: Source,
    parts: Mapping[str, Any],
    *,
    backends: Sequence[str],
    precision: str,
    source: str = "",
) -> None:
    """Write the manifest over everything that lies in a folder; parts as `describe_part` says."""
    manifest = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "source": {"name": source, "config": focus.config.name},
        "precision": precision,
        "backends": list(backends),
        "vocabulary": segments(focus.vocabulary),
        "parts": dict(parts),
        "files": _files(folder),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def segments(vocabulary: Vocabulary) -> dict[str, list[int]]:
    """Return the id ranges [start, stop) of text, semantic and pixel tokens."""
    return {
        "text": [0, vocabulary.text_size],
        "semantic": [vocabulary.semantic_ids.start, vocabulary.semantic_ids.stop],
        "pixel": [vocabulary.pixel_ids.start, vocabulary.pixel_ids.stop],
    }


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        path.name: {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


def _check(out: Path, backends: Sequence[str], precision: str) -> None:
    unknown = [name for name in backends if name not in BACKENDS]
    if unknown or not backends:
        raise ExportError(f"backends of {', '.join(BACKENDS)} expected, got {list(backends)}")
    if precision not in PRECISIONS:
        raise ExportError(f"a precision of {', '.join(PRECISIONS)} expected, got {precision!r}")
    if out.exists() and not is_bundle(out) and (out.is_file() or any(out.iterdir())):
        raise ExportError(
            f"{out}: a new folder or an earlier bundle expected, but it holds something else; "
            "choose another --out"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in backends:
        _exporter(name)


def chosen(parts: Sequence[Part], only: Sequence[str] | None) -> list[Part]:
    """Return the parts of these names (None: all); raises `ExportError` for an unknown name."""
    names = chosen_names([part.name for part in parts], only)
    return [part for part in parts if part.name in names]


def chosen_names(names: Sequence[str], only: Sequence[str] | None) -> list[str]:
    """Return the names to take (None: all); raises `ExportError` for an unknown one."""
    unknown = sorted(set(only or ()) - set(names))
    if unknown:
        raise ExportError(f"parts of {', '.join(names)} expected, got {', '.join(unknown)}")
    return [name for name in names if only is None or name in only]


def _exporter(backend: str) -> Callable[[Part, FocusModel, Path, str], list[str]]:
    """Return what writes one part for a backend and names its files, the one to load first."""
    if backend == "aoti":
        return _export_aoti
    if backend == "tensorrt":
        from engine.export import tensorrt

        tensorrt.require()
        return tensorrt.export_part
    try:
        from engine.export import onnx
    except ImportError as error:
        raise BackendUnavailable(
            f"onnx cannot be exported here: {error}; pip install focus-vl[export]"
        ) from error
    return onnx.export_part


def _export_aoti(part: Part, model: FocusModel, folder: Path, precision: str) -> list[str]:
    from engine.export import aoti

    del model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = folder / f"{part.name}.pt2"
    return [aoti.compile_part(part, path, dtype=PRECISIONS[precision], device=device).name]
