"""Parity of a part: smooth ones to the last digits, deciding ones as far as they decide alike."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnx")

from engine.export.part import Part, TensorSpec
from engine.export.verify import Check, compare


class Smooth(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


class Deciding(nn.Module):
    """A mean over what is positive; of a hundred values rounding decides whether they are."""

    def forward(self, x: Tensor) -> Tensor:
        edge = torch.cat([x, 1e-9 * (1e6 * x.sum() * torch.arange(1, 102)).sin()])
        chosen = edge > 0
        return torch.where(chosen, edge, 0.0).sum()[None] / chosen.sum()


def checks(module: nn.Module, off: float) -> list[Check]:
    part = Part(
        name="it",
        module=module,
        inputs=(TensorSpec(name="x", shape=(64,)),),
        outputs=(TensorSpec(name="y", shape=(64,)),),
    )

    def run(name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = part.run(inputs)["y"]
        return {"y": found + off * found.abs().max()}

    return list(compare(part, run, "here", "fp32"))


def test_a_smooth_part_is_held_to_the_limit() -> None:
    assert [(c.passed, c.limit, c.moved) for c in checks(Smooth(), 1e-6)] == [
        (True, 1e-5, None)
    ] * 3
    for check in checks(Smooth(), 3e-5):
        assert not check.passed and check.limit == 1e-5
        assert check.moved is not None and check.moved < 5e-5


def test_a_part_that_decides_is_held_to_what_rounding_makes_of_it() -> None:
    for check in checks(Deciding(), 1e-4):
        assert check.moved is not None and check.moved > 1e-3
        assert check.passed and check.limit == check.moved
    assert not any(check.passed for check in checks(Deciding(), 2.0))
    assert not any(check.passed for check in checks(Deciding(), float("nan")))
