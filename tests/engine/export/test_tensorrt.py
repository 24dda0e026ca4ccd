"""The thin TensorRT code: what can be proven without TensorRT's libraries."""

from __future__ import annotations

import importlib
from functools import reduce
from pathlib import Path

import pytest
import torch

onnx = pytest.importorskip("onnx")

from engine.export import tensorrt  # noqa: E402
from engine.export.errors import BackendUnavailable, ExportError  # noqa: E402
from engine.export.part import Dim, Part, numbers, tensor  # noqa: E402


def test_every_member_in_use_exists_in_the_bindings() -> None:
    try:
        bindings = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        pytest.skip(f"TensorRT's Python bindings cannot be imported here: {error}")
    missing = []
    for member in tensorrt.MEMBERS:
        try:
            reduce(getattr, member.split("."), bindings)
        except AttributeError:
            missing.append(member)
    assert not missing


def test_profiles_hold_every_input_at_three_sizes() -> None:
    part = Part(
        name="x",
        module=torch.nn.Identity(),
        inputs=(tensor("a", "batch", "2*rows", 3), numbers("n", "batch", high=2)),
        outputs=(tensor("b", "batch"),),
        dims=(Dim(name="batch", min=1, opt=2, max=8), Dim(name="rows", min=4, opt=5, max=6)),
    )
    assert tensorrt.profile_shapes(part) == {
        "a": ((1, 8, 3), (2, 10, 3), (8, 12, 3)),
        "n": ((1,), (2,), (8,)),
    }


def test_what_tensorrt_does_not_take_is_named(tmp_path: Path) -> None:
    helper = onnx.helper
    node = helper.make_node("Resize", ["x", "", "s"], ["y"], mode="cubic")
    values = [helper.make_tensor_value_info("x", 1, [1, 1, 4, 4])]
    out = [helper.make_tensor_value_info("y", 1, [1, 1, 8, 8])]
    scales = helper.make_tensor("s", 1, [4], [1.0, 1.0, 2.0, 2.0])
    graph = helper.make_graph([node], "g", values, out, [scales])
    onnx.save(helper.make_model(graph), tmp_path / "x.onnx")
    with pytest.raises(ExportError, match="Resize with mode cubic"):
        tensorrt.refuse_restrictions(tmp_path / "x.onnx")


def test_without_tensorrt_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(BackendUnavailable, match="pip install tensorrt"):
        tensorrt.require()
