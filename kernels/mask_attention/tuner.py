"""Shape classes and settings that `python -m kernels.tune` tries."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels import dispatch
from kernels.kernel import Case
from kernels.mask_attention.api import mask_attention
from kernels.mask_attention.cases import make_inputs
from kernels.tune import Trial


def trials() -> Iterator[Trial]:
    """Yield forward and backward at the key grids of a 1024-pixel picture."""
    tried = tuple(
        {"BM": rows, "CHUNK": chunk, "num_warps": warps, "num_stages": 1}
        for rows in (64, 128)
        for chunk in (32, 64)
        for warps in (4, 8)
    )
    for side, heads, grid in ((32, 20, 32), (64, 10, 64), (128, 20, 32)):
        sizes = {
            "batch": 1, "heads": heads, "grid": (grid, grid), "dim": 64, "masks": 1,
            "rows": side, "columns": side, "kind": "hard", "position": "rope", "sharp": 1.0,
        }  # fmt: skip
        case = Case(name="tune", sizes=sizes)
        for dtype in (torch.float16, torch.bfloat16):
            inputs = make_inputs(case, dtype, "cuda")

            def forward(inputs: dict[str, object] = inputs) -> object:
                with dispatch.force(mask_attention="triton"), torch.no_grad():
                    return mask_attention(**inputs)  # type: ignore[arg-type]

            def both(inputs: dict[str, object] = inputs) -> object:
                query = inputs["query"].detach().requires_grad_()  # type: ignore[attr-defined]
                with dispatch.force(mask_attention="triton"):
                    out = mask_attention(**{**inputs, "query": query})
                    return torch.autograd.grad(out.sum(), query)

            kind = f"D64/A{side}/{str(dtype)[6:]}"
            yield Trial(key=f"forward/{kind}", settings=tried, call=forward)
            yield Trial(key=f"backward/{kind}", settings=tried, call=both)
