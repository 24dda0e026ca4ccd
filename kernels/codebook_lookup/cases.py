"""Problems on which the lookup is proven and timed."""

from __future__ import annotations

from typing import Any

import torch

from kernels.kernel import Case


def _case(tokens: int, codes: int, dim: int, kind: str = "gauss", bench: bool = False) -> Case:
    sizes = {"tokens": tokens, "codes": codes, "dim": dim, "kind": kind}
    return Case(name=f"N{tokens}-K{codes}-d{dim}-{kind}", sizes=sizes, bench=bench)


CASES = (
    _case(1, 1, 8),
    _case(63, 100, 8),
    _case(77, 1000, 32),
    _case(100, 300, 5),
    _case(40, 1000, 32, "near"),
    _case(40, 600, 32, "duplicated"),
    _case(7, 300, 8, "equal"),
    _case(33, 700, 32, "offset"),
    _case(33, 300, 16, "huge"),
    _case(33, 300, 16, "tiny"),
    _case(1024, 98_304, 32, bench=True),
    _case(4096, 98_304, 32, bench=True),
)


def least_flops(case: Case, direction: str) -> float:
    """Return the arithmetic of one product of every token with every code."""
    del direction
    size = case.sizes
    count: float = 2.0 * size["tokens"] * size["codes"] * size["dim"]
    return count


def make_inputs(case: Case, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Make tokens and codes of the wanted kind."""
    size = case.sizes
    kind = size.get("kind", "gauss")
    generator = torch.Generator().manual_seed(len(case.name))
    codes = torch.randn(size["codes"], size["dim"], generator=generator)
    x = torch.randn(size["tokens"], size["dim"], generator=generator)
    if kind == "near":
        x = codes[torch.randint(size["codes"], x.shape[:1], generator=generator)] + 0.05 * x
    elif kind == "duplicated":
        codes[1::2] = codes[0::2][: codes[1::2].shape[0]]
    elif kind == "equal":
        codes = codes[:1].expand_as(codes).clone()
    elif kind == "offset":  # far from the origin, close together
        codes, x = 0.5 * torch.tanh(codes) + 100.0, 0.5 * torch.tanh(x) + 100.0
    elif kind == "huge":
        codes, x = codes * 1e4, x * 1e4
    elif kind == "tiny":
        codes, x = codes * 1e-4, x * 1e-4
    return {"x": x.to(dtype).to(device), "codes": codes.to(dtype).to(device)}
