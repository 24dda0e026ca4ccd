"""Shape classes and settings that `python -m kernels.tune` tries."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.gated_cross_attention import absorbed_backward
from kernels.tune import Trial


def trials() -> Iterator[Trial]:
    """Yield forward and backward loops at the two large scales of the adapter."""
    from kernels.gated_cross_attention import triton

    tried = tuple(
        {"BM": rows, "BN": tokens, "num_warps": warps, "STAGES": stages}
        for rows, warps in ((64, 4), (64, 8), (128, 8))
        for tokens in (32, 64, 128)
        for stages in (1, 2, 3)
    )
    for channels, tokens in ((192, 36_864), (384, 9_216)):
        for dtype in (torch.float16, torch.bfloat16):
            rows = torch.randn(1, 1024, channels, device="cuda", dtype=dtype) / channels**0.5
            features = torch.randn(1, tokens, channels, device="cuda", dtype=dtype)
            _, lse = triton.attend(rows, features, None)
            mean = torch.zeros(1, 1024, 1, device="cuda")
            saved = absorbed_backward.Rows(rows, rows, lse[..., None], mean)
            kind = f"C{channels}/{str(dtype)[6:]}"
            yield Trial(
                key=f"forward/{kind}",
                settings=tried,
                call=lambda r=rows, f=features: triton.attend(r, f, None),  # type: ignore[misc]
            )
            for name, needs in (("backward_rows", False), ("backward_features", True)):
                yield Trial(
                    key=f"{name}/{kind}",
                    settings=tried,
                    call=lambda s=saved, f=features, n=needs: triton.attend_backward(  # type: ignore[misc]
                        s, f, None, n
                    ),
                )
