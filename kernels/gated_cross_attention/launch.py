"""Launch settings of the tensor-core kernels where no tuned table says better.

Chosen from the ahead-of-time report of sm_90: no spills, wgmma in every loop. Above 256 channels
the backward accumulators do not fit the registers, and the loop runs as plain matrix products.
"""

from __future__ import annotations

BACKWARD_CHANNELS = 256

# kernel -> (up to 256 channels, more): BM rows, BN tokens, warps, stages
SETTINGS: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "forward": (
        {"BM": 64, "BN": 64, "num_warps": 4, "STAGES": 2},
        {"BM": 64, "BN": 64, "num_warps": 8, "STAGES": 2},
    ),
    "backward_rows": ({"BM": 64, "BN": 64, "num_warps": 4, "STAGES": 2},) * 2,
    "backward_features": ({"BM": 32, "BN": 64, "num_warps": 4, "STAGES": 1},) * 2,
}
# Below sm_90 the operands of a product lie in registers too: more warps share them.
OLDER: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "forward": (
        {"BM": 64, "BN": 32, "num_warps": 8, "STAGES": 2},
        {"BM": 32, "BN": 32, "num_warps": 8, "STAGES": 2},
    ),
    "backward_rows": ({"BM": 64, "BN": 32, "num_warps": 8, "STAGES": 2},) * 2,
    "backward_features": ({"BM": 32, "BN": 32, "num_warps": 8, "STAGES": 1},) * 2,
}
WIDE = {"BM": 64, "BN": 32, "num_warps": 8, "STAGES": 1}  # fp32 operands


def settings(kernel: str, channels: int, wide: bool, older: bool = False) -> dict[str, int]:
    """Return the heuristic settings; `wide` for fp32 operands, `older` below sm_90."""
    narrow = (OLDER if older else SETTINGS)[kernel][channels > BACKWARD_CHANNELS]
    return dict(WIDE if wide else narrow)
