# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,misc"
"""Codebook lookup in one launch, for runtimes that give an operator one kernel and no scratch.

Every distance is summed in fp64 as the codes stream by: as exact as `exact.py`, and slower than
`triton.py`, which screens on tensor cores first (three launches). GPUs of data centres have fp64.

Axes: N tokens, K codes, D width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.aot import Variant

ROWS, COLUMNS, WARPS = 16, 64, 4


@triton.jit
def lookup(
    x, codes, N, K, distance, index,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """x [N, D], codes [K, D] -> least squared distance [N] fp32, lowest such index [N] int64.

    A token that is not finite, and every token if a code is not, gets NaN and -1.
    """
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    ok = r < N
    best = tl.full((BM,), float("inf"), tl.float64)
    at = tl.zeros((BM,), tl.int32)
    doubt = tl.zeros((BM,), tl.float64)
    for d in range(D):
        own = tl.load(x + r * D + d, mask=ok, other=0.0).to(tl.float64)
        doubt += own - own
    spoilt = tl.zeros((BN,), tl.float64)
    for start in range(0, K, BN):
        c = start + tl.arange(0, BN)
        here = c < K
        total = tl.zeros((BM, BN), tl.float64)
        for d in range(D):
            token = tl.load(x + r * D + d, mask=ok, other=0.0).to(tl.float64)
            code = tl.load(codes + c * D + d, mask=here, other=0.0).to(tl.float64)
            spoilt += code - code
            apart = token[:, None] - code[None, :]
            total += apart * apart
        total = tl.where(here[None, :], total, float("inf"))
        near = tl.min(total, 1)
        first = tl.min(tl.where(total == near[:, None], c[None, :], K), 1)
        better = near < best
        at = tl.where(better, first, at)
        best = tl.where(better, near, best)
    doubt += tl.sum(spoilt, 0)
    sound = doubt == 0.0
    tl.store(distance + r, (best + doubt).to(tl.float32), mask=ok)
    tl.store(index + r, tl.where(sound, at, -1).to(tl.int64), mask=ok)


def variant(kinds: tuple[str, str], dim: int) -> Variant:
    """Describe the kernel for tokens and codes of two Triton types ("fp32") of width `dim`."""
    return Variant(
        name=f"codebook_lookup/single/D{dim}/{'-'.join(kinds)}",
        kernel=f"{__name__}:lookup",
        signature={
            "x": f"*{kinds[0]}",
            "codes": f"*{kinds[1]}",
            "N": "i32",
            "K": "i32",
            "distance": "*fp32",
            "index": "*i64",
        },
        constants={"D": dim, "BM": ROWS, "BN": COLUMNS},
        num_warps=WARPS,
        num_stages=1,
    )
