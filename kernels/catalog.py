"""The one list of operators. Adding one is a folder with an `api.py` and a line here."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

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


def optional(part: str) -> dict[str, ModuleType]:
    """Return operator name -> its module `part` ("variants", "tuner"), of those that have one."""
    found = {}
    for module in OPERATORS:
        folder = module.rpartition(".")[0]
        if importlib.util.find_spec(f"{folder}.{part}") is not None:
            found[folder.rpartition(".")[2]] = importlib.import_module(f"{folder}.{part}")
    return found


def kernel(name: str) -> Kernel:
    """Return the operator called `name`."""
    for candidate in kernels():
        if candidate.name == name:
            return candidate
    raise KeyError(f"no operator {name!r}; the catalog has {[k.name for k in kernels()]}")
