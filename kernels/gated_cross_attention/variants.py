"""Variants of the absorbed attention kernels that are compiled ahead of time."""

from __future__ import annotations

from typing import Any

from kernels.aot import Variant
from kernels.gated_cross_attention import launch

MODULE = "kernels.gated_cross_attention.triton"
FORWARD = ("rows", "features", "bias", "partial", "partial_lse")
ROWS = ("rows", "features", "bias", "grad", "lse", "mean", "partial")
FEATURES = ("rows", "features", "bias", "grad", "lse", "mean", "out")
OPERANDS = ("rows", "features", "grad")
SHAPES = {192: (128, 64), 384: (256, 128)}  # channels: the two powers of two that cover them
KERNELS = {
    "forward": ("split_forward", FORWARD),
    "backward_rows": ("split_backward_rows", ROWS),
    "backward_features": ("backward_features", FEATURES),
}


def variant(stage: str, channels: int, dtype: str) -> Variant:
    """Describe one kernel of one channel count and dtype."""
    kernel, pointers = KERNELS[stage]
    setting, older = (launch.settings(stage, channels, False, older) for older in (False, True))
    warps, stages = setting["num_warps"], setting["STAGES"]
    kinds = {name: f"*{dtype}" if name in OPERANDS else "*fp32" for name in pointers}
    if kernel == "backward_features":
        kinds["out"] = f"*{dtype}"
    sizes = {"R": "i32", "L": "i32"} | ({} if "out" in pointers else {"span": "i32"})
    constants: dict[str, Any] = {
        "C": channels,
        "C1": SHAPES[channels][0],
        "C2": SHAPES[channels][1],
        "BM": setting["BM"],
        "BN": setting["BN"],
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
        older=older,
    )


VARIANTS = [
    variant(stage, channels, dtype)
    for stage in KERNELS
    for channels in SHAPES
    for dtype in ("fp16", "bf16")
    if stage == "forward" or channels <= launch.BACKWARD_CHANNELS
]
