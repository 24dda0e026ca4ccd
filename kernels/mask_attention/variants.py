"""Variants of the mask attention kernels that are compiled ahead of time."""

from __future__ import annotations

from kernels.aot import Variant

MODULE = "kernels.mask_attention.triton"
# grid side: (BM, chunk, warps) forward, (BM, chunk, warps) backward; a chunk of the backward has
# the 64 rows of wgmma even where the grid is narrower
SETTINGS = {
    32: ((64, 32, 4), (64, 64, 4)),
    64: ((64, 64, 4), (64, 64, 4)),
    128: ((64, 64, 4), (64, 64, 8)),
}


def forward(side: int, dtype: str) -> Variant:
    """Describe the forward of a square key grid, head width 64."""
    rows, chunk, warps = SETTINGS[side][0]
    return Variant(
        name=f"mask_attention/class_forward/{side}x{side}/{dtype}",
        kernel=f"{MODULE}:class_forward",
        signature={
            **dict.fromkeys(("query", "table_x", "table_y", "indicator"), f"*{dtype}"),
            **dict.fromkeys(("bias_x", "bias_y", "log_sum", "faint"), "*fp32"),
            **dict.fromkeys(("N", "H", "C", "X", "Y"), "i32"),
        },
        constants={
            "D2": 32,
            "DP": 32,
            "BX": chunk,
            "YP": side,
            "CHUNKS": side // chunk,
            "BM": rows,
            "PRECISION": "tf32",
        },
        num_warps=warps,
        num_stages=1,
        aligned=("X", "Y"),
    )


def backward(side: int, dtype: str, first: bool) -> Variant:
    """Describe the backward of one axis of a square key grid, head width 64."""
    rows, chunk, warps = SETTINGS[side][1]
    operands = ("query", "table_a", "table_b", "indicator")
    pointers = (
        "query", "excess", "lse", "table_a", "table_b", "indicator", "bias_a", "bias_b",
        "grad_query", "grad_table",
    )  # fmt: skip
    sizes = ("N", "H", "C", "A", "B_", "stride_a", "stride_b", "blocks")
    return Variant(
        name=f"mask_attention/class_backward_{'x' if first else 'y'}/{side}x{side}/{dtype}",
        kernel=f"{MODULE}:class_backward",
        signature={
            **{n: f"*{dtype}" if n in operands else "*fp32" for n in pointers},
            **dict.fromkeys(sizes, "i32"),
        },
        constants={
            "D2": 32,
            "DP": 32,
            "BA": chunk,
            "BP": side,
            "CHUNKS": -(-side // chunk),
            "BM": rows,
            "FIRST": first,
            "PRECISION": "tf32",
        },
        num_warps=warps,
        num_stages=1,
        aligned=("A", "B_"),
        # Their products keep operands in registers: smaller tiles, or it spills.
        older={"BM": 32, "BA": 16, "CHUNKS": -(-side // 16)} if side > 64 else {},
    )


VARIANTS = [
    made
    for side in SETTINGS
    for dtype in ("fp16", "bf16")
    for made in (forward(side, dtype), backward(side, dtype, True), backward(side, dtype, False))
]
