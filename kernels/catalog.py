"""The one list of operators. Adding one is a folder with an `api.py` and a line here."""

from __future__ import annotations

import importlib

from kernels.kernel import Kernel

OPERATORS: list[str] = [
    "kernels.codebook_lookup.api",
    "kernels.gated_cross_attention.api",
    "kernels.mask_attention.api",
]


def kernels() -> list[Kernel]:
    """Import every operator and return its record."""
    return [record(module) for module in OPERATORS]


def record(module: str) -> Kernel:
    """Return the `KERNEL` of one operator module."""
    kernel = importlib.import_module(module).KERNEL
    if not isinstance(kernel, Kernel):
        raise TypeError(f"{module}.KERNEL must be a kernels.kernel.Kernel, got {type(kernel)}")
    return kernel


def kernel(name: str) -> Kernel:
    """Return the operator called `name`."""
    for candidate in kernels():
        if candidate.name == name:
            return candidate
    raise KeyError(f"no operator {name!r}; the catalog has {[k.name for k in kernels()]}")
