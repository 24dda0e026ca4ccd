# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,misc"
"""Mask attention by separable tables on tensor cores (README: derivation).

The forward visits classes in order, each axis x in chunks, and keeps a running maximum; it returns
per class the log-sum of its cells, from which shares, output and backward follow. The backward has
one kernel per axis, so that accumulators stay in registers. Soft cells are few and go through
plain products; rows whose sums underflow are redone densely (`structured`).

Axes: B batch, H heads, N queries, C classes, D head width, X columns, Y rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import tuning
from kernels.device import power_of_two
from kernels.mask_attention import structured, structured_backward
from kernels.mask_attention.rotary import Size
from kernels.mask_attention.structured import Problem

LOG2E = 1.0 / math.log(2.0)


@triton.jit
def class_forward(
    query, table_x, table_y, indicator, bias_x, bias_y, log_sum, faint, N, H, C, X, Y,
    D2: tl.constexpr, DP: tl.constexpr, BX: tl.constexpr, YP: tl.constexpr, CHUNKS: tl.constexpr,
    BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write log2 sum_j exp2(S_ij) per class [B, H, N, C], and where that sum is too faint.

    query [B, H, N, 2 D2] turned; tables [H, C, X | Y, D2] scaled by log2(e) / sqrt(D);
    indicator [B, C, X, Y]; biases [B, C, X | Y], 0 or -inf.
    """
    tile, bh, c = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = bh // H, bh % H
    r = tile * BM + tl.arange(0, BM)
    d = tl.arange(0, DP)
    y = tl.arange(0, YP)
    ok = r < N
    wide = d < D2
    low: tl.constexpr = query.dtype.element_ty
    at = query + (bh * N + r)[:, None] * (2 * D2) + d[None, :]
    here = ok[:, None] & wide[None, :]
    qx = tl.load(at, mask=here, other=0.0)
    qy = tl.load(at + D2, mask=here, other=0.0)
    rows = table_y + (h * C + c) * Y * D2
    ty = tl.load(
        rows + y[:, None] * D2 + d[None, :], mask=(y < Y)[:, None] & wide[None, :], other=0.0
    )
    g = tl.dot(qy, tl.trans(ty), input_precision=PRECISION)
    g += tl.load(bias_y + (b * C + c) * Y + y, mask=y < Y, other=-float("inf"))[None, :]
    top_g = tl.max(g, 1)
    live_g = tl.where(top_g > -1e30, top_g, 0.0)
    ey = tl.exp2(g - live_g[:, None])
    top = tl.full((BM,), -1e30, tl.float32)
    by_row = tl.zeros((BM, YP), tl.float32)
    columns = table_x + (h * C + c) * X * D2
    for chunk in tl.static_range(CHUNKS):
        x = chunk * BX + tl.arange(0, BX)
        tx = tl.load(
            columns + x[:, None] * D2 + d[None, :], mask=(x < X)[:, None] & wide[None, :], other=0.0
        )
        f = tl.dot(qx, tl.trans(tx), input_precision=PRECISION)
        f += tl.load(bias_x + (b * C + c) * X + x, mask=x < X, other=-float("inf"))[None, :]
        higher = tl.maximum(top, tl.max(f, 1))
        ex = tl.exp2(f - higher[:, None])
        cells = tl.load(
            indicator + ((b * C + c) * X + x)[:, None] * Y + y[None, :],
            mask=(x < X)[:, None] & (y < Y)[None, :],
            other=0.0,
        )
        by_row = by_row * tl.exp2(top - higher)[:, None]
        by_row = tl.dot(ex.to(low), cells, by_row, input_precision=PRECISION)
        top = higher
    z = tl.sum(ey * by_row, 1)
    live = (top > -1e29) & (top_g > -1e29)
    out = (bh * N + r) * C + c
    bound = tl.where(live, top + live_g, -float("inf"))
    tl.store(log_sum + out, tl.where(z > 0.0, bound + tl.log2(z), -float("inf")), mask=ok)
    tl.store(faint + out, tl.where(live & (z < 1e-12), bound, -float("inf")), mask=ok)


@triton.jit
def class_backward(
    query, excess, lse, table_a, table_b, indicator, bias_a, bias_b, grad_query, grad_table,
    N, H, C, A, B_, stride_a, stride_b, blocks,
    D2: tl.constexpr, DP: tl.constexpr, BA: tl.constexpr, BP: tl.constexpr, CHUNKS: tl.constexpr,
    BM: tl.constexpr, FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write one axis's gradients: dF(a) = excess e^{F(a) + top_b - lse} (e^{G - top_b} B)(a).

    Axis a is differentiated (x if FIRST), axis b summed over. grad_query [C, B, H, N, D2] and
    grad_table [P, B, H, C, A, D2] are partial sums; adding them outside keeps the order fixed.
    """
    part, bh, cell = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    c, chunk = cell // CHUNKS, cell % CHUNKS
    b, h = bh // H, bh % H
    d = tl.arange(0, DP)
    a = chunk * BA + tl.arange(0, BA)
    k = tl.arange(0, BP)
    wide = d < D2
    low: tl.constexpr = query.dtype.element_ty
    ta = tl.load(
        table_a + ((h * C + c) * A + a)[:, None] * D2 + d[None, :],
        mask=(a < A)[:, None] & wide[None, :],
        other=0.0,
    )
    tb = tl.load(
        table_b + ((h * C + c) * B_ + k)[:, None] * D2 + d[None, :],
        mask=(k < B_)[:, None] & wide[None, :],
        other=0.0,
    )
    shift_a = tl.load(bias_a + (b * C + c) * A + a, mask=a < A, other=-float("inf"))
    shift_b = tl.load(bias_b + (b * C + c) * B_ + k, mask=k < B_, other=-float("inf"))
    cells = tl.load(
        indicator + (b * C + c) * A * B_ + k[:, None] * stride_b + a[None, :] * stride_a,
        mask=(k < B_)[:, None] & (a < A)[None, :],
        other=0.0,
    )
    acc = tl.zeros((BA, DP), tl.float32)
    for i in range(blocks):
        r = (part * blocks + i) * BM + tl.arange(0, BM)
        ok = r < N
        here = ok[:, None] & wide[None, :]
        at = query + (bh * N + r)[:, None] * (2 * D2) + d[None, :]
        qx = tl.load(at, mask=here, other=0.0)
        qy = tl.load(at + D2, mask=here, other=0.0)
        if FIRST:
            qa, qb = qx, qy
        else:
            qa, qb = qy, qx
        g = tl.dot(qb, tl.trans(tb), input_precision=PRECISION) + shift_b[None, :]
        top = tl.max(g, 1)
        live = tl.where(top > -1e30, top, 0.0)
        eb = tl.exp2(g - live[:, None]).to(low)
        along = tl.dot(eb, cells, input_precision=PRECISION)
        f = tl.dot(qa, tl.trans(ta), input_precision=PRECISION) + shift_a[None, :]
        total = tl.load(lse + bh * N + r, mask=ok, other=float("inf"))
        weight = tl.load(excess + (bh * N + r) * C + c, mask=ok, other=0.0)
        power = tl.minimum(f + (live - total)[:, None], 100.0)
        slope = (tl.exp2(power) * along * weight[:, None]).to(low)
        gq = tl.dot(slope, ta, input_precision=PRECISION)
        to = ((cell * tl.num_programs(1) + bh) * N + r)[:, None] * D2 + d[None, :]
        tl.store(grad_query + to, gq, mask=here)
        acc = tl.dot(tl.trans(slope), qa, acc, input_precision=PRECISION)
    out = (((part * tl.num_programs(1) + bh) * C + c) * A + a)[:, None] * D2 + d[None, :]
    tl.store(grad_table + out, acc, mask=(a < A)[:, None] & wide[None, :])


@dataclass(frozen=True)
class Tables:
    """The kernel's view of a problem, in the operand dtype, contiguous."""

    x: Tensor  # [H, C, X, D / 2], scaled by log2 e
    y: Tensor
    indicator: Tensor  # [B, C, X, Y]
    bias_x: Tensor  # [B, C, X]
    bias_y: Tensor  # [B, C, Y]


def tables(problem: Problem, batch: int, dtype: torch.dtype) -> Tables:
    """Lay the classes out on the full grid."""
    table_x, table_y = problem.table_x, problem.table_y
    shape = (batch, len(problem.plan.classes), table_x.shape[2], table_y.shape[2])
    indicator = torch.zeros(shape, dtype=dtype, device=table_x.device)
    for c, mask_class in enumerate(problem.plan.classes):
        cells = mask_class.indicator.transpose(1, 2).to(dtype)
        indicator[:, c, mask_class.columns, mask_class.rows] = cells
    none = torch.tensor(float("-inf"), device=table_x.device)
    zero = torch.zeros((), device=table_x.device)
    return Tables(
        x=(table_x * LOG2E).to(dtype).contiguous(),
        y=(table_y * LOG2E).to(dtype).contiguous(),
        indicator=indicator,
        bias_x=torch.where(indicator.any(3), zero, none).contiguous(),
        bias_y=torch.where(indicator.any(2), zero, none).contiguous(),
    )


def precision(dtype: torch.dtype) -> str:
    """Return the product precision: exact fp32 for fp32 operands."""
    return "ieee" if dtype is torch.float32 else "tf32"


def settings(kernel: str, query: Tensor, axis: int, other: int = 0) -> dict[str, int]:
    """Return launch settings of a shape class, as `variants.py` compiles them."""
    key = f"{kernel}/D{query.shape[3]}/A{power_of_two(axis)}/{str(query.dtype)[6:]}"
    # wgmma has 64 rows, and the backward's table gradient has CHUNK of them
    chunk = 64 if kernel == "backward" else min(64, power_of_two(axis))
    wide = kernel == "backward" and max(axis, other) > 64
    on_gpu = query.device.type == "cuda"
    older = on_gpu and torch.cuda.get_device_capability(query.device) < (9, 0)
    rows, warps = 64, 8 if wide else 4
    if wide and older:  # products keep their operands in registers there
        rows, chunk = 32, 16
    default = {"BM": rows, "CHUNK": chunk, "num_warps": warps, "num_stages": 1}
    return tuning.lookup("mask_attention", key, query.device, default)


def class_sums(q: Tensor, laid: Tables) -> tuple[Tensor, Tensor]:
    """Return natural log-sums [B, H, N, C] per class and the bounds of those too faint to trust."""
    batch, heads, num_queries, dim = q.shape
    count, columns, rows = laid.x.shape[1], laid.x.shape[2], laid.y.shape[2]
    log_sum = torch.empty(batch, heads, num_queries, count, device=q.device)
    faint = torch.empty_like(log_sum)
    setting = settings("forward", q, columns)
    block, chunk = setting.pop("BM"), setting.pop("CHUNK")
    class_forward[(triton.cdiv(num_queries, block), batch * heads, count)](
        q, laid.x, laid.y, laid.indicator, laid.bias_x, laid.bias_y, log_sum, faint,
        num_queries, heads, count, columns, rows, D2=dim // 2, DP=power_of_two(dim // 2), BX=chunk,
        YP=power_of_two(rows), CHUNKS=triton.cdiv(columns, chunk), BM=block,
        PRECISION=precision(q.dtype), **setting,
    )  # fmt: skip
    return log_sum / LOG2E, faint / LOG2E


def axis_gradients(
    q: Tensor, excess: Tensor, lse: Tensor, laid: Tables, first: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of one half of the queries [B, H, N, D/2] and of that axis's table."""
    batch, heads, num_queries, dim = q.shape
    table_a, table_b = (laid.x, laid.y) if first else (laid.y, laid.x)
    bias_a, bias_b = (laid.bias_x, laid.bias_y) if first else (laid.bias_y, laid.bias_x)
    count, length, other = table_a.shape[1], table_a.shape[2], table_b.shape[2]
    setting = settings("backward", q, length, other)
    block, chunk = setting.pop("BM"), setting.pop("CHUNK")
    chunks = triton.cdiv(length, chunk)
    tiles = triton.cdiv(num_queries, block)
    parts = min(tiles, 8)
    shape = (count * chunks, batch, heads, num_queries, dim // 2)
    grad_query = torch.empty(shape, device=q.device)
    grad_table = torch.empty(parts, batch, heads, count, length, dim // 2, device=q.device)
    stride_a, stride_b = (laid.y.shape[2], 1) if first else (1, laid.y.shape[2])
    class_backward[(parts, batch * heads, count * chunks)](
        q, excess, lse, table_a, table_b, laid.indicator, bias_a, bias_b, grad_query, grad_table,
        num_queries, heads, count, length, other, stride_a, stride_b, triton.cdiv(tiles, parts),
        D2=dim // 2, DP=power_of_two(dim // 2), BA=chunk, BP=power_of_two(other), CHUNKS=chunks,
        BM=block, FIRST=first, PRECISION=precision(q.dtype), **setting,
    )  # fmt: skip
    return grad_query.sum(0) / LOG2E, grad_table.sum((0, 1))


def combine(
    problem: Problem, q: Tensor, laid: Tables | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return lse [B, H, N], class shares, shares of soft cells, and the rows to be redone."""
    soft = structured.soft_logits(problem, q.float())
    sums = faint = q.new_empty(*q.shape[:3], 0, dtype=torch.float32)
    if laid is not None:
        sums, faint = class_sums(q, laid)
    joined = torch.cat((sums, soft), -1)
    lse = torch.logsumexp(joined, -1)
    share = torch.softmax(joined, -1)  # sums to one, exp(x - lse) would not quite
    doubt = (faint > lse[..., None] + structured.GAP / 4).any(-1) | (lse == -float("inf"))
    count = sums.shape[-1]
    return lse, share[..., :count], share[..., count:], doubt


def mask_attention(
    query: Tensor,
    mask: Tensor,
    key_vectors: Tensor,
    value_vectors: Tensor,
    query_grid: Size,
    extent: Size,
    rope: bool,
    theta: float,
) -> Tensor:
    """Attend class by class on tensor cores."""
    if query.numel() == 0:
        return query.clone()
    arguments = (query, mask, key_vectors, value_vectors, query_grid, extent, rope, theta)
    problem = structured.prepare(*arguments)
    q, laid = _operands(problem, query)
    _, shares, soft, doubt = combine(problem, q, laid)
    out = shares @ problem.values
    if soft.shape[-1]:
        out += soft @ problem.soft_values
    if bool(doubt.any()):
        structured.dense_rows(arguments, q.float(), doubt, out)
    return out.to(query.dtype)


def _operands(problem: Problem, query: Tensor) -> tuple[Tensor, Tables | None]:
    whole = slice(0, query.shape[2])
    q = structured.rotate_query(problem, query, whole, torch.float32)
    q = q.to(query.dtype).contiguous()
    if not problem.plan.classes:
        return q, None
    return q, tables(problem, query.shape[0], query.dtype)


def mask_attention_backward(
    grad: Tensor,
    query: Tensor,
    mask: Tensor,
    key_vectors: Tensor,
    value_vectors: Tensor,
    query_grid: Size,
    extent: Size,
    rope: bool,
    theta: float,
    needs_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value vectors; the mask's go through `structured`."""
    arguments = (query, mask, key_vectors, value_vectors, query_grid, extent, rope, theta)
    if needs_mask or query.numel() == 0:
        return structured_backward.mask_attention_backward(grad, *arguments, needs_mask)
    problem = structured.prepare(*arguments)
    q, laid = _operands(problem, query)
    lse, shares, soft, doubt = combine(problem, q, laid)
    wide, wide_grad = q.float(), grad.float()
    vectors = (key_vectors.float(), value_vectors.float())
    sums = structured_backward.zeros(problem, arguments, torch.float32, False)
    if bool(doubt.any()):
        everything = slice(0, q.shape[2])
        structured_backward.dense_rows(arguments, sums, everything, wide, wide_grad, doubt, vectors)
        shares, soft = (t.masked_fill(doubt[..., None], 0.0) for t in (shares, soft))
    by_class = wide_grad @ problem.values.transpose(1, 2)
    by_cell = wide_grad @ problem.soft_values.transpose(2, 3)
    mean = (shares * by_class).sum(-1, keepdim=True) + (soft * by_cell).sum(-1, keepdim=True)
    slope = soft * (by_cell - mean)
    sums.query += slope @ problem.soft_keys
    sums.soft_keys += slope.transpose(2, 3) @ wide
    sums.soft_values += soft.transpose(2, 3) @ wide_grad
    sums.values += torch.einsum("bhnc,bhnd->hcd", shares, wide_grad)
    if laid is not None:
        half = q.shape[3] // 2
        excess = (by_class - mean).masked_fill_(doubt[..., None], 0.0).contiguous()
        bound = (lse * LOG2E).contiguous()
        grad_x, sums.table_x = axis_gradients(q, excess, bound, laid, True)
        grad_y, sums.table_y = axis_gradients(q, excess, bound, laid, False)
        sums.query[..., :half] += grad_x
        sums.query[..., half:] += grad_y
    return structured_backward.finish(problem, arguments, sums, vectors)
