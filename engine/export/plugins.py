"""Our operators as TensorRT plugins, made with the decorators of `tensorrt.plugin`.

    import tensorrt
    register(tensorrt)      # once per process, before a graph is parsed

A plugin is described once (`register`), and implemented twice:

- *ahead of time* (`aot_impl`): one Triton kernel becomes PTX inside the plan, which then runs
  without Python. TensorRT gives such a plugin one launch, int32 scalars, and no scratch memory, so
  these are the kernels of `single.py` in the operators' folders. The codebook lookup and the mask
  attention of one mask channel have one.
- *in Python* (`impl`): the torch operator runs on TensorRT's buffers and stream, with as many
  launches as it likes (its fastest kernels). The plan then needs this process. Gated
  cross-attention has this form only: its update sums over heads that read all features each, so
  one launch would read 37,000 features from a handful of programs; splitting them takes a second
  launch and scratch.

The node's attribute `aot` says which is meant. Where no plugin is registered, TensorRT parses the
node's body. Not run here: needs TensorRT and an NVIDIA GPU. `tests/engine/export/test_plugins.py`
runs the real decorators of the bindings wheel and evaluates launches for real shapes.
"""

# B batch, H heads, N queries or tokens, K codes, D width, Y X rows and columns of a mask

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import GenericAlias, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import kernels.codebook_lookup.api
import kernels.gated_cross_attention.api
import kernels.mask_attention.api  # noqa: F401  registers torch.ops.focus
from engine.export.errors import ExportError
from engine.export.operators import DOMAIN

MEMBERS = (
    "DataType.BF16",
    "DataType.FLOAT",
    "DataType.HALF",
    "DataType.INT64",
    "NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS",
    "QuickPluginCreationRequest.STRICT_AOT",
    "plugin.AutoTuneCombination",
    "plugin.KernelLaunchParams",
    "plugin.SymIntExprs.from_tuple",
    "plugin.SymInt32",
    "plugin.Tensor.data_ptr",
    "plugin.Tensor.dtype",
    "plugin.Tensor.shape",
    "plugin.Tensor.strides",
    "plugin.TensorDesc.dtype",
    "plugin.TensorDesc.like",
    "plugin.TensorDesc.ndim",
    "plugin.TensorDesc.shape",
    "plugin.TensorDesc.shape_expr",
    "plugin.aot_impl",
    "plugin.autotune",
    "plugin.cdiv",
    "plugin.from_shape_expr",
    "plugin.impl",
    "plugin.register",
)
SMALL = 48 << 10  # shared memory that every launcher gives without being asked
NAMES = {"FLOAT": "FP32", "HALF": "FP16", "BF16": "BF16", "INT64": "INT64"}  # for autotuning
TRITON = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "INT64": "i64"}
VIEWS = {  # what numpy's names can say of a buffer, and what it is
    "FLOAT": ("<f4", torch.float32),
    "HALF": ("<f2", torch.float16),
    "BF16": ("<i2", torch.bfloat16),
    "INT64": ("<i8", torch.int64),
}
Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel and how it is launched; sizes are numbers or TensorRT's expressions."""

    symbol: str
    ptx: str
    threads: int
    shared: int
    grid: tuple[Any, ...]
    scalars: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """What TensorRT asks of an operator.

    describe(trtp, inputs) -> outputs, symbolically. run(inputs, attributes) -> outputs, in torch.
    launch(trtp, inputs, attributes, arch) -> the single kernel; None where there is none.
    """

    name: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    outputs: int
    describe: Callable[[Any, Sequence[Any]], tuple[Any, ...]]
    run: Callable[[Sequence[Tensor], Mapping[str, Any]], tuple[Tensor, ...]]
    launch: Callable[[Any, Sequence[Any], Mapping[str, Any], str], Launch] | None = None


def ensure(trt: Any) -> list[str]:
    """Register the plugins unless this process has; none where this TensorRT has no decorators."""
    try:
        trtp = importlib.import_module(f"{trt.__name__}.plugin")
    except ImportError:
        return []
    return [] if hasattr(trtp.op, DOMAIN) else register(trt)


def register(trt: Any, *, arch: str | None = None) -> list[str]:
    """Register every plugin with TensorRT's decorators; return their ids.

    trt: the module `tensorrt`. arch: "sm_90"; by default that of the GPU in use.
    Raises whatever the decorators object to, and `ExportError` later where a launch cannot be made.
    """
    return [_register(trt, plugin, arch) for plugin in PLUGINS]


def _register(trt: Any, plugin: Plugin, arch: str | None) -> str:
    trtp, name = trt.plugin, f"{DOMAIN}::{plugin.name}"
    count, tensors = len(plugin.inputs), dict.fromkeys(plugin.inputs, trtp.TensorDesc)
    described = GenericAlias(tuple, (trtp.TensorDesc,) * plugin.outputs)

    def describe(*given: Any) -> Any:
        return plugin.describe(trtp, given[:count])

    def autotune(*given: Any) -> Any:
        kinds = ", ".join(NAMES[kind_of(trt, t.dtype)] for t in (*given[:count], *given[-1]))
        layouts = ", ".join(["LINEAR"] * (count + plugin.outputs))
        return [trtp.AutoTuneCombination(kinds, layouts, [1])]

    def in_python(*given: Any) -> None:
        *arguments, outputs, stream = given
        attributes = dict(zip(plugin.attributes, arguments[count:], strict=True))
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):  # type: ignore[no-untyped-call]
            found = plugin.run([view(trt, t) for t in arguments[:count]], attributes)
            for target, value in zip(outputs, found, strict=True):
                view(trt, target).copy_(value)

    def ahead(*given: Any) -> Any:
        assert plugin.launch is not None
        attributes = dict(zip(plugin.attributes, given[count:], strict=False))
        made = plugin.launch(trtp, given[:count], attributes, arch or _arch())
        grid = dict(zip(("grid_x", "grid_y", "grid_z"), made.grid, strict=False))
        launch = trtp.KernelLaunchParams(**grid, block_x=made.threads, shared_mem=made.shared)
        scalars = tuple(trtp.SymInt32(scalar) for scalar in made.scalars)
        return made.symbol, made.ptx, launch, trtp.SymIntExprs.from_tuple(scalars)

    attributes = dict(plugin.attributes)
    trtp.register(name)(_typed(describe, {**tensors, **attributes}, described))
    tuned = {**tensors, **attributes, "outputs": described}
    combinations = GenericAlias(list, (trtp.AutoTuneCombination,))
    trtp.autotune(name)(_typed(autotune, tuned, combinations))
    buffers = dict.fromkeys(plugin.inputs, trtp.Tensor)
    written = {"outputs": GenericAlias(tuple, (trtp.Tensor,) * plugin.outputs), "stream": int}
    trtp.impl(name)(_typed(in_python, {**buffers, **attributes, **written}, None))
    if plugin.launch is not None:
        result = GenericAlias(tuple, (str, str, trtp.KernelLaunchParams, trtp.SymIntExprs))
        trtp.aot_impl(name)(_typed(ahead, {**tuned, "tactic": int}, result))
    return name


def _typed(function: Callable[..., Any], parameters: Mapping[str, Any], returned: Any) -> Any:
    """Give a function of any arguments the signature that the decorators read."""
    import inspect

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    given = [inspect.Parameter(n, kind, annotation=a) for n, a in parameters.items()]

    def called(*arguments: Any, **named: Any) -> Any:
        bound = signature.bind(*arguments, **named)
        return function(*(bound.arguments[name] for name in parameters))

    signature = inspect.Signature(given, return_annotation=returned)
    called.__signature__ = signature  # type: ignore[attr-defined]
    called.__name__ = function.__name__
    return called


def kind_of(trt: Any, dtype: Any) -> str:
    """Return the name of a TensorRT data type; raises `ExportError` for one that we never use."""
    for name in NAMES:
        if dtype == getattr(trt.DataType, name):
            return name
    raise ExportError(f"a plugin tensor of {', '.join(NAMES)} expected, got {dtype}")


class Buffer:
    """Device memory that torch can look at; bf16 passes as int16, which numpy can name."""

    def __init__(self, pointer: int, shape: tuple[int, ...], strides: Any, typestr: str) -> None:
        size = int(typestr[2:])
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": typestr,
            "data": (pointer, False),
            "strides": tuple(int(step) * size for step in strides),
            "version": 3,
        }


def view(trt: Any, tensor: Any) -> Tensor:
    """Return a torch tensor over a plugin's buffer."""
    typestr, dtype = VIEWS[kind_of(trt, tensor.dtype)]
    shape = tuple(int(size) for size in tensor.shape)
    buffer: Any = Buffer(int(tensor.data_ptr), shape, tensor.strides, typestr)
    return torch.as_tensor(buffer, device="cuda").view(dtype)


def compiled(variant: Any, arch: str) -> tuple[str, str, int, int]:
    """Return (symbol, PTX with the listed arguments alone, threads, shared memory).

    Raises `ExportError` when the kernel wants more shared memory than a launcher gives unasked.
    """
    from kernels import aot

    made = aot.compile_variant(variant, arch)
    described = aot.launch(variant, arch, made)
    if described["shared"] > SMALL:
        raise ExportError(
            f"{variant.name}: at most {SMALL} bytes of shared memory expected, got "
            f"{described['shared']}; make its tiles smaller"
        )
    ptx = aot.trim(made.asm["ptx"], len(variant.signature))
    return described["symbol"], ptx, described["threads"], described["shared"]


def _arch() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def _kinds(inputs: Iterable[Any]) -> tuple[str, ...]:
    """Triton's names of the dtypes of some inputs."""
    from engine.export.tensorrt import library

    return tuple(TRITON[kind_of(library(), tensor.dtype)] for tensor in inputs)


def _single(operator: str) -> ModuleType:
    """Return the single-launch kernel of an operator: rows per program, and its variants."""
    from kernels import catalog

    return catalog.optional("single")[operator]


def _launch_lookup(trtp: Any, inputs: Sequence[Any], attributes: Any, arch: str) -> Launch:
    single = _single("codebook_lookup")
    x, codes = inputs
    first, second = _kinds((x, codes))
    symbol, ptx, threads, shared = compiled(single.variant((first, second), int(x.shape[1])), arch)
    (tokens, _), (count, _) = x.shape_expr, codes.shape_expr
    return Launch(
        symbol=symbol,
        ptx=ptx,
        threads=threads,
        shared=shared,
        grid=(trtp.cdiv(tokens, single.ROWS),),
        scalars=(tokens, count),
    )


def _launch_mask(
    trtp: Any, inputs: Sequence[Any], attributes: Mapping[str, Any], arch: str
) -> Launch:
    single = _single("mask_attention")
    query, mask, keys, values, _, _ = inputs
    if int(mask.shape[1]) != 1:
        raise ExportError(
            f"focus_mask_attention: one mask channel expected ahead of time, got {mask.shape[1]}; "
            "prefer the plugin in Python (attribute aot of 0)"
        )
    first, second, third, fourth = _kinds((query, mask, keys, values))
    variant = single.variant(
        (first, second, third, fourth),
        int(query.shape[3]),
        bool(attributes["rope"][0]),
        float(attributes["theta"][0]),
    )
    symbol, ptx, threads, shared = compiled(variant, arch)
    (batch, heads, queries, _), (_, _, rows, columns) = query.shape_expr, mask.shape_expr
    return Launch(
        symbol=symbol,
        ptx=ptx,
        threads=threads,
        shared=shared,
        grid=(trtp.cdiv(queries, single.ROWS), batch * heads),
        scalars=(heads, queries, rows, columns),
    )


def _run_gated(inputs: Sequence[Tensor], attributes: Mapping[str, Any]) -> tuple[Tensor, ...]:
    heads = int(attributes["num_heads"][0])
    return (torch.ops.focus.gated_cross_attention(*inputs, heads, None),)


def _run_lookup(inputs: Sequence[Tensor], attributes: Mapping[str, Any]) -> tuple[Tensor, ...]:
    del attributes
    distance, index = torch.ops.focus.codebook_lookup(*inputs)
    return distance, index


def _run_mask(inputs: Sequence[Tensor], attributes: Mapping[str, Any]) -> tuple[Tensor, ...]:
    query, mask, keys, values, grid, extent = inputs
    rope, theta = bool(attributes["rope"][0]), float(attributes["theta"][0])
    # Sizes are read from the device: a stream that waits, so no CUDA graph around this form.
    sizes = grid.tolist(), extent.tolist()
    return (torch.ops.focus.mask_attention(query, mask, keys, values, *sizes, rope, theta),)


def _describe_lookup(trtp: Any, inputs: Sequence[Any]) -> tuple[Any, ...]:
    from engine.export.tensorrt import library

    kinds, tokens = library().DataType, inputs[0].shape_expr[0]
    return tuple(trtp.from_shape_expr((tokens,), kind) for kind in (kinds.FLOAT, kinds.INT64))


def _describe_first(trtp: Any, inputs: Sequence[Any]) -> tuple[Any, ...]:
    return (inputs[0].like(),)


PLUGINS = (
    Plugin(
        name="focus_gated_cross_attention",
        inputs=(
            "residual", "query", "features", "w_feature", "b_feature",
            "w_q", "w_k", "w_v", "w_o", "gate",
        ),
        attributes={"num_heads": Ints},
        outputs=1,
        describe=_describe_first,
        run=_run_gated,
    ),
    Plugin(
        name="focus_codebook_lookup",
        inputs=("x", "codes"),
        attributes={},
        outputs=2,
        describe=_describe_lookup,
        run=_run_lookup,
        launch=_launch_lookup,
    ),
    Plugin(
        name="focus_mask_attention",
        inputs=("query", "mask", "key_vectors", "value_vectors", "query_grid", "extent"),
        attributes={"rope": Ints, "theta": Floats},
        outputs=1,
        describe=_describe_first,
        run=_run_mask,
        launch=_launch_mask,
    ),
)  # fmt: skip
