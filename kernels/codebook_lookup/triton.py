# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,misc"
"""Codebook lookup on tensor cores: fp16 screen with a certificate, fp64 decision (README).

Codes are centred, sorted by norm and cut into tiles; a group is the quarter of a tile that one
lane of a tensor-core fragment holds. The screen keeps the two best groups per token and lane and
the third value. Groups whose value may win are rescored in fp64; a token whose third value may win
as well is flagged and scanned in full.

Axes: N tokens, K codes, d code width, T tiles, S splits of the codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import tuning
from kernels.codebook_lookup import exact
from kernels.device import power_of_two
from kernels.remember import Remembered

TILE = 256
LANES = 4
RESCORED = 8  # groups that one pass of the decision visits


@triton.jit
def _push(m, t, b1, i1, b2, i2, b3):
    """Keep the two best (value, tile) and the third value."""
    b3 = tl.maximum(b3, tl.minimum(b2, m))
    i2 = tl.where(m > b1, i1, tl.where(m > b2, t, i2))
    b2 = tl.maximum(b2, tl.minimum(b1, m))
    i1 = tl.where(m > b1, t, i1)
    b1 = tl.maximum(b1, m)
    return b1, i1, b2, i2, b3


@triton.jit
def screen(
    tokens, codes, bias, best, third, tile_of, N, K, span,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write the two best group scores per token and lane over one span of sorted codes.

    Scores are compared as the integers of their bits, which orders positive floats and lets the
    compiler use a three-input maximum; a group of negative scores counts as zero, an upper bound.
    best [2, S, N, 4], third [S, N, 4], tile_of [2, S, N, 4].
    """
    row, part = tl.program_id(0), tl.program_id(1)
    r = row * BM + tl.arange(0, BM)
    d = tl.arange(0, D)
    x = tl.load(tokens + r[:, None] * D + d[None, :], mask=(r < N)[:, None], other=0.0)
    b1 = tl.full((BM, 4), -1e30, tl.float32)
    b2, b3 = b1, b1
    i1 = tl.zeros((BM, 4), tl.int32)
    i2 = i1
    first = part * span
    last = tl.minimum(first + span, K)
    columns = tl.arange(0, BN)
    for start in tl.range(first, last, BN, num_stages=STAGES):
        c = tl.load(codes + (start + columns)[None, :] * D + d[:, None])
        level = tl.load(bias + start // BN)
        bits = tl.dot(x, c).to(tl.int32, bitcast=True)
        fragment = tl.permute(tl.reshape(bits, (BM, BN // 8, 4, 2)), (0, 2, 1, 3))
        m = tl.max(tl.reshape(fragment, (BM, 4, BN // 4)), 2)
        m = tl.maximum(m, 0).to(tl.float32, bitcast=True) + level
        b1, i1, b2, i2, b3 = _push(m, start // BN, b1, i1, b2, i2, b3)
    lane = tl.arange(0, 4)
    at = (part * N + r)[:, None] * 4 + lane[None, :]
    ok = (r < N)[:, None] & (lane >= 0)[None, :]
    both = tl.num_programs(1) * N * 4
    tl.store(best + at, b1, mask=ok)
    tl.store(best + both + at, b2, mask=ok)
    tl.store(third + at, b3, mask=ok)
    tl.store(tile_of + at, i1, mask=ok)
    tl.store(tile_of + both + at, i2, mask=ok)


@triton.jit
def rescore(
    tokens, codes, order, groups, index, distance, d,
    SLOTS: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Write the nearest code among a token's groups by fp64 distance, lowest index on ties.

    codes fp32 [T * 4, G, d] in group order, order [T * 4, G] their indices, groups [N, SLOTS].
    """
    n = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, D)
    g = tl.arange(0, G)
    x = tl.load(tokens + n * d + k, mask=k < d, other=0.0).to(tl.float64)
    least = tl.full((), float("inf"), tl.float64)
    winner = tl.full((), 2147483647, tl.int32)
    for slot in range(SLOTS):
        group = tl.load(groups + n * SLOTS + slot)
        if group >= 0:
            at = (group * G + g)[:, None] * d + k[None, :]
            c = tl.load(codes + at, mask=(k < d)[None, :], other=0.0).to(tl.float64)
            gap = x[None, :] - c
            square = tl.sum(gap * gap, 1)
            m = tl.min(square, 0)
            i = tl.min(tl.where(square == m, tl.load(order + group * G + g), 2147483647), 0)
            better = (m < least) | ((m == least) & (i < winner))
            winner = tl.where(better, i, winner)
            least = tl.where(better, m, least)
    tl.store(index + n, winner.to(tl.int64))
    tl.store(distance + n, least.to(tl.float32))


@triton.jit
def commit_backward(
    codebook, index, x, nearest, grad, scale, grad_x, partial, N, beta, blocks, d,
    D: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write gx = g + beta s (x - q) and this program's share of gW = s (q - x)^T rows."""
    p = tl.program_id(0)
    to_weight = tl.load(scale)
    to_x = beta * to_weight
    k = tl.arange(0, D)
    acc = tl.zeros((D, D), tl.float32)
    for i in range(blocks):
        n = (p * blocks + i) * BN + tl.arange(0, BN)
        ok = (n < N)[:, None] & (k < d)[None, :]
        at = n[:, None] * d + k[None, :]
        value = tl.load(x + at, mask=ok, other=0.0)
        code = tl.load(nearest + at, mask=ok, other=0.0)
        outer = tl.load(grad + at, mask=ok, other=0.0)
        tl.store(grad_x + at, outer + to_x * (value - code), mask=ok)
        row = tl.load(index + n, mask=n < N, other=0)
        frozen = tl.load(codebook + row[:, None] * d + k[None, :], mask=ok, other=0.0)
        residual = to_weight * (code - value)
        acc += tl.dot(tl.trans(residual), frozen, input_precision=PRECISION)
    tl.store(partial + p * D * D + k[:, None] * D + k[None, :], acc)


@dataclass(frozen=True)
class Prepared:
    """A codebook laid out for the screen."""

    mean: Tensor  # [d]
    half: Tensor  # [T * TILE, D] fp16, centred, scaled, sorted by norm
    scale: Tensor  # power of two that brings codes near one
    bias_high: Tensor  # [T] greatest -|c|^2 / 2 of a tile
    bias_low: Tensor  # [T]
    reach: Tensor  # max |c'|
    lost: Tensor  # max |c' - fp16(c')|
    grouped: Tensor  # [T * 4, TILE / 4, d] fp32 codes as given, by group
    order: Tensor  # [T * 4, TILE / 4] int32
    finite: Tensor


def prepare(codes: Tensor) -> Prepared:
    """Centre, scale, sort by norm, cut into tiles and lane groups. No synchronisation."""
    num_codes, dim = codes.shape
    wide = power_of_two(dim)
    exact = codes.detach().float()
    mean = exact.mean(0)
    centred = exact.double() - mean
    largest = centred.abs().amax().clamp(min=1e-30)
    scale = torch.exp2(-torch.floor(torch.log2(largest)))
    centred = centred * scale
    norm = centred.square().sum(1)
    order = torch.argsort(norm, stable=True)
    tiles = triton.cdiv(num_codes, TILE)
    # padding repeats the last code, which cannot beat itself
    slot = torch.arange(tiles * TILE, device=codes.device).clamp(max=num_codes - 1)
    order = order[slot]
    sorted_codes = centred[order]
    half = torch.zeros(tiles * TILE, wide, dtype=torch.float16, device=codes.device)
    half[:, :dim] = sorted_codes.to(torch.float16)
    bias = (-0.5 * norm[order]).reshape(tiles, TILE)
    fragment = torch.arange(tiles * TILE, device=codes.device)
    fragment = fragment.reshape(tiles, TILE // 8, LANES, 2).transpose(1, 2).reshape(-1)
    by_group = order[fragment]
    return Prepared(
        mean=mean,
        half=half,
        scale=scale,
        bias_high=bias.amax(1).float(),
        bias_low=bias.amin(1).float(),
        reach=norm.amax().sqrt(),
        lost=(sorted_codes - half[:, :dim].double()).norm(dim=1).amax(),
        grouped=exact[by_group].contiguous(),
        order=by_group.to(torch.int32).contiguous(),
        finite=torch.isfinite(exact).all(),
    )


_prepared: Remembered[Prepared] = Remembered()


def survivors(
    book: Prepared, x: Tensor, best: Tensor, third: Tensor, tile_of: Tensor, margin: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the groups that may win [N, 16 S] (-1: none) and the tokens that need a full scan.

    `margin` [N] bounds |screen - exact score|; a tile's bias spread is its own uncertainty.
    """
    spread = (book.bias_high - book.bias_low)[tile_of[0].long()]
    # a best value that was clamped to zero is no lower bound: its token is scanned
    floor = book.bias_high[tile_of[0].long()]
    clamped = best[0] <= floor
    lower = (best[0] - spread).masked_fill(clamped, -float("inf")).amax((0, 2)) - margin
    bound = (lower - margin)[None, :, None]
    group = torch.where(best >= bound, tile_of * LANES + torch.arange(LANES, device=x.device), -1)
    flagged = (third >= bound).any(2).any(0) | torch.isinf(lower)
    return group.permute(2, 0, 1, 3).reshape(x.shape[0], -1).to(torch.int32), flagged


def codebook_lookup(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return (index, distance) of the nearest codes."""
    num_tokens, dim = x.shape
    index = torch.empty(num_tokens, dtype=torch.int64, device=x.device)
    distance = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    if num_tokens == 0:
        return index, distance
    book = _prepared.get((codes,), lambda: prepare(codes))
    values = x.detach().float().contiguous()
    groups, flagged = _screen(book, values)
    slots = min(RESCORED, groups.shape[1])
    groups = groups.sort(1, descending=True)[0]
    flagged |= groups[:, slots:].ge(0).any(1) if groups.shape[1] > slots else False
    groups = groups[:, :slots].contiguous()
    rescore[(num_tokens,)](
        values, book.grouped, book.order, groups, index, distance, dim,
        SLOTS=slots, D=power_of_two(dim), G=TILE // LANES, num_warps=1,
    )  # fmt: skip
    todo = flagged.nonzero()[:, 0]
    if todo.numel():
        index[todo], distance[todo] = exact.nearest(values[todo], codes.float())
    bad = ~torch.isfinite(values).all(1) | ~book.finite
    return index.masked_fill_(bad, -1), distance.masked_fill_(bad, float("nan"))


def _screen(book: Prepared, x: Tensor) -> tuple[Tensor, Tensor]:
    """Screen every token; return surviving groups and flagged tokens."""
    num_tokens, dim = x.shape
    centred = (x.double() - book.mean) * book.scale
    largest = centred.abs().amax(1, keepdim=True).clamp(min=1e-30)
    unit = torch.exp2(torch.floor(torch.log2(largest)))  # per token, so that fp16 never overflows
    half = torch.zeros(num_tokens, book.half.shape[1], dtype=torch.float16, device=x.device)
    half[:, :dim] = (centred / unit).to(torch.float16)
    seen = half[:, :dim].double() * unit
    lost = (centred - seen).norm(dim=1)
    kept = seen.norm(dim=1)
    rounding = (dim + 8) * 2.0**-22
    margin = lost * book.reach + kept * book.lost + rounding * kept * book.reach
    margin = ((margin + rounding * book.reach.square()) * 1.001).float()
    scaled, level = _common_unit(half, unit, book)
    parts, span = _spans(num_tokens, book.half.shape[0], x.device)
    shape = (parts, num_tokens, LANES)
    best = torch.full((2, *shape), -float("inf"), device=x.device)
    third = torch.full(shape, -float("inf"), device=x.device)
    tile_of = torch.zeros((2, *shape), dtype=torch.int32, device=x.device)
    default = {"BM": 128, "num_warps": 4, "STAGES": 3}
    setting = tuning.lookup("codebook_lookup", f"screen/D{half.shape[1]}", x.device, default)
    screen[(triton.cdiv(num_tokens, setting["BM"]), parts)](
        scaled, book.half, level, best, third, tile_of, num_tokens, book.half.shape[0], span,
        D=half.shape[1], BN=TILE, **setting,
    )  # fmt: skip
    groups, flagged = survivors(book, x, best, third, tile_of, margin)
    return groups, flagged | ~(largest[:, 0] < 2.0**14)


def _common_unit(half: Tensor, unit: Tensor, book: Prepared) -> tuple[Tensor, Tensor]:
    """Return fp16 tokens in the unit of the codes, where they fit, and the tile biases."""
    fits = unit <= 2.0**13
    return (half * unit.to(half.dtype)).masked_fill(~fits, 0.0), book.bias_high


def _spans(num_tokens: int, num_codes: int, device: torch.device) -> tuple[int, int]:
    """Return (parts, codes per part): enough programs for every multiprocessor twice."""
    tiles = num_codes // TILE
    wanted = 2
    if device.type == "cuda":
        slots = 3 * torch.cuda.get_device_properties(device).multi_processor_count
        wanted = max(1, -(-slots // triton.cdiv(num_tokens, 128)))
    per_part = -(-tiles // min(wanted, tiles, 8))
    return -(-tiles // per_part), per_part * TILE


def commit_gradients(
    x: Tensor,
    nearest: Tensor,
    codebook: Tensor,
    index: Tensor,
    grad: Tensor,
    scale: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight of SimVQ in one pass; `scale` = 2 l / (N d)."""
    num_tokens, dim = x.shape
    wide, block = power_of_two(dim), 64
    tiles = triton.cdiv(num_tokens, block)
    parts = min(tiles, 512)
    partial = torch.empty(parts, wide, wide, device=x.device)
    grad_x = torch.empty_like(x)
    commit_backward[(parts,)](
        codebook, index, x, nearest, grad.contiguous(), scale, grad_x, partial, num_tokens,
        beta, triton.cdiv(tiles, parts), dim,
        D=wide, BN=block, PRECISION="ieee",
    )  # fmt: skip
    return grad_x, partial.sum(0)[:dim, :dim].contiguous()
