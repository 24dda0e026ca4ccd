from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.export.errors import ExportError
from engine.export.part import Dim, Part, axis_size, numbers, split_axis, tensor


class Two(nn.Module):
    def forward(self, x: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 2, rest[0] + 1


def part() -> Part:
    return Part(
        name="two",
        module=Two(),
        inputs=(
            tensor("x", "batch", "2*rows"),
            numbers("n", "batch", low=3, high=lambda sizes: 4 + sizes["rows"]),
        ),
        outputs=(tensor("doubled", "batch", "2*rows"), numbers("more", "batch", high=9)),
        dims=(Dim(name="batch", min=1, opt=2, max=4), Dim(name="rows", min=3, opt=3, max=3)),
    )


def test_axes_are_expressions_in_one_dim() -> None:
    assert split_axis("2*rows") == (2, "rows", 0)
    assert axis_size("candidates+1", {"candidates": 4}) == 5
    assert axis_size(7, {}) == 7
    with pytest.raises(ExportError, match="an axis like"):
        split_axis("rows*rows")


def test_sizes_outside_the_profile_are_refused() -> None:
    assert part().sizes(batch=4) == {"batch": 4, "rows": 3}
    with pytest.raises(ExportError, match=r"two: batch of 1 to 4 expected, got 5; split"):
        part().sizes(batch=5)
    with pytest.raises(ExportError, match="a dim of"):
        part().sizes(colums=5)


def test_examples_are_a_function_of_sizes_and_seed() -> None:
    first, again, other = (part().example_inputs({"batch": 3}, seed=s) for s in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == (3, 6)
    assert first[1].min() >= 3
    assert first[1].max() < 7


def test_outputs_are_named_in_order() -> None:
    x, n = part().example_inputs()
    found = part().run({"n": n, "x": x})
    assert torch.equal(found["doubled"], x * 2)
    assert torch.equal(found["more"], n + 1)


def test_fixed_dims_are_static_and_varargs_nested() -> None:
    flat = part().dynamic_shapes()
    assert list(flat[0]) == [0, 1]
    assert flat[0][1] is None
    nested = part().nested_shapes()
    assert isinstance(nested[1], tuple)
    assert len(nested[1]) == 1
