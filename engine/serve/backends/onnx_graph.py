"""What ONNX Runtime on a CPU runs slowly, said in operators that it has kernels for.

ONNX Runtime has no CPU kernel for `GroupNormalization`: it runs the definition, a dozen passes over
the map with casts between. TensorRT does have one, so bundles keep the operator, and the graph is
rewritten in memory when a session is made. A small group is one row of an `InstanceNormalization`,
which adds its values up one by one in fp32 (2e-6 off at a quarter of a million values). Groups that
are larger, or of unknown size, take their means within lines first and then over lines. Gain and
shift follow. (`focus verify` compares the numbers after the rewrite.)
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import DTypeLike
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

NORM = "GroupNormalization"
FLOAT, FLOAT16 = 1, 10
SMALL = 2**15  # values in a group that may be added up one by one


def rewrite(model: ModelProto) -> int:
    """Replace every group norm whose rank is known, in place; return how many were replaced."""
    graph = model.graph
    values = (*graph.value_info, *graph.input, *graph.output)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    kinds = {v.name: v.type.tensor_type.elem_type for v in values}
    nodes: list[NodeProto] = []
    count = 0
    for node in graph.node:
        shape, kind = shapes.get(node.input[0], []) if node.input else [], 0
        if node.op_type == NORM and len(shape) >= 3:
            kind = kinds[node.input[0]]
        if kind not in (FLOAT, FLOAT16):
            nodes.append(node)
            continue
        nodes.extend(_Norm(graph, node, kind).nodes(shape))
        count += 1
    del graph.node[:]
    graph.node.extend(nodes)
    return count


class _Norm:
    """One norm's nodes: what they are called, and the constants that they read."""

    def __init__(self, graph: GraphProto, node: NodeProto, kind: int) -> None:
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        self.groups = int(given["num_groups"])
        self.epsilon = float(given.get("epsilon", 1e-5))
        self.graph, self.output = graph, node.output[0]
        self.x, self.gain, self.shift = node.input
        self.dtype = helper.tensor_dtype_to_np_dtype(kind)

    def name(self, part: str) -> str:
        return f"{self.output}_norm_{part}"

    def constant(self, part: str, value: object, dtype: DTypeLike = np.int64) -> str:
        tensor = numpy_helper.from_array(np.array(value, dtype), self.name(part))
        self.graph.initializer.append(tensor)
        return self.name(part)

    def nodes(self, shape: list[int]) -> list[NodeProto]:
        """Nodes for a map whose dims are `shape`, 0 where unknown."""
        size = math.prod(shape[1:]) // self.groups
        wide = self.constant("wide", [-1, *[1] * (len(shape) - 2)])
        make, name = helper.make_node, self.name
        return [
            *(self._at_once() if 0 < size <= SMALL else self._by_lines()),
            make("Shape", [self.x], [name("shape")]),
            make("Reshape", [name("even"), name("shape")], [name("back")]),
            make("Reshape", [self.gain, wide], [name("gain")]),
            make("Reshape", [self.shift, wide], [name("shift")]),
            make("Mul", [name("back"), name("gain")], [name("scaled")]),
            make("Add", [name("scaled"), name("shift")], [self.output]),
        ]

    def _at_once(self) -> list[NodeProto]:
        flat = self.constant("flat", [0, self.groups, -1])
        ones = self.constant("ones", [1.0] * self.groups, self.dtype)
        zeros = self.constant("zeros", [0.0] * self.groups, self.dtype)
        inputs, output = [self.name("grouped"), ones, zeros], [self.name("even")]
        return [
            helper.make_node("Reshape", [self.x, flat], [self.name("grouped")]),
            helper.make_node("InstanceNormalization", inputs, output, epsilon=self.epsilon),
        ]

    def _by_lines(self) -> list[NodeProto]:
        make, name = helper.make_node, self.name
        head = self.constant("head", [0, self.groups, -1])
        epsilon = self.constant("epsilon", self.epsilon, self.dtype)
        axes = (self.constant("within", [3]), self.constant("over", [2]))
        return [
            make("Shape", [self.x], [name("line")], start=-1),
            make("Concat", [head, name("line")], [name("lines")], axis=0),
            make("Reshape", [self.x, name("lines")], [name("grouped")]),
            *self._mean("grouped", "mean", axes),
            make("Sub", [name("grouped"), name("mean")], [name("centred")]),
            make("Mul", [name("centred"), name("centred")], [name("square")]),
            *self._mean("square", "variance", axes),
            make("Add", [name("variance"), epsilon], [name("raised")]),
            make("Sqrt", [name("raised")], [name("deviation")]),
            make("Div", [name("centred"), name("deviation")], [name("even")]),
        ]

    def _mean(self, of: str, to: str, axes: tuple[str, str]) -> list[NodeProto]:
        """Mean of each line, then of the lines' means: lines are equally long."""
        make, name, between = helper.make_node, self.name, self.name(f"{to}_by_line")
        return [
            make("ReduceMean", [name(of), axes[0]], [between], keepdims=1),
            make("ReduceMean", [between, axes[1]], [name(to)], keepdims=1),
        ]
