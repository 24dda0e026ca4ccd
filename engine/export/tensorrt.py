"""TensorRT plans of the parts' ONNX graphs: one profile per part, timing cache, refit.

Not run here: TensorRT builds plans on the GPU that will run them. The code stays thin, and
`tests/engine/export/test_tensorrt.py` compares every member it uses (`MEMBERS`) with the real
Python bindings where they can be imported. Our operators become plugins (`plugins.py`); without
them TensorRT parses their bodies.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import onnx
from torch import nn

from engine.export.errors import BackendUnavailable, ExportError
from engine.export.part import Part
from engine.export.support import restrictions

PLAN = ".plan"
TIMINGS = "timings.cache"
MEMBERS = (
    "Builder.create_network",
    "Builder.create_builder_config",
    "Builder.create_optimization_profile",
    "Builder.build_serialized_network",
    "BuilderFlag.REFIT",
    "BuilderFlag.STRIP_PLAN",
    "ExecutionContextAllocationStrategy.USER_MANAGED",
    "IBuilderConfig.add_optimization_profile",
    "IBuilderConfig.create_timing_cache",
    "IBuilderConfig.get_timing_cache",
    "IBuilderConfig.set_flag",
    "IBuilderConfig.set_timing_cache",
    "ICudaEngine.create_execution_context",
    "ICudaEngine.device_memory_size_v2",
    "IExecutionContext.execute_async_v3",
    "IExecutionContext.get_tensor_shape",
    "IExecutionContext.set_device_memory",
    "IExecutionContext.set_input_shape",
    "IExecutionContext.set_tensor_address",
    "IOptimizationProfile.set_shape",
    "ITimingCache.serialize",
    "Logger.WARNING",
    "OnnxParser.get_error",
    "OnnxParser.num_errors",
    "OnnxParser.parse_from_file",
    "OnnxParserRefitter.refit_from_file",
    "Refitter.refit_cuda_engine",
    "Runtime.deserialize_cuda_engine",
)
End = Literal["min", "opt", "max"]


def library() -> Any:
    """Return the module `tensorrt`; raises `BackendUnavailable` without it."""
    try:
        return importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        raise BackendUnavailable(
            f"TensorRT is not installed ({error}); pip install tensorrt on a machine with an "
            "NVIDIA GPU, or export with --backends onnx"
        ) from error


def require() -> None:
    """Raise `BackendUnavailable` with every reason why plans cannot be built here."""
    import torch

    library()
    if not torch.cuda.is_available():
        raise BackendUnavailable("TensorRT builds plans on the GPU that runs them: no GPU found")


def export_part(part: Part, owner: nn.Module, folder: Path, precision: str) -> list[str]:
    """Write a part's ONNX graph if it is not there, and build its plan; return their files."""
    from engine.export import onnx as graphs

    path = folder / f"{part.name}.onnx"
    files = [path.name]
    if not path.is_file():
        files = graphs.export_part(part, owner, folder, precision)
    refuse_restrictions(path)
    plan = folder / f"{part.name}{PLAN}"
    build_plan(part, path, plan, timings=folder / TIMINGS)
    return [plan.name, *files]


def refuse_restrictions(path: Path) -> None:
    """Raise `ExportError` for what TensorRT documents that it does not take."""
    found = restrictions(onnx.load(str(path), load_external_data=False))
    if found:
        raise ExportError(
            f"{path.name}: a graph that TensorRT can parse expected, got {', '.join(found)}; run "
            "this part with onnx (--parts leaves it out)"
        )


def build_plan(part: Part, graph: Path, plan: Path, *, timings: Path, strip: bool = False) -> Path:
    """Build a refittable plan whose one profile is the part's, atomically.

    timings: a cache of measured tactics, read and extended; it is valid for one TensorRT version
    and GPU, so its name carries both. strip: leave the weights out (refit before the first use).
    Raises `ExportError` with the parser's or builder's reason.
    """
    from engine.export import plugins

    trt = library()
    plugins.ensure(trt)
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(0)  # strongly typed: the graph's own types, since 11.0
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        raise ExportError(f"{graph.name}: TensorRT could not parse it: {parser_errors(parser)}")
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.REFIT)
    if strip:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    profile = builder.create_optimization_profile()
    for name, shapes in profile_shapes(part).items():
        profile.set_shape(name, *shapes)
    config.add_optimization_profile(profile)
    keyed = timings.with_name(f"{timings.stem}-{machine_key(trt)}{timings.suffix}")
    cache = config.create_timing_cache(keyed.read_bytes() if keyed.is_file() else b"")
    config.set_timing_cache(cache, False)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise ExportError(f"{graph.name}: TensorRT built no plan; its log says why")
    write(plan, bytes(serialized))
    write(keyed, bytes(config.get_timing_cache().serialize()))
    return plan


def refit(engine: Any, graph: Path) -> None:
    """Give an engine the weights of another export of the same part, without rebuilding it.

    Raises `ExportError` when the graph has other tensors than the engine was built from.
    """
    trt = library()
    logger = trt.Logger(trt.Logger.WARNING)
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
        raise ExportError(f"{graph.name}: the weights of this engine expected; build a new plan")


def profile_shapes(part: Part) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Return (min, opt, max) of every input, as an optimization profile wants them."""
    ends: Sequence[End] = ("min", "opt", "max")
    return {spec.name: tuple(spec.size(part.profile(end)) for end in ends) for spec in part.inputs}


def machine_key(trt: Any) -> str:
    """Name what a timing cache is valid for: TensorRT's version, the GPU and its driver."""
    import torch

    gpu = torch.cuda.get_device_properties(0)
    text = f"{trt.__version__} {gpu.name} {gpu.major}.{gpu.minor} {torch.version.cuda}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def parser_errors(parser: Any) -> str:
    """Return what the parser objects to, in one line."""
    return "; ".join(str(parser.get_error(number)) for number in range(parser.num_errors))


def write(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
