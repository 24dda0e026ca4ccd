# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,misc"
"""Mask attention in one launch for one mask channel, for runtimes that give an operator one kernel.

With one channel the logit of cell (y, x) is mask(y, x) (F(x) + G(y)): F is a small product per
column, G a small sum per row, and a key costs a multiplication and an exponential whatever the head
width. Any mask, soft ones too; no classes, no scratch. `triton.py` needs an exponential per row and
column only, but several launches and a plan made from the mask's values.

Axes: B batch, H heads, N queries, D head width, T = D / 4 turns, X columns, Y rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.aot import Variant

ROWS, COLUMNS, WARPS = 32, 32, 4


@triton.jit
def attend(
    query, mask, key_vectors, value_vectors, query_grid, extent, H, N, Y, X, out,
    D: tl.constexpr, T: tl.constexpr, TP: tl.constexpr, BM: tl.constexpr, BX: tl.constexpr,
    ROPE: tl.constexpr, THETA: tl.constexpr,
):  # fmt: skip
    """query [B, H, N, D], mask [B, 1, Y, X], vectors [H, 1, D], grid and extent [2] int64 -> out.

    Softmax over cells of turned query . turned (mask x key) / sqrt(D), times mask x value.
    """
    tile, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    r = tile * BM + tl.arange(0, BM)
    ok = r < N
    t = tl.arange(0, TP)
    real = t < T
    height, width = tl.load(extent).to(tl.float32), tl.load(extent + 1).to(tl.float32)
    rows, columns = tl.load(query_grid).to(tl.int32), tl.load(query_grid + 1).to(tl.int32)
    turn = tl.exp2(-(t.to(tl.float32) / T) * tl.log2(tl.full((TP,), THETA, tl.float32))) * ROPE
    turn = tl.where(real, turn, 0.0)
    qx = ((r % columns).to(tl.float32) + 0.5) * (width / columns)
    qy = ((r // columns).to(tl.float32) + 0.5) * (height / rows)
    at = query + (bh * N + r)[:, None] * D + 2 * t[None, :]
    here = ok[:, None] & real[None, :]
    key = key_vectors + h * D + 2 * t
    # turned query times key, as weights of cos and sin of the key's own angle: x, then y
    cos, sin = tl.cos(qx[:, None] * turn[None, :]), tl.sin(qx[:, None] * turn[None, :])
    q0 = tl.load(at, mask=here, other=0.0).to(tl.float32)
    q1 = tl.load(at + 1, mask=here, other=0.0).to(tl.float32)
    k0 = tl.load(key, mask=real, other=0.0).to(tl.float32)[None, :]
    k1 = tl.load(key + 1, mask=real, other=0.0).to(tl.float32)[None, :]
    a, c = q0 * cos - q1 * sin, q0 * sin + q1 * cos
    even_x, odd_x = a * k0 + c * k1, c * k0 - a * k1
    cos, sin = tl.cos(qy[:, None] * turn[None, :]), tl.sin(qy[:, None] * turn[None, :])
    q0 = tl.load(at + 2 * T, mask=here, other=0.0).to(tl.float32)
    q1 = tl.load(at + 2 * T + 1, mask=here, other=0.0).to(tl.float32)
    k0 = tl.load(key + 2 * T, mask=real, other=0.0).to(tl.float32)[None, :]
    k1 = tl.load(key + 2 * T + 1, mask=real, other=0.0).to(tl.float32)[None, :]
    a, c = q0 * cos - q1 * sin, q0 * sin + q1 * cos
    even_y, odd_y = a * k0 + c * k1, c * k0 - a * k1
    top = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    seen = tl.zeros((BM,), tl.float32)
    scale = 1.0 / tl.sqrt(tl.full((BM,), D, tl.float32))
    for left in range(0, X, BX):
        x = left + tl.arange(0, BX)
        inside = x < X
        angle = turn[:, None] * ((x.to(tl.float32) + 0.5) * (width / X))[None, :]
        f = tl.dot(even_x, tl.cos(angle), input_precision="ieee")
        f = tl.dot(odd_x, tl.sin(angle), f, input_precision="ieee")
        for y in range(Y):
            turned = turn * ((y + 0.5) * (height / Y))
            g = tl.sum(even_y * tl.cos(turned)[None, :] + odd_y * tl.sin(turned)[None, :], 1)
            cells = tl.load(mask + (b * Y + y) * X + x, mask=inside, other=0.0).to(tl.float32)
            s = (f + g[:, None]) * scale[:, None] * cells[None, :]
            s = tl.where(inside[None, :], s, -float("inf"))
            higher = tl.maximum(top, tl.max(s, 1))
            p = tl.exp(s - higher[:, None])
            fade = tl.exp(top - higher)
            total = total * fade + tl.sum(p, 1)
            seen = seen * fade + tl.sum(p * cells[None, :], 1)
            top = higher
    share = seen / total
    for part in tl.static_range(2):
        e = part * 2 * T + tl.arange(0, 2 * TP)
        fits = tl.arange(0, 2 * TP) < 2 * T
        value = tl.load(value_vectors + h * D + e, mask=fits, other=0.0).to(tl.float32)
        to = out + (bh * N + r)[:, None] * D + e[None, :]
        mixed = share[:, None] * value[None, :]
        tl.store(to, mixed.to(out.dtype.element_ty), mask=ok[:, None] & fits[None, :])


def constants(dim: int, rope: bool, theta: float) -> dict[str, int | float]:
    """Return the compile-time arguments for a head width, a multiple of 4."""
    turns = dim // 4
    padded = max(16, 1 << (turns - 1).bit_length())  # of a product on tensor cores
    return {
        "D": dim, "T": turns, "TP": padded, "BM": ROWS, "BX": COLUMNS,
        "ROPE": int(rope), "THETA": float(theta),
    }  # fmt: skip


def variant(
    kinds: tuple[str, str, str, str], dim: int, rope: bool = True, theta: float = 1e4
) -> Variant:
    """Describe the kernel for Triton types ("fp16") of query, mask, key and value vectors."""
    names = ("query", "mask", "key_vectors", "value_vectors")
    return Variant(
        name=f"mask_attention/single/D{dim}/{'-'.join(kinds)}",
        kernel=f"{__name__}:attend",
        signature={
            **{name: f"*{kind}" for name, kind in zip(names, kinds, strict=True)},
            "query_grid": "*i64",
            "extent": "*i64",
            **dict.fromkeys(("H", "N", "Y", "X"), "i32"),
            "out": f"*{kinds[0]}",
        },
        constants=constants(dim, rope, theta),
        num_warps=WARPS,
        num_stages=1,
    )
