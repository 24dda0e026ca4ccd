"""Problems on which gated cross-attention is proven and timed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.kernel import Case


def _case(
    queries: int,
    tokens: int,
    channels: int,
    dim: int,
    heads: int,
    batch: int = 1,
    padding: bool = False,
    bench: bool = False,
) -> Case:
    sizes = {
        "batch": batch,
        "queries": queries,
        "tokens": tokens,
        "channels": channels,
        "dim": dim,
        "heads": heads,
        "padding": padding,
    }
    name = f"B{batch}-Q{queries}-L{tokens}-C{channels}-D{dim}-H{heads}"
    return Case(name=name + ("-padded" if padding else ""), sizes=sizes, bench=bench)


CASES = (
    _case(1, 1, 12, 16, 2),
    _case(5, 63, 12, 16, 2, batch=2),
    _case(7, 77, 40, 24, 3, batch=2, padding=True),
    _case(3, 100, 96, 32, 2),
    _case(2, 1000, 16, 16, 1),
    _case(64, 192 * 192, 192, 2048, 16, bench=True),
    _case(64, 96 * 96, 384, 2048, 16, bench=True),
)


def least_flops(case: Case, direction: str) -> float:
    """Return the arithmetic of the loops over tokens with absorbed projections (README)."""
    size = case.sizes
    loop: float = 2.0 * size["queries"] * size["heads"] * size["tokens"] * size["channels"]
    return float(size["batch"] * loop * (5.0 if "backward" in direction else 2.0))


def make_inputs(case: Case, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Make features, queries, weights and a gate."""
    size = case.sizes
    generator = torch.Generator().manual_seed(len(case.name))
    batch, queries, tokens = size["batch"], size["queries"], size["tokens"]
    channels, dim = size["channels"], size["dim"]

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return values.to(dtype).to(device)

    square = {name: normal(dim, dim, scale=dim**-0.5) for name in ("w_q", "w_k", "w_v", "w_o")}
    padding = None
    if size.get("padding"):
        padding = (torch.rand(batch, tokens, generator=generator) < 0.4).to(device)
        padding[-1] = True
    return {
        "residual": normal(batch, queries, dim),
        "query": normal(batch, queries, dim),
        "features": normal(batch, tokens, channels),
        "w_feature": normal(dim, channels, scale=channels**-0.5),
        "b_feature": normal(dim, scale=0.1),
        **square,
        "gate": normal(scale=0.5),
        "num_heads": size["heads"],
        "padding_mask": padding,
    }
