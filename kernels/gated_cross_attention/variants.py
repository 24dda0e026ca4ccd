"""Variants of the absorbed attention kernels that are compiled ahead of time."""

from __future__ import annotations

from typing import Any

from kernels.aot import Variant

MODULE = "kernels.gated_cross_attention.triton"
FORWARD = ("rows", "features", "bias", "partial", "partial_lse")
ROWS = ("rows", "features", "bias", "grad", "lse", "mean", "partial")
FEATURES = ("rows", "features", "bias", "grad", "lse", "mean", "out")
OPERANDS = ("rows", "features", "grad")
# (channels, first, second): BM, BN, warps, stages per kernel
SHAPES = {192: (128, 64), 384: (256, 128)}
SETTINGS = {
    ("split_forward", 192): (64, 64, 4, 2),
    ("split_forward", 384): (64, 64, 8, 2),
    ("split_backward_rows", 192): (64, 64, 4, 2),
    ("split_backward_rows", 384): (64, 32, 8, 1),
    ("backward_features", 192): (32, 64, 4, 1),
    ("backward_features", 384): (64, 32, 8, 1),
}


def variant(kernel: str, pointers: tuple[str, ...], channels: int, dtype: str) -> Variant:
    """Describe one kernel of one channel count and dtype."""
    rows, tokens, warps, stages = SETTINGS[kernel, channels]
    kinds = {name: f"*{dtype}" if name in OPERANDS else "*fp32" for name in pointers}
    if kernel == "backward_features":
        kinds["out"] = f"*{dtype}"
    sizes = {"R": "i32", "L": "i32"} | ({} if "out" in pointers else {"span": "i32"})
    constants: dict[str, Any] = {
        "C": channels,
        "C1": SHAPES[channels][0],
        "C2": SHAPES[channels][1],
        "BM": rows,
        "BN": tokens,
        "BIAS": False,
        "STAGES": stages,
        "PRECISION": "tf32",
    }
    return Variant(
        name=f"gated_cross_attention/{kernel}/C{channels}/{dtype}",
        kernel=f"{MODULE}:{kernel}",
        signature={**kinds, **sizes, "scale_log2e": "fp32"},
        constants=constants,
        num_warps=warps,
        num_stages=stages,
    )


VARIANTS = [
    variant(kernel, pointers, channels, dtype)
    for kernel, pointers in (
        ("split_forward", FORWARD),
        ("split_backward_rows", ROWS),
        ("backward_features", FEATURES),
    )
    for channels in SHAPES
    for dtype in ("fp16", "bf16")
]
