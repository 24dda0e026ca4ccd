"""The interface of a backend, and the runtime that opens a bundle's parts on one."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor

from engine.export.bundle import Bundle, BundlePart
from engine.export.errors import BackendUnavailable, ExportError
from engine.export.part import axis_size, split_axis

NAMES = ("eager", "onnx", "aoti", "tensorrt")


class Executable(Protocol):
    """One part, ready to run."""

    def __call__(
        self, inputs: Mapping[str, Tensor], into: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Run on inputs of the part's dtypes; outputs named in `into` are written there.

        A tensor of `into` may share its memory with an input (key and value caches).
        """


class Backend(Protocol):
    """What a module of this package offers as `BACKEND`."""

    name: str

    def reasons(self, bundle: Bundle) -> list[str]:
        """Return why this backend cannot run a bundle here; empty when it can."""

    def open(self, bundle: Bundle, part: BundlePart) -> Executable:
        """Load one part."""


class Runtime:
    """The parts of one bundle on one backend; each is loaded when it is first needed."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle, self.backend = bundle, backend
        self._open: dict[str, Executable] = {}
        self._lock = threading.Lock()

    def run(
        self,
        part: str,
        inputs: Mapping[str, Tensor],
        into: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Run a part on named inputs and return its outputs by name.

        Floating inputs are brought to the part's precision and outputs back to that of the first
        floating input. `into`: memory for outputs, whatever its precision.

        Raises:
            ExportError: a missing input, or a shape outside the profile.
            BundleError: the bundle lacks the part.
        """
        described = self.bundle.part(part)
        check_inputs(described, inputs)
        wanted = {spec.name: spec.dtype for spec in (*described.inputs, *described.outputs)}
        reference = next((t.dtype for t in inputs.values() if t.is_floating_point()), torch.float32)
        given = {
            spec.name: inputs[spec.name].to(spec.dtype or torch.float32).contiguous()
            for spec in described.inputs
        }
        direct = {
            name: target
            for name, target in (into or {}).items()
            if target.is_contiguous() and target.dtype == wanted[name]
        }
        found = dict(self._executable(described)(given, direct))
        for name, target in (into or {}).items():
            if name not in direct:
                target.copy_(found[name])
                found[name] = target
        return {
            name: value.to(reference)
            if value.is_floating_point() and name not in (into or {})
            else value
            for name, value in found.items()
        }

    def close(self, part: str) -> None:
        """Forget a part that was loaded; the next call loads it again."""
        with self._lock:
            self._open.pop(part, None)

    def _executable(self, part: BundlePart) -> Executable:
        with self._lock:
            if part.name not in self._open:
                self._open[part.name] = self.backend.open(self.bundle, part)
            return self._open[part.name]


def load(bundle: str | Path | Bundle, backend: str = "eager") -> Runtime:
    """Open a bundle on a backend.

    Raises:
        BundleError: the bundle is corrupt, incomplete or foreign.
        BackendUnavailable: the backend cannot run it here; the message lists the reasons.
    """
    chosen = find(backend)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    reasons = chosen.reasons(opened)
    if reasons:
        raise BackendUnavailable(
            f"the backend {backend} cannot run {opened.folder}: {'; '.join(reasons)}"
        )
    return Runtime(opened, chosen)


def find(name: str) -> Backend:
    """Return a backend by name; its libraries are imported when it is used."""
    if name not in NAMES:
        raise BackendUnavailable(f"a backend of {', '.join(NAMES)} expected, got {name!r}")
    return cast(Backend, importlib.import_module(f"engine.serve.backends.{name}_backend").BACKEND)


def check_inputs(part: BundlePart, inputs: Mapping[str, Tensor]) -> None:
    """Raise `ExportError` unless every input is there and its shape within the profile."""
    dims = {dim.name: dim for dim in part.dims}
    sizes: dict[str, int] = {}
    for spec in part.inputs:
        if spec.name not in inputs:
            raise ExportError(
                f"{part.name}: inputs {[s.name for s in part.inputs]} expected, {spec.name} is "
                "missing"
            )
        shape = tuple(inputs[spec.name].shape)
        if len(shape) == len(spec.shape):
            for axis, size in zip(spec.shape, shape, strict=True):
                if isinstance(axis, str):
                    factor, name, more = split_axis(axis)
                    sizes.setdefault(name, (size - more) // factor)
        for name in sizes:
            dims[name].check(sizes[name], part.name)
        if len(shape) != len(spec.shape) or shape != tuple(
            axis_size(axis, sizes) for axis in spec.shape
        ):
            raise ExportError(
                f"{part.name}: {spec.name} of shape {list(spec.shape)} expected, got {list(shape)}"
                f"{f' at {sizes}' if sizes else ''}; outside the profile of this bundle"
            )
