"""What one exported section is: a module with flat named tensors and the sizes it is built for."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.export.errors import ExportError

Axis = int | str  # a number, or an expression in one `Dim`: "rows", "2*rows", "candidates+1"
Sizes = Mapping[str, int]
Values = Literal["normal", "unit", "mask"]


@dataclass(frozen=True, kw_only=True)
class Dim:
    """A size that may change from call to call, and the profile it is built for (inclusive)."""

    name: str
    min: int
    opt: int
    max: int

    def check(self, size: int, part: str) -> None:
        """Raise `ExportError` for a size outside the profile."""
        if not self.min <= size <= self.max:
            raise ExportError(
                f"{part}: {self.name} of {self.min} to {self.max} expected, got {size}; split the "
                "request, or export with a profile that holds it"
            )


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output. `values` and `low`, `high` say what an example of it looks like.

    `dtype` None is the part's own floating dtype (the precision of the bundle).
    """

    name: str
    shape: tuple[Axis, ...]
    dtype: torch.dtype | None = None
    values: Values = "normal"
    low: int = 0
    high: int | Callable[[Sizes], int] = 2

    def size(self, sizes: Sizes) -> tuple[int, ...]:
        """Return the shape for given sizes of the dims."""
        return tuple(axis_size(axis, sizes) for axis in self.shape)

    def example(self, sizes: Sizes, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """Return a tensor that looks like a real one; fp32 draws, so precisions agree."""
        shape = self.size(sizes)
        if self.dtype is not None and not self.dtype.is_floating_point:
            high = self.high if isinstance(self.high, int) else self.high(sizes)
            drawn = torch.randint(self.low, max(high, self.low + 1), shape, generator=generator)
            return drawn.to(self.dtype)
        if self.values == "normal":
            drawn = torch.randn(shape, generator=generator)
        else:
            drawn = torch.rand(shape, generator=generator)
        if self.values == "mask":
            drawn = (drawn > 0.5).float()
        return drawn.to(self.dtype or dtype)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One exported section of the model.

    `module` takes the inputs in order and returns the outputs as a tuple (or one tensor); it calls
    the model's own forward and holds the model's own parameters. `outputs` give names and shapes.
    `opset` is that of its ONNX file.
    """

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: tuple[Dim, ...] = ()
    opset: int = 23
    notes: str = field(default="", compare=False)

    def sizes(self, **given: int) -> dict[str, int]:
        """Return the size of every dim: the optimum, or what is given.

        Raises `ExportError` for an unknown dim or a size outside the profile.
        """
        known = {dim.name: dim for dim in self.dims}
        for name, size in given.items():
            if name not in known:
                raise ExportError(f"{self.name}: a dim of {sorted(known)} expected, got {name!r}")
            known[name].check(size, self.name)
        return {dim.name: given.get(dim.name, dim.opt) for dim in self.dims}

    def profile(self, which: Literal["min", "opt", "max"]) -> dict[str, int]:
        """Return the sizes of one end of the profile."""
        return {dim.name: getattr(dim, which) for dim in self.dims}

    def example_inputs(
        self, sizes: Sizes | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> tuple[Tensor, ...]:
        """Return inputs in order, a function of sizes and seed."""
        chosen = self.sizes(**(sizes or {}))
        generator = torch.Generator().manual_seed(seed)
        return tuple(spec.example(chosen, dtype, generator) for spec in self.inputs)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the module on named inputs, without gradient, and name its outputs."""
        with torch.no_grad():
            found = self.module(*(inputs[spec.name] for spec in self.inputs))
        values = (found,) if isinstance(found, Tensor) else tuple(found)
        return {spec.name: value for spec, value in zip(self.outputs, values, strict=True)}

    def dynamic_shapes(self, dims: Mapping[str, Any] | None = None) -> tuple[Any, ...]:
        """Return `dynamic_shapes` for torch.export, flat: one dict of axis to Dim per input.

        dims: torch.export dims to use by name; made from the profile when missing.
        """
        found = torch_dims(self.dims) if dims is None else dict(dims)
        return tuple(
            {
                number: _scaled(axis, found)
                for number, axis in enumerate(spec.shape)
                if isinstance(axis, str)
            }
            for spec in self.inputs
        )

    def nested_shapes(self) -> tuple[Any, ...]:
        """Return `dynamic_shapes` nested as the module takes them: its `*args` in one tuple."""
        flat = self.dynamic_shapes()
        taken = inspect.signature(self.module.forward).parameters.values()
        for number, parameter in enumerate(taken):
            if parameter.kind is parameter.VAR_POSITIONAL:
                return (*flat[:number], tuple(flat[number:]))
        return flat


def torch_dims(dims: tuple[Dim, ...]) -> dict[str, Any]:
    """Return a `torch.export.Dim` for every dim that may change; a fixed one is left out."""
    return {
        dim.name: torch.export.Dim(dim.name, min=max(dim.min, 1), max=dim.max)
        for dim in dims
        if dim.min != dim.max
    }


def split_axis(axis: str) -> tuple[int, str, int]:
    """Return (2, "rows", 1) of "2*rows+1", (1, "rows", 0) of "rows"."""
    found = re.fullmatch(r"(?:(\d+)\*)?([a-z_]+)(?:\+(\d+))?", axis)
    if found is None:
        raise ExportError(f"an axis like 'rows', '2*rows' or 'rows+1' expected, got {axis!r}")
    return int(found.group(1) or 1), found.group(2), int(found.group(3) or 0)


def axis_size(axis: Axis, sizes: Sizes) -> int:
    """Return the size of an axis for given sizes of the dims."""
    if isinstance(axis, int):
        return axis
    factor, name, more = split_axis(axis)
    return factor * sizes[name] + more


def _scaled(axis: str, dims: Mapping[str, Any]) -> Any:
    factor, name, _ = split_axis(axis)
    if name not in dims:
        return None  # static
    return dims[name] if factor == 1 else factor * dims[name]


def tensor(name: str, *shape: Axis) -> TensorSpec:
    """Return a floating tensor in the part's precision."""
    return TensorSpec(name=name, shape=shape)


def picture(name: str, size: tuple[Axis, Axis]) -> TensorSpec:
    """Return pictures [batch, 3, height, width] in [0, 1]."""
    return TensorSpec(name=name, shape=("batch", 3, *size), values="unit")


def numbers(
    name: str, *shape: Axis, high: int | Callable[[Sizes], int], low: int = 0
) -> TensorSpec:
    """Return int64 numbers from `low` to `high`, exclusive."""
    return TensorSpec(name=name, shape=shape, dtype=torch.int64, low=low, high=high)
