"""Mask attention: meaning of positions, numeric guard, plans."""

from __future__ import annotations

import math

import torch

from kernels import dispatch
from kernels.mask_attention.api import mask_attention
from kernels.mask_attention.plan import make_plan
from tests.kernels.budget import error


def written_out(query, mask, keys, values, grid, extent, theta=1e4):  # type: ignore[no-untyped-def]
    """Dense attention by loops over heads and complex rotations, fp64."""
    batch, heads, _, dim = query.shape
    rows, columns = mask.shape[2:]
    half = dim // 2
    turn = torch.tensor([theta ** (-2 * i / half) for i in range(half // 2)]).double()

    def place(count: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        y = (torch.arange(count[0]) + 0.5) * extent[0] / count[0]
        x = (torch.arange(count[1]) + 0.5) * extent[1] / count[1]
        grid_y, grid_x = torch.meshgrid(y.double(), x.double(), indexing="ij")
        return grid_y.flatten(), grid_x.flatten()

    def spin(vectors: torch.Tensor, at: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        parts = []
        for part, position in ((vectors[:, :half], at[1]), (vectors[:, half:], at[0])):
            pairs = torch.complex(part[:, 0::2].contiguous(), part[:, 1::2].contiguous())
            pairs = pairs * torch.exp(1j * position[:, None] * turn)
            parts.append(torch.view_as_real(pairs).flatten(1))
        return torch.cat(parts, 1)

    out = torch.empty_like(query, dtype=torch.float64)
    for b in range(batch):
        tokens = mask[b].flatten(1).T.double()
        for h in range(heads):
            q = spin(query[b, h].double(), place(grid))
            k = spin(tokens @ keys[h].double(), place((rows, columns)))
            p = torch.softmax(q @ k.T / math.sqrt(dim), -1)
            out[b, h] = p @ (tokens @ values[h].double())
    return out


def problem(sharp: float = 1.0) -> dict[str, object]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(2, 2, 24, 32)
    mask[0, 0, 3:9, 4:20], mask[1, 0, 10:20, 1:9] = 1.0, 1.0
    mask[0, 1, 15:22, 8:28], mask[1, 1, 2:4, 20:30] = 1.0, 1.0
    return {
        "query": torch.randn(2, 3, 48, 16, generator=generator),
        "mask": mask,
        "key_vectors": sharp * torch.randn(3, 2, 16, generator=generator),
        "value_vectors": torch.randn(3, 2, 16, generator=generator),
        "query_grid": (6, 8),
        "extent": (48, 64),
    }


def test_both_paths_equal_attention_written_out() -> None:
    inputs = problem()
    truth = written_out(*inputs.values())
    for name in ("reference", "structured"):
        with dispatch.force(mask_attention=name):
            assert error(mask_attention(**inputs), truth) < 5e-7, name


def test_position_makes_the_output_follow_the_mask_and_its_absence_does_not() -> None:
    inputs = problem()
    moved = {**inputs, "mask": inputs["mask"].roll((5, 3), (2, 3))}  # type: ignore[attr-defined]
    for position, same in (("rope", False), ("none", True)):
        a = mask_attention(**inputs, position=position)
        b = mask_attention(**moved, position=position)
        assert torch.allclose(a, b, atol=1e-5) is same, position


def test_sharp_logits_whose_sums_underflow_are_redone_densely() -> None:
    # a diagonal mask: its best column and best row meet nowhere in the class
    side = 48
    inputs = {
        "query": 6.0 * torch.randn(1, 1, 36, 32, generator=torch.Generator().manual_seed(2)),
        "mask": torch.eye(side)[None, None],
        "key_vectors": 40.0 * torch.ones(1, 1, 32),
        "value_vectors": torch.ones(1, 1, 32),
        "query_grid": (6, 6),
        "extent": (side, side),
        "theta": 100.0,
    }
    from kernels.mask_attention import plan, structured

    plan_members, redone = plan.least_members, []
    dense = structured.dense_rows

    def spy(arguments, q, doubt, result):  # type: ignore[no-untyped-def]
        redone.append(int(doubt.sum()))
        dense(arguments, q, doubt, result)

    plan.least_members = lambda rows, columns, dim: 1.0
    structured.dense_rows = spy
    try:
        with dispatch.force(mask_attention="structured"):
            out = mask_attention(**inputs)
    finally:
        plan.least_members, structured.dense_rows = plan_members, dense
    truth = written_out(*list(inputs.values())[:6], theta=100.0)
    assert sum(redone) > 0
    assert error(out, truth) < 1e-4


def test_plan_finds_classes_and_soft_cells() -> None:
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 10:40, 20:50] = 1.0
    mask[..., 10, 20:30] = torch.linspace(0.1, 0.9, 10)
    plan = make_plan(mask, dim=64, rope=True)
    assert plan.values.flatten().tolist() == [0.0, 1.0]
    assert int(plan.soft_valid.sum()) == 10
    assert plan.classes[1].rows == slice(10, 40) and plan.classes[1].columns == slice(20, 50)
    assert int(plan.classes[1].indicator.sum()) == 30 * 30 - 10


def test_nan_in_a_query_stays_in_its_row() -> None:
    inputs = problem()
    inputs["query"][0, 0, 5, 0] = float("nan")  # type: ignore[index]
    for name in ("reference", "structured"):
        with dispatch.force(mask_attention=name):
            out = mask_attention(**inputs)
        assert out[0, 0, 5].isnan().all()
        assert out[0, 0, [4, 6]].isfinite().all() and out[1].isfinite().all()
