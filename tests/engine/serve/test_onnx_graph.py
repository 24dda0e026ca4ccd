"""Group norms for ONNX Runtime: fewer passes, the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx import helper, numpy_helper  # noqa: E402

from engine.serve.backends.onnx_graph import rewrite  # noqa: E402


def graph(rank: int, known: bool, side: int | str = "side") -> onnx.ModelProto:
    g = np.random.default_rng(0)
    shape = ["batch", 6, *[side] * (rank - 2)]
    relu = helper.make_node("Relu", ["x"], ["r"])
    norm = helper.make_node(
        "GroupNormalization", ["r", "s", "b"], ["y"], num_groups=3, epsilon=1e-3
    )
    constants = [
        numpy_helper.from_array(g.standard_normal(6).astype(np.float32), name) for name in "sb"
    ]
    made = helper.make_graph(
        [relu, norm],
        "g",
        [helper.make_tensor_value_info("x", 1, shape)],
        [helper.make_tensor_value_info("y", 1, shape)],
        constants,
        value_info=[helper.make_tensor_value_info("r", 1, shape)] if known else [],
    )
    opsets = [helper.make_opsetid("", 23)]
    return helper.make_model(made, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize(
    ("rank", "side", "operator"),
    [
        (3, 5, "InstanceNormalization"),
        (4, 5, "InstanceNormalization"),
        (3, "side", "ReduceMean"),
        (4, "side", "ReduceMean"),
    ],
)
def test_group_norms_become_others_of_the_same_numbers(
    rank: int, side: int | str, operator: str
) -> None:
    model = graph(rank, known=True, side=side)
    scale, shift = (torch.from_numpy(numpy_helper.to_array(t)) for t in model.graph.initializer)
    assert rewrite(model) == 1
    onnx.checker.check_model(model)
    operators = {node.op_type for node in model.graph.node}
    assert "GroupNormalization" not in operators and operator in operators
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for sizes in ((1, 6, *[5] * (rank - 2)), (3, 6, *[5 if side == 5 else 4] * (rank - 2))):
        x = torch.randn(sizes, generator=torch.Generator().manual_seed(1))
        (got,) = session.run(None, {"x": x.numpy()})
        expected = torch.nn.functional.group_norm(x.relu(), 3, scale, shift, 1e-3)
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_a_norm_of_unknown_rank_stays() -> None:
    model = graph(4, known=False)
    before = model.SerializeToString()
    assert rewrite(model) == 0
    assert model.SerializeToString() == before


@pytest.mark.parametrize("side", [192, "side"])
def test_large_groups_are_added_up_with_care(side: int | str) -> None:
    model = graph(4, known=True, side=side)
    scale, shift = (torch.from_numpy(numpy_helper.to_array(t)) for t in model.graph.initializer)
    x = 3 + 2 * torch.randn(1, 6, 192, 192, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.group_norm(
        x.relu().double(), 3, scale.double(), shift.double(), 1e-3
    )
    assert rewrite(model) == 1
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (got,) = session.run(None, {"x": x.numpy()})
    error = (torch.from_numpy(got).double() - expected).abs().max() / expected.abs().max()
    assert float(error) < 5e-7
