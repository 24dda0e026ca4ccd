"""Problems on which mask attention is proven and timed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.kernel import Case


def _case(
    grid: tuple[int, int],
    rows: int,
    columns: int,
    heads: int = 2,
    dim: int = 8,
    masks: int = 1,
    batch: int = 1,
    kind: str = "hard",
    position: str = "rope",
    sharp: float = 1.0,
    bench: bool = False,
) -> Case:
    sizes = {
        "batch": batch,
        "heads": heads,
        "grid": grid,
        "dim": dim,
        "masks": masks,
        "rows": rows,
        "columns": columns,
        "kind": kind,
        "position": position,
        "sharp": sharp,
    }
    name = f"B{batch}-H{heads}-N{grid[0] * grid[1]}-L{rows}x{columns}-D{dim}-M{masks}-{kind}"
    name += f"-{position}" + (f"-sharp{sharp:g}" if sharp != 1.0 else "")
    return Case(name=name, sizes=sizes, bench=bench)


CASES = (
    _case((1, 1), 1, 1),
    _case((7, 9), 7, 11, batch=2),
    _case((7, 11), 25, 40, masks=2, batch=2, kind="soft"),
    _case((10, 10), 32, 24, masks=3, dim=16),
    _case((5, 5), 32, 32, kind="grey"),
    _case((5, 5), 20, 20, kind="empty"),
    _case((5, 5), 20, 20, kind="full"),
    _case((6, 6), 32, 32, dim=16, sharp=6.0),
    _case((7, 9), 7, 11, batch=2, position="none"),
    _case((5, 5), 12, 12, masks=2, kind="soft", position="none"),
    _case((64, 64), 64, 64, heads=10, dim=64, bench=True),
    _case((32, 32), 128, 128, heads=20, dim=64, bench=True),
    _case((32, 32), 64, 64, heads=20, dim=64, bench=True),
)


def least_flops(case: Case, direction: str) -> float:
    """Return the arithmetic of the separable evaluation for two classes (README)."""
    size = case.sizes
    rows, columns = size["rows"], size["columns"]
    lines = size["batch"] * size["heads"] * size["grid"][0] * size["grid"][1]
    per_line: float = size["dim"] * (rows + columns) + 2.0 * rows * columns
    return float(2.0 * lines * per_line * (3.0 if "backward" in direction else 1.0))


def make_inputs(case: Case, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Make discs as masks, some cells soft if wanted, and random vectors."""
    size = case.sizes
    kind = size["kind"]
    generator = torch.Generator().manual_seed(len(case.name))
    grid, rows, columns = size["grid"], size["rows"], size["columns"]
    heads, dim, masks = size["heads"], size["dim"], size["masks"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    discs = [
        ((y - 0.5 * rows) / rows) ** 2 + ((x - (0.3 + 0.2 * m) * columns) / columns) ** 2
        < (0.15 + 0.1 * m) ** 2
        for m in range(masks)
    ]
    mask = torch.stack(discs).double().expand(size["batch"], -1, -1, -1).clone()
    some = torch.rand(mask.shape, generator=generator, dtype=torch.float64)
    if kind == "soft":
        mask = torch.where(some < 0.03, some * 30.0, mask)
    elif kind == "grey":
        mask = some
    elif kind in ("empty", "full"):
        mask = torch.full_like(mask, float(kind == "full"))
    values = {
        "query": normal(size["batch"], heads, grid[0] * grid[1], dim),
        "mask": mask,
        "key_vectors": normal(heads, masks, dim) * size["sharp"],
        "value_vectors": normal(heads, masks, dim),
    }
    return {
        **{name: value.to(dtype).to(device) for name, value in values.items()},
        "query_grid": grid,
        "extent": (2 * rows, 2 * columns),
        "position": size["position"],
    }
