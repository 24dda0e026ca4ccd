"""The real Python bindings of TensorRT over empty libraries; `test_plugins.py` runs this file.

The wheel of the bindings (1.3 MB) holds every class, signature and decorator; the libraries behind
it (gigabytes, an NVIDIA GPU) are replaced by functions that return nothing. What needs no library
runs for real: members, decorators, shapes and launches.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

FUNCTIONS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry", "getNvOnnxParserVersion", "getPluginRegistry",
    "initLibNvInferPlugins",
)  # fmt: skip
LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")


def empty_libraries(folder: Path, major: str) -> None:
    """Build libraries of the right names without anything behind them, and load them."""
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    for name in LIBRARIES:
        library = folder / f"{name}.so.{major}"
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", str(source)]
        subprocess.run([*command, "-o", str(library)], check=True)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


@pytest.fixture(scope="module")
def trt(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("bindings")
    wheel = Path(os.environ["FOCUS_TENSORRT_WHEEL"])
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder)
    empty_libraries(folder, wheel.name.split("-")[1].split(".")[0])
    sys.path.insert(0, str(folder))
    module = importlib.import_module("tensorrt_bindings")
    sys.modules["tensorrt"] = module
    sys.modules["tensorrt.plugin"] = importlib.import_module("tensorrt_bindings.plugin")
    return module


class Expr:
    """A dimension that is known: what TensorRT's expressions become at run time."""

    def __init__(self, value: int) -> None:
        self.value = value

    def is_constant(self) -> bool:
        return True

    def get_constant_value(self) -> int:
        return self.value


class Builder:
    """Evaluates TensorRT's dimension operations."""

    def constant(self, value: int) -> Expr:
        return Expr(value)

    def operation(self, operation: Any, first: Expr, second: Expr) -> Expr:
        a, b = first.value, second.value
        known: dict[str, Callable[[], int]] = {
            "SUM": lambda: a + b,
            "PROD": lambda: a * b,
            "CEIL_DIV": lambda: -(-a // b),
        }
        return Expr(known[operation.name]())


@pytest.fixture(scope="module")
def definitions(trt: Any) -> Iterator[dict[str, Any]]:
    """Our plugins by id, registered by the real decorators; only the native registry is missing."""
    from engine.export import plugins

    library = importlib.import_module("tensorrt_bindings.plugin._lib")
    created: dict[str, Any] = {}

    def create(name: str, namespace: str, attributes: dict[str, Any]) -> None:
        created[f"{namespace}::{name}"] = attributes

    library._register_plugin_creator = create
    ids = plugins.register(trt, arch="sm_90")
    assert list(created) == ids
    trt.IDimensionExpr = Expr
    tensors = importlib.import_module("tensorrt_bindings.plugin._tensor")
    tensors.SymIntExpr._exprBuilder = Builder()
    yield {"created": created, **{name: library.QDP_REGISTRY[name] for name in ids}}
    tensors.SymIntExpr._exprBuilder = None


def desc(trt: Any, shape: tuple[int, ...], kind: str) -> Any:
    return trt.plugin.from_shape_expr(shape, getattr(trt.DataType, kind))


def know(trt: Any, descs: list[Any]) -> None:
    """Give tensors the numeric shapes that they have once TensorRT asks for launches."""
    for made in descs:
        made.shape = trt.plugin.Shape(tuple(sizes(made)))


def sizes(made: Any) -> list[int]:
    return [axis.constant_value() for axis in made.shape_expr]


def test_every_member_in_use_exists(trt: Any) -> None:
    from engine.export import plugins, tensorrt

    missing = []
    for member in (*tensorrt.MEMBERS, *plugins.MEMBERS):
        try:
            reduce(getattr, member.split("."), trt)
        except AttributeError:
            missing.append(member)
    assert not missing


def test_the_decorators_take_every_plugin(definitions: dict[str, Any]) -> None:
    import numpy as np

    from engine.export.operators import OPERATORS

    for operator in OPERATORS:
        found = definitions[f"focus::{operator.name}"]
        assert tuple(found.input_tensor_names) == operator.inputs
        assert found.num_outputs == len(operator.outputs)
        kinds = {"ints": np.int64, "floats": np.float32}
        expected = {name: (False, kinds[kind]) for name, kind in operator.attributes}
        assert definitions["created"][f"focus::{operator.name}"] == expected
        assert found.impl_func is not None
        ahead = operator.name != "focus_gated_cross_attention"
        assert (found.aot_impl_func is not None) == ahead


def check_kernel(ptx: str, symbol: str, arguments: int) -> None:
    """The kernel takes the arguments that TensorRT passes, no more, and assembles."""
    from kernels import aot

    entry = ptx.partition(".entry")[2].partition(")")[0]
    assert entry.split("(")[0].strip() == symbol
    assert entry.count(".param") == arguments
    if shutil.which(aot.tool("ptxas")):
        assert aot.assemble(ptx, "sm_90")


def test_the_codebook_lookup_is_launched_for_its_shapes(
    trt: Any, definitions: dict[str, Any]
) -> None:
    found = definitions["focus::focus_codebook_lookup"]
    inputs = [desc(trt, (100, 8), "FLOAT"), desc(trt, (300, 8), "FLOAT")]
    outputs = found.register_func(*inputs)
    assert [sizes(output) for output in outputs] == [[100], [100]]
    assert [output.dtype for output in outputs] == [trt.DataType.FLOAT, trt.DataType.INT64]
    (combination,) = found.autotune_func(*inputs, outputs)
    (one,) = combination._get_combinations()
    assert one.types == [trt.DataType.FLOAT] * 3 + [trt.DataType.INT64]
    know(trt, inputs)
    symbol, ptx, launch, scalars = found.aot_impl_func(*inputs, outputs, 1)
    assert launch.grid_x._expr.value == 7
    assert launch.block_x._expr.value == 128
    assert launch.shared_mem._expr.value <= 48 << 10
    assert [scalar._expr.value for scalar in scalars] == [100, 300]
    check_kernel(ptx, symbol, 2 + 2 + 2)


def test_the_mask_attention_is_launched_for_its_shapes(
    trt: Any, definitions: dict[str, Any]
) -> None:
    import numpy as np

    from engine.export.errors import ExportError

    found = definitions["focus::focus_mask_attention"]
    shapes = [(2, 3, 96, 64), (2, 1, 8, 12), (3, 1, 64), (3, 1, 64), (2,), (2,)]
    kinds = ["HALF"] * 4 + ["INT64"] * 2
    inputs = [desc(trt, *pair) for pair in zip(shapes, kinds, strict=True)]
    attributes = {"rope": np.array([1]), "theta": np.array([1e4], np.float32)}
    described = found.register_func(*inputs, **attributes)
    outputs = [described] if not isinstance(described, tuple) else list(described)
    assert sizes(outputs[0]) == [2, 3, 96, 64]
    know(trt, inputs)
    symbol, ptx, launch, scalars = found.aot_impl_func(*inputs, *attributes.values(), outputs, 1)
    assert (launch.grid_x._expr.value, launch.grid_y._expr.value) == (3, 6)
    assert launch.shared_mem._expr.value <= 48 << 10
    assert [scalar._expr.value for scalar in scalars] == [3, 96, 8, 12]
    check_kernel(ptx, symbol, 6 + 4 + 1)
    inputs[1] = desc(trt, (2, 2, 8, 12), "HALF")
    know(trt, inputs)
    with pytest.raises(ExportError, match="one mask channel expected ahead of time, got 2"):
        found.aot_impl_func(*inputs, *attributes.values(), outputs, 1)
