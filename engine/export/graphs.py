"""Graphs without weights: what a config of any size exports to, on a machine of any size.

The model is address space that nobody fills (`skeleton`); exporting follows shapes only. Weights
are named initializers that refer to a file `<part>.weights` which does not exist; whoever has the
weights writes them there in the order of the graph, or loads them by name.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from engine.export.build import chosen
from engine.export.errors import ExportError
from engine.export.graph_check import check_nodes, tensors_of
from engine.export.mapped import skeleton
from engine.export.onnx import strip_notes, to_graph
from engine.export.part import Part
from engine.export.parts import list_parts
from focus.config import FocusConfig
from focus.folder import fresh_folder

REPORT = "graphs.json"
WEIGHTS = ".weights"


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One exported graph. `weights` counts numbers, `peak_mb` is the process's so far."""

    part: str
    nodes: int
    weights: int
    seconds: float
    peak_mb: float


def export_graphs(
    config: FocusConfig,
    out: str | Path,
    *,
    only: Sequence[str] | None = None,
    say: Callable[[Graph], None] = lambda graph: None,
) -> list[Graph]:
    """Write `<part>.onnx` for the parts of a config, and graphs.json about them, atomically.

    Raises `ExportError`: a part does not export or uses an operator that TensorRT does not
    document; or `out` holds something else.
    """
    out = Path(out)
    if out.exists() and not (out / REPORT).is_file() and (out.is_file() or any(out.iterdir())):
        raise ExportError(
            f"{out}: a new folder or earlier graphs expected, but it holds something else; choose "
            "another --out"
        )
    found = []
    with fresh_folder(out) as folder:
        for part in chosen(list_parts(skeleton(config)), only):
            start = time.perf_counter()
            path = folder / f"{part.name}.onnx"
            weights = write_graph(part, to_graph(part, weights=False), path)
            nodes = sum(check_graph(path, part.name).values())
            seconds = round(time.perf_counter() - start, 1)
            graph = Graph(
                part=part.name, nodes=nodes, weights=weights, seconds=seconds, peak_mb=peak_mb()
            )
            found.append(graph)
            say(graph)
            gc.collect()
        report = {"config": config.name, "graphs": [asdict(graph) for graph in found]}
        (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    return found


def write_graph(part: Part, model: ir.Model, path: Path) -> int:
    """Write a graph with its weights declared but absent; return how many numbers they are."""
    module = part.module
    named = {**dict(module.named_parameters(remove_duplicate=False)), **module.state_dict()}
    offset = count = 0
    for name, value in model.graph.initializers.items():
        constant = value.const_value
        if name not in named or constant is None:
            continue
        size = named[name].numel()
        value.const_value = ir.ExternalTensor(
            f"{part.name}{WEIGHTS}",
            offset,
            constant.nbytes,
            constant.dtype,
            shape=ir.Shape(list(named[name].shape)),
            name=name,
            base_dir=path.parent,
        )
        offset, count = offset + constant.nbytes, count + size
    strip_notes(model)
    ir.save(model, path)
    return count


def check_graph(path: Path, name: str) -> dict[str, int]:
    """Check a graph whose weights are absent; return how often it uses each operator.

    ONNX's checker wants to open the files of weights; it is shown them as inputs instead. Raises
    `ExportError`.
    """
    model = onnx.load(str(path), load_external_data=False)
    counts = check_nodes(model, name)
    graph = model.graph
    absent = [t for t in tensors_of(model) if t.data_location == onnx.TensorProto.EXTERNAL]
    kept = [t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    graph.input.extend(
        onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in absent
    )
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{name}: ONNX's checker refused the graph: {error}") from error
    return counts


def peak_mb() -> float:
    """Largest memory of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1e6 if sys.platform == "darwin" else 1e3), 1)
