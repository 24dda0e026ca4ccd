"""One part to one ONNX file: the model's own graph, our operators as single nodes."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common
import torch
from onnxscript import optimizer
from torch import Tensor, nn

from engine.export.errors import ExportError
from engine.export.graph_check import check_nodes
from engine.export.operators import DOMAIN, OPERATORS, translation_table
from engine.export.part import Part
from engine.export.shelf import References, Stored, read_shelf

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TRACE = {"batch": 2, "length": 3, "slots": 9, "candidates": 3}  # small, and no two alike
EXACT = ("codebook",)  # buffers that stay fp32: a rounded codebook would give other codes


def in_precision(part: Part, dtype: torch.dtype) -> Part:
    """Return the part with floating parameters and buffers in `dtype`; what fits is shared."""
    held = {id(t): t for t in (*part.module.parameters(), *part.module.buffers())}
    module = copy.deepcopy(part.module, dict(held))  # the structure alone is copied
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.is_floating_point() and parameter.dtype != dtype:
                setattr(owner, name, nn.Parameter(parameter.detach().to(dtype), False))
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in EXACT:
                setattr(owner, name, buffer.to(dtype))
    return Part(**{**part.__dict__, "module": module})


def trace_sizes(part: Part) -> dict[str, int]:
    """Return sizes to trace a part at: within its profile, more than one, different."""
    sizes = {}
    for dim in part.dims:
        wanted = TRACE.get(dim.name, dim.opt)
        sizes[dim.name] = min(max(wanted, dim.min), dim.max)
    return sizes


def to_graph(part: Part, dtype: torch.dtype = torch.float32, *, weights: bool = True) -> ir.Model:
    """Export a part (already `in_precision`) to an ONNX graph with its initializers in memory.

    weights=False folds nothing that weights enter: they may be memory that nobody has filled.
    Raises `ExportError` with the exporter's reason.
    """
    table = translation_table()
    inputs = part.example_inputs(trace_sizes(part), dtype)
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                part.module.eval(),
                inputs,
                dynamo=True,
                opset_version=part.opset,
                dynamic_shapes=part.nested_shapes(),
                input_names=[spec.name for spec in part.inputs],
                output_names=[spec.name for spec in part.outputs],
                custom_translation_table=table,
                optimize=weights,
                verbose=False,
            )
        except Exception as error:
            reason = " ".join(str(error.__cause__ or error).split())[:300]
            raise ExportError(f"{part.name}: the exporter refused: {reason}") from error
    assert program is not None
    model: ir.Model = program.model
    if not weights:
        fold_without(model, {name for name, _ in part.module.named_parameters()})
    add_functions(model, part.opset)
    check_dims(part, model)
    return model


def fold_without(model: ir.Model, weights: Collection[str]) -> None:
    """Fold constants and sequences of a graph, except where a weight enters."""
    optimizer.fold_constants_ir(
        model,
        should_fold=lambda node: (
            False if any(v is not None and v.name in weights for v in node.inputs) else None
        ),
    )
    ir.passes.common.RemoveUnusedNodesPass()(model)


def add_functions(model: ir.Model, opset: int) -> None:
    """Append the body of every operator of ours that the graph names."""
    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for operator in OPERATORS:
        if operator.name in used:
            function = ir.serde.deserialize_function(operator.function(opset))
            model.functions[function.identifier()] = function
    if used:
        model.opset_imports[DOMAIN] = 1


def check_dims(part: Part, model: ir.Model) -> None:
    """Compare the graph's inputs with the part's; exporters may make a dim static in silence.

    Raises `ExportError` naming the first difference.
    """
    moving = {dim.name for dim in part.dims if dim.min != dim.max}
    given = {value.name: value for value in model.graph.inputs}
    if list(given) != [spec.name for spec in part.inputs]:
        raise ExportError(
            f"{part.name}: inputs {[spec.name for spec in part.inputs]} expected in the graph, got "
            f"{list(given)}"
        )
    for spec in part.inputs:
        shape = given[spec.name].shape
        got = [str(axis).replace(" ", "") for axis in shape or ()]
        sizes = part.sizes()
        expected = [
            str(axis) if isinstance(axis, int) or axis.split("*")[-1] in moving
            else str(spec.size(sizes)[number])
            for number, axis in enumerate(spec.shape)
        ]  # fmt: skip
        if got != expected:
            raise ExportError(
                f"{part.name}: {spec.name} {expected} expected in the graph, got {got}; the "
                "exporter changed a dim"
            )


def write_graph(
    part: Part, model: ir.Model, folder: Path, shelf: Mapping[str, Stored], names: Mapping[str, str]
) -> list[str]:
    """Write `<part>.onnx`, its weights by reference; return the files it needs, itself first."""
    tensors: dict[str, Tensor] = dict(part.module.named_parameters(remove_duplicate=False))
    tensors.update(part.module.named_buffers(remove_duplicate=False))
    references = References(
        folder, shelf, names, {name: tensor.detach() for name, tensor in tensors.items()}
    )
    files = references.apply(model, part.name)
    strip_notes(model)
    path = folder / f"{part.name}.onnx"
    ir.save(model, path)
    onnx.checker.check_model(str(path))
    check_nodes(onnx.load(str(path), load_external_data=False), part.name)
    return [path.name, *files]


def strip_notes(model: ir.Model) -> None:
    """Remove the exporter's notes: stack traces and paths of the machine that exported."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def shelf_names(part: Part, owner: nn.Module) -> dict[str, str]:
    """Return, for each tensor of a part's module, its name in the whole model."""
    whole = {id(t): name for name, t in owner.named_parameters(remove_duplicate=True)}
    whole.update({id(t): name for name, t in owner.named_buffers(remove_duplicate=True)})
    own = [
        *part.module.named_parameters(remove_duplicate=False),
        *part.module.named_buffers(remove_duplicate=False),
    ]
    return {name: whole[id(tensor)] for name, tensor in own if id(tensor) in whole}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress to itself."""
    loggers: list[Any] = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def export_part(part: Part, owner: nn.Module, folder: Path, precision: str) -> list[str]:
    """Write one part of a bundle that already holds the owner's weights; return its files."""
    names = shelf_names(part, owner)
    shelf = read_shelf(sorted(folder.glob("model*.safetensors")))
    dtype = PRECISIONS[precision]
    lowered = in_precision(part, dtype)
    return write_graph(lowered, to_graph(lowered, dtype), folder, shelf, names)
