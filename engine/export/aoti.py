"""torch.export and AOTInductor: a part as one compiled package, without Python between its
operations.

    compile_part(part, folder / "vanilla.pt2")
    package = Package(folder / "vanilla.pt2", part)
    low = package.run({"images": images})["low"]

A package is built for one kind of device and one precision, its shapes are those of the part's
profile. Caches are written in place, and their outputs are the inputs' own memory. Our operators
stay calls of `torch.library` operators, which the process that loads the package registers by
importing `kernels` (this file does); on a GPU they launch the Triton kernels. New weights go into
a package without compiling again (`Package.update`). `Replay` puts a CUDA graph around one step.
(On a GPU: not run here.)
"""

# The names of inputs and outputs are those of the part.

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kernels.codebook_lookup.api
import kernels.gated_cross_attention.api
import kernels.mask_attention.api  # noqa: F401
from engine.export.errors import BackendUnavailable, BundleError, ExportError
from engine.export.part import Part

SUFFIX = ".pt2"
# Short vectors (gates, biases of a few channels) must not become numbers in the code.
REPLACEABLE = {"always_keep_tensor_constants": True}
Run = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def compile_part(
    part: Part,
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Export a part and compile it into the package `path`, atomically.

    options: of inductor, such as {"max_autotune": True} on a GPU.

    Raises:
        ExportError: torch.export or the compiler refused; the message says which and why.
        BackendUnavailable: there is no C++ compiler, or no GPU for a package of one.
    """
    require(device)
    program = trace(part, dtype=dtype, device=device)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.stem}-", dir=path.parent))
    try:
        with torch.no_grad():
            made = torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(folder / f"{path.stem}{SUFFIX}"),
                inductor_configs={**REPLACEABLE, **(options or {})},
            )
        os.replace(made, path)
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        raise ExportError(f"{part.name}: AOTInductor could not compile it: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return path


def trace(
    part: Part, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> torch.export.ExportedProgram:
    """Return the part as a graph of ATen operators whose dims are those of its profile.

    Raises:
        ExportError: a shape depends on values, or a dim came out fixed.
    """
    # A size of one would be taken for a constant.
    sizes = {dim.name: min(max(dim.opt, 2), dim.max) for dim in part.dims}
    inputs = tuple(tensor.to(device) for tensor in part.example_inputs(sizes, dtype))
    module = _moved(_in_place(part.module), device, dtype)
    try:
        with torch.no_grad():
            return torch.export.export(
                module, inputs, dynamic_shapes=part.nested_shapes(), strict=False
            )
    except (RuntimeError, ValueError, torch._dynamo.exc.TorchDynamoException) as error:
        raise ExportError(f"{part.name}: torch.export could not trace it: {error}") from error


def _in_place(module: nn.Module) -> nn.Module:
    """Return the module so that it writes into its buffers instead of returning copies."""
    if getattr(module, "in_place", True):
        return module
    changed = copy.copy(module)
    changed.in_place = True  # type: ignore[assignment]
    return changed


def _moved(module: nn.Module, device: str, dtype: torch.dtype) -> nn.Module:
    """Return the module there and so; a copy, because its parameters are the model's own."""
    floating = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    if all(t.dtype == dtype and t.device == torch.device(device) for t in floating):
        return module.eval()
    return copy.deepcopy(module).to(device, dtype).eval()


class Package:
    """A compiled part, loaded.

    part: for names and profile only; its module may lie on the meta device.

    Raises:
        BundleError: the file is missing, is no package, or of another device.
    """

    def __init__(self, path: Path, part: Part, *, device: str = "cpu") -> None:
        require(device, compiler=False)
        self.part, self.path = part, path
        # A buffer "key_0" is written in place, and its output "new_key_0" is the same memory.
        self._written = {f"new_{spec.name}" for spec in part.inputs}
        if not path.is_file():
            raise BundleError(f"{path}: a compiled package expected, but there is no such file")
        try:
            self._model = torch._inductor.aoti_load_package(str(path))
        except (RuntimeError, OSError, ValueError) as error:
            raise BundleError(
                f"{path}: an AOTInductor package for {device} and PyTorch {torch.__version__} "
                f"expected; export it again here. {error}"
            ) from error

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the part on named inputs; outputs are named too.

        Raises:
            ExportError: an input is missing, or a size lies outside the profile.
        """
        check_inputs(self.part, inputs)
        with torch.no_grad():
            found = self._model(*(inputs[spec.name] for spec in self.part.inputs))
        values = iter((found,) if isinstance(found, Tensor) else tuple(found))
        return {
            spec.name: inputs[spec.name[4:]] if spec.name in self._written else next(values)
            for spec in self.part.outputs
        }

    @property
    def constants(self) -> list[str]:
        """Names of the weights inside, as the part's module calls them."""
        return list(self._model.get_constant_fqns())

    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Put other weights of the same shapes into the package, without compiling.

        Raises:
            ExportError: a weight of the package is missing.
        """
        wanted = self.constants
        missing = sorted(set(wanted) - set(weights))
        if missing:
            raise ExportError(
                f"{self.part.name}: weights for {len(wanted)} constants expected, {len(missing)} "
                f"are missing, first {missing[0]}; give the state dict of the part's module"
            )
        chosen = {name: weights[name].detach() for name in wanted}
        self._model.load_constants(chosen, check_full_update=True)


class Replay:
    """A CUDA graph of one step of a part; buffers belong to the caller and never move.

    inputs: the buffers that every replay reads; give the output buffer of one replay as the input
    of the next, and parts chain without copies. (Not run here: needs a GPU.)
    """

    def __init__(self, run: Run, inputs: Mapping[str, Tensor]) -> None:
        from engine.serve.graph import capture

        self.inputs = dict(inputs)
        self.outputs, self._replay = capture(lambda: dict(run(self.inputs)))

    def __call__(self) -> Mapping[str, Tensor]:
        """Run the step on what the input buffers hold; return the output buffers."""
        self._replay()
        return self.outputs


def check_inputs(part: Part, inputs: Mapping[str, Tensor]) -> None:
    """Raise `ExportError` unless every input is there and fits the profile."""
    dims = {dim.name: dim for dim in part.dims}
    for spec in part.inputs:
        if spec.name not in inputs:
            raise ExportError(
                f"{part.name}: the inputs {[s.name for s in part.inputs]} expected, "
                f"{spec.name} is missing"
            )
        shape = tuple(inputs[spec.name].shape)
        if len(shape) != len(spec.shape):
            raise ExportError(
                f"{part.name}: {spec.name} of shape {spec.shape} expected, got {shape}"
            )
        for axis, size in zip(spec.shape, shape, strict=True):
            if isinstance(axis, int) and axis != size:
                raise ExportError(
                    f"{part.name}: {spec.name} of shape {spec.shape} expected, got {shape}"
                )
            if isinstance(axis, str) and axis in dims:
                dims[axis].check(size, part.name)


def require(device: str, *, compiler: bool = True) -> None:
    """Raise `BackendUnavailable` unless packages can be built (or run) here for a device."""
    reasons = []
    if device.startswith("cuda") and not torch.cuda.is_available():
        reasons.append("no GPU was found")
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    if compiler and not any(name and shutil.which(name) for name in names):
        reasons.append("no C++ compiler was found (set CXX)")
    if reasons:
        raise BackendUnavailable(
            f"aoti on {device} is not available: {'; '.join(reasons)}; use --backend eager or onnx"
        )
