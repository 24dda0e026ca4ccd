"""What ONNX Runtime on a CPU runs slowly, said in operators that it has kernels for.

ONNX Runtime has no CPU kernel for `GroupNormalization`: it runs the definition, a dozen passes over
the map with casts between. TensorRT does have one, so bundles keep the operator, and the graph is
rewritten in memory when a session is made: one `InstanceNormalization` over each group, then scale
and shift. The numbers agree up to rounding (`focus verify` compares them after the rewrite).
"""

from __future__ import annotations

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

NORM = "GroupNormalization"
FLOAT, FLOAT16 = 1, 10


def rewrite(model: ModelProto) -> int:
    """Replace every group norm whose rank is known, in place; return how many were replaced."""
    graph = model.graph
    values = (*graph.value_info, *graph.input, *graph.output)
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in values}
    kinds = {v.name: v.type.tensor_type.elem_type for v in values}
    nodes: list[NodeProto] = []
    count = 0
    for node in graph.node:
        rank, kind = ranks.get(node.input[0], 0) if node.input else 0, 0
        if node.op_type == NORM and rank >= 3:
            kind = kinds[node.input[0]]
        if kind not in (FLOAT, FLOAT16):
            nodes.append(node)
            continue
        nodes.extend(_instance_norm(graph, node, rank, kind))
        count += 1
    del graph.node[:]
    graph.node.extend(nodes)
    return count


def _instance_norm(graph: GraphProto, node: NodeProto, rank: int, kind: int) -> list[NodeProto]:
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    groups, epsilon = int(given["num_groups"]), float(given.get("epsilon", 1e-5))
    x, scale, shift = node.input
    base = f"{node.output[0]}_norm"

    def name(part: str) -> str:
        return f"{base}_{part}"

    dtype = helper.tensor_dtype_to_np_dtype(kind)
    for part, values in (("ones", [1.0] * groups), ("zeros", [0.0] * groups)):
        graph.initializer.append(numpy_helper.from_array(np.array(values, dtype), name(part)))
    for part, shape in (("flat", [0, groups, -1]), ("wide", [-1, *[1] * (rank - 2)])):
        graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), name(part)))
    make = helper.make_node
    return [
        make("Shape", [x], [name("shape")]),
        make("Reshape", [x, name("flat")], [name("grouped")]),
        make(
            "InstanceNormalization",
            [name("grouped"), name("ones"), name("zeros")],
            [name("even")],
            epsilon=epsilon,
        ),
        make("Reshape", [name("even"), name("shape")], [name("back")]),
        make("Reshape", [scale, name("wide")], [name("scale")]),
        make("Reshape", [shift, name("wide")], [name("shift")]),
        make("Mul", [name("back"), name("scale")], [name("scaled")]),
        make("Add", [name("scaled"), name("shift")], [node.output[0]]),
    ]
