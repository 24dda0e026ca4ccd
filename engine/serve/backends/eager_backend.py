"""The model itself, read from the bundle's weights: the reference of every other backend."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from engine.export.bundle import Bundle, BundlePart
from engine.export.part import Part
from engine.serve.backends.base import Executable


class EagerBackend:
    """Runs every part in PyTorch; the weights are read once for all parts."""

    name = "eager"

    def __init__(self) -> None:
        self._parts: tuple[Path, dict[str, Part]] | None = None

    def reasons(self, bundle: Bundle) -> list[str]:
        """Refuse nothing: a bundle is a checkpoint."""
        del bundle
        return []

    def open(self, bundle: Bundle, part: BundlePart) -> Executable:
        """Return the part of the model."""
        found = self._read(bundle)[part.name]

        def run(inputs: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> dict[str, Tensor]:
            widened = {
                name: value.float() if value.is_floating_point() else value
                for name, value in inputs.items()
            }
            outputs = found.run(widened)
            return {
                name: into[name].copy_(value) if name in into else value
                for name, value in outputs.items()
            }

        return run

    def _read(self, bundle: Bundle) -> dict[str, Part]:
        from engine.export.parts import list_parts
        from focus import Focus

        if self._parts is None or self._parts[0] != bundle.folder:
            model = Focus.from_pretrained(bundle.folder).model
            self._parts = (bundle.folder, {part.name: part for part in list_parts(model)})
        return self._parts[1]


BACKEND = EagerBackend()
