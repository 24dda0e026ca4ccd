"""Shape classes and settings that `python -m kernels.tune` tries."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels import dispatch
from kernels.codebook_lookup.api import codebook_lookup
from kernels.tune import Trial


def trials() -> Iterator[Trial]:
    """Yield the screen at the sizes of the two codebooks."""
    tried = tuple(
        {"BM": rows, "num_warps": warps, "STAGES": stages}
        for rows, warps in ((64, 4), (128, 4), (128, 8))
        for stages in (2, 3, 4)
    )
    codes = torch.randn(98_304, 32, device="cuda")
    x = torch.randn(65_536, 32, device="cuda")

    def call() -> object:
        with dispatch.force(codebook_lookup="triton"):
            return codebook_lookup(x, codes)

    yield Trial(key="screen/D32", settings=tried, call=call)
