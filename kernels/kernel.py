"""Records that describe an operator: what it computes, who computes it, where it is proven.

An operator is a folder. Its `api.py` holds one `Kernel`; `catalog.py` lists it; parity, gradient,
odd-size and low-precision tests and the benchmark rows are generated from the record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class KernelUnsupported(ValueError):
    """No implementation takes the request; the message lists every candidate and its reason."""


class ShapeError(ValueError):
    """An argument whose shape, dtype or device contradicts the others."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What dispatch may look at: never values, so that a choice needs no synchronisation.

    `sizes` are the operator's own names for its axes, `needs` extra demands
    (`"backward"`, `"feature_gradient"`, ...).
    """

    device: str
    dtype: torch.dtype
    sizes: tuple[tuple[str, int], ...]
    needs: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> int:
        for key, value in self.sizes:
            if key == name:
                return value
        raise KeyError(f"request has no size {name!r}; it has {[key for key, _ in self.sizes]}")

    def __str__(self) -> str:
        sizes = ", ".join(f"{key}={value}" for key, value in self.sizes)
        needs = f", needs {'+'.join(sorted(self.needs))}" if self.needs else ""
        return f"{self.device} {str(self.dtype).removeprefix('torch.')} {sizes}{needs}"


def accept_all(request: Request) -> str | None:
    """Refuse nothing."""
    del request
    return None


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to compute an operator.

    `module` is imported at first use, and so is `backward`, where the gradients live (default: the
    same module). `refuse` returns the reason why it cannot take a request, or
    None. `cost` estimates microseconds; the cheapest willing implementation runs.
    """

    name: str
    module: str
    cost: Callable[[Request], float]
    refuse: Callable[[Request], str | None] = accept_all
    backward: str = ""

    @property
    def backward_module(self) -> str:
        """Name of the module with the gradients."""
        return self.backward or self.module


@dataclass(frozen=True, kw_only=True)
class Case:
    """A named problem. `bench` rows are timed, the others are proof only."""

    name: str
    sizes: Mapping[str, Any]
    bench: bool = False


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One operator.

    `function` is the public entry; `inputs(case, dtype, device)` makes its keyword arguments from a
    fixed seed; `differentiable` names those that get a gradient. Outputs with integer dtype must
    equal the fp64 oracle exactly, floating outputs stay within the error budget of
    `tests/kernels`. For the benchmark: `trained` names the inputs that training differentiates
    (none: forward rows only), `flops(case, direction)` the least arithmetic of a problem, from
    which the hardware floor follows, `oracle` the implementation whose fp64 answer is the truth.
    """

    name: str
    function: Callable[..., Any]
    implementations: tuple[Implementation, ...]
    inputs: Callable[[Case, torch.dtype, str], dict[str, Any]]
    cases: tuple[Case, ...]
    differentiable: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    flops: Callable[[Case, str], float] | None = None
    oracle: str = "reference"

    def implementation(self, name: str) -> Implementation:
        """Return the implementation called `name`."""
        for candidate in self.implementations:
            if candidate.name == name:
                return candidate
        known = [candidate.name for candidate in self.implementations]
        raise KernelUnsupported(f"{self.name}: no implementation {name!r}; there are {known}")


def floating(outputs: Any) -> list[Tensor]:
    """Return the floating-point tensors among an operator's outputs."""
    values = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
