"""Variants of the lookup kernels that are compiled ahead of time."""

from __future__ import annotations

from kernels.aot import Variant

MODULE = "kernels.codebook_lookup.triton"

VARIANTS = [
    Variant(
        name=f"codebook_lookup/screen/D32/BM{rows}",
        kernel=f"{MODULE}:screen",
        signature={
            "tokens": "*fp16",
            "codes": "*fp16",
            "bias": "*fp32",
            "best": "*fp32",
            "third": "*fp32",
            "tile_of": "*i32",
            "N": "i32",
            "K": "i32",
            "span": "i32",
        },
        constants={"D": 32, "BM": rows, "BN": 256, "STAGES": 3},
        num_warps=warps,
        num_stages=3,
        aligned=("K", "span"),
        elements=rows * 256 // (32 * warps),
        most_per_element=1.3,
    )
    for rows, warps in ((128, 4),)
] + [
    Variant(
        name="codebook_lookup/rescore/D32",
        kernel=f"{MODULE}:rescore",
        signature={
            "tokens": "*fp32",
            "codes": "*fp32",
            "order": "*i32",
            "groups": "*i32",
            "index": "*i64",
            "distance": "*fp32",
            "d": "i32",
        },
        constants={"SLOTS": 8, "D": 32, "G": 64},
        num_warps=1,
    ),
    Variant(
        name="codebook_lookup/commit_backward/D32",
        kernel=f"{MODULE}:commit_backward",
        signature={
            "codebook": "*fp32",
            "index": "*i64",
            "x": "*fp32",
            "nearest": "*fp32",
            "grad": "*fp32",
            "scale": "*fp32",
            "grad_x": "*fp32",
            "partial": "*fp32",
            "N": "i32",
            "beta": "fp32",
            "blocks": "i32",
            "d": "i32",
        },
        constants={"D": 32, "BN": 64, "PRECISION": "ieee"},
    ),
]
