"""The ONNX bodies of our operators against the operators themselves, in ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from engine.export.operators import DOMAIN, OPERATORS, PLUGIN, Operator  # noqa: E402

KINDS = {torch.float32: 1, torch.float16: 10, torch.int64: 7}


def run(operator: Operator, inputs: list[Tensor], kinds: list[int], **attributes: Any) -> Any:
    """Run a graph of the one node with its function; checked by ONNX first."""
    helper = onnx.helper
    outputs = [name for name, _ in operator.outputs]
    node = helper.make_node(
        operator.name, list(operator.inputs), outputs, domain=DOMAIN, **attributes, **PLUGIN
    )
    ranks = [inputs[0].dim() if name == "out" else 1 for name in outputs]
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(name, KINDS[value.dtype], value.shape)
            for name, value in zip(operator.inputs, inputs, strict=True)
        ],
        [
            helper.make_tensor_value_info(name, kind, [None] * rank)
            for name, kind, rank in zip(outputs, kinds, ranks, strict=True)
        ],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    model.functions.append(operator.function(23))
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    given = {name: v.numpy() for name, v in zip(operator.inputs, inputs, strict=True)}
    return session.run(None, given)


def named(name: str) -> Operator:
    return next(operator for operator in OPERATORS if operator.name == name)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.float16, 4e-3)], ids=["fp32", "fp16"]
)
def test_gated_cross_attention(dtype: torch.dtype, limit: float) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = [(2, 5, 16), (2, 5, 16), (2, 7, 12), (16, 12), (16,), *[(16, 16)] * 4, ()]
    inputs = [(torch.randn(s, generator=g) * 0.4).to(dtype) for s in shapes]
    expected = torch.ops.focus.gated_cross_attention(*[i.float() for i in inputs], 4, None)
    kind = KINDS[dtype]
    (got,) = run(named("focus_gated_cross_attention"), inputs, [kind], num_heads=[4])
    assert got.dtype == inputs[0].numpy().dtype
    assert np.abs(got - expected.numpy()).max() <= limit * expected.abs().max()


@pytest.mark.parametrize(
    ("query_grid", "key_grid", "extent", "rope"),
    [
        ((4, 6), (4, 6), (8, 12), True),
        ((3, 5), (6, 10), (6, 10), True),
        ((3, 5), (6, 10), (6, 10), False),
    ],
)
def test_mask_attention(
    query_grid: tuple[int, int], key_grid: tuple[int, int], extent: tuple[int, int], rope: bool
) -> None:
    g = torch.Generator().manual_seed(1)
    query = torch.randn(2, 3, query_grid[0] * query_grid[1], 16, generator=g)
    mask = torch.rand(2, 2, *key_grid, generator=g)
    keys, values = torch.randn(2, 3, 2, 16, generator=g)
    expected = torch.ops.focus.mask_attention(
        query, mask, keys, values, list(query_grid), list(extent), rope, 1e4
    )
    inputs = [query, mask, keys, values, torch.tensor(query_grid), torch.tensor(extent)]
    (got,) = run(named("focus_mask_attention"), inputs, [1], rope=[int(rope)], theta=[1e4])
    assert np.abs(got - expected.numpy()).max() <= 1e-5 * expected.abs().max()


def test_codebook_lookup_is_exact_and_takes_the_lowest_of_equals() -> None:
    g = torch.Generator().manual_seed(2)
    x, codes = torch.randn(50, 8, generator=g), torch.randn(300, 8, generator=g)
    codes[7] = codes[5]
    x[0] = codes[5]
    x[3] = float("nan")
    distance, index = torch.ops.focus.codebook_lookup(x, codes)
    got_distance, got_index = run(named("focus_codebook_lookup"), [x, codes], [1, 7])
    assert got_index[0] == 5
    assert got_index[3] == -1
    assert np.array_equal(got_index, index.numpy())
    np.testing.assert_allclose(got_distance, distance.numpy(), rtol=1e-6, equal_nan=True)
