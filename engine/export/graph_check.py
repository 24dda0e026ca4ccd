"""What an ONNX graph of a bundle refers to and is made of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from engine.export.bundle import Bundle
from engine.export.errors import BundleError, ExportError
from engine.export.operators import DOMAIN, OPERATORS
from engine.export.support import SUPPORTED, restrictions


def check_external_data(bundle: Bundle, path: Path) -> ModelProto:
    """Return a graph, without its weights; its external data must lie in the bundle's own files.

    Raises `BundleError` for a location that is no file of the bundle, or bytes beyond its end.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own class derives from Exception alone
        raise BundleError(f"{path}: an ONNX file expected: {error}") from error
    for tensor in tensors_of(model):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        try:
            size = bundle.inside(location).stat().st_size
            offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
        except (BundleError, ValueError) as error:
            raise BundleError(f"{path}: weights of {tensor.name!r}: {error}") from error
        if offset < 0 or length < 0 or offset + length > size:
            raise BundleError(
                f"{path}: {tensor.name!r} lies at bytes {offset} to {offset + length} of "
                f"{location}, which has {size}; export the model again"
            )
    return model


def tensors_of(model: ModelProto) -> Iterator[TensorProto]:
    """Yield every tensor of a model: initializers and attributes, in functions and subgraphs."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _node_tensors(node)


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: NodeProto) -> Iterator[TensorProto]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        for graph in (attribute.g, *attribute.graphs):
            yield from _graph_tensors(graph)


def check_nodes(model: ModelProto, name: str) -> dict[str, int]:
    """Count a model's operators; each must be ours or one that TensorRT documents, as documented.

    The bodies of our operators count too: they run where the plugin is missing. Raises
    `ExportError` naming those that are not on the list or used in an unsupported way.
    """
    counts: dict[str, int] = {}
    ours = {operator.name for operator in OPERATORS}
    bodies = {function.name for function in model.functions}
    foreign = set()
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    for node in nodes:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
        known = node.op_type in SUPPORTED if node.domain in ("", "ai.onnx") else (
            node.domain == DOMAIN and node.op_type in ours and node.op_type in bodies
        )  # fmt: skip
        if not known:
            foreign.add(f"{node.domain or 'ai.onnx'}::{node.op_type}")
    refused = sorted(foreign) + restrictions(model)
    if refused:
        raise ExportError(
            f"{name}: operators that TensorRT's parser documents expected, got {', '.join(refused)}"
        )
    return counts
