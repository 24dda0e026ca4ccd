"""AOTInductor packages: compiled parts with our kernels, in PyTorch's own runtime."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.export.bundle import Bundle, BundlePart
from engine.export.errors import BackendUnavailable
from engine.serve.backends.base import Executable


class AotiBackend:
    """Needs a bundle with packages; they run on the kind of device they were compiled on."""

    name = "aoti"

    def reasons(self, bundle: Bundle) -> list[str]:
        """Return why not: no packages, or no device."""
        from engine.export import aoti

        lacking = [name for name, part in bundle.parts.items() if "aoti" not in part.files]
        found = []
        if lacking:
            found.append(f"no package for {', '.join(lacking[:4])} (focus export --backends aoti)")
        try:
            aoti.require(self._device(), compiler=False)
        except BackendUnavailable as error:
            found.append(str(error))
        return found

    def open(self, bundle: Bundle, part: BundlePart) -> Executable:
        """Load a package."""
        from engine.export.aoti import Package

        device = self._device()
        package = Package(bundle.file(part.name, "aoti"), part.spec, device=device)

        def run(inputs: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found = package.run({name: value.to(device) for name, value in inputs.items()})
            return {name: place(value, into.get(name)) for name, value in found.items()}

        return run

    @staticmethod
    def _device() -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"


def place(value: Tensor, target: Tensor | None) -> Tensor:
    """Copy a value to where it is wanted, unless it lies there: caches are written in place."""
    if target is None:
        return value
    return target if target.data_ptr() == value.data_ptr() else target.copy_(value)


BACKEND = AotiBackend()
