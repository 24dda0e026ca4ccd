"""Mask attention by separable tables (README: derivation). Plain PyTorch, any device.

Within a class c every key is one vector turned by its position, so the logit of cell (y, x) is
F_c(x) + G_c(y) and the sum over the class is  sum_y e^G(y) (e^F B_c^T)(y)  with B_c its indicator.

Axes: B batch, H heads, N queries, M mask channels, D head width, C classes, S soft cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.mask_attention.plan import MaskClass, Plan, make_plan
from kernels.mask_attention.rotary import Size, axis_angles, cell_centres, rotate, rotate_axial

CHUNK_BYTES = 8 << 20  # tables of one chunk of queries
FAINT = 1e-28  # a class sum below this has lost accuracy ...
GAP = 40.0  # ... which matters only if its bound is this many nats above the row's sum


@dataclass(frozen=True)
class Problem:
    """Everything that does not depend on the query: tables per class, soft keys and values."""

    plan: Plan
    table_x: Tensor  # [H, C, columns, D / 2], scaled by D^-1/2
    table_y: Tensor  # [H, C, rows, D / 2]
    values: Tensor  # [H, C, D]
    soft_keys: Tensor  # [B, H, S, D], scaled
    soft_values: Tensor  # [B, H, S, D]
    angle_x: Tensor | None  # [columns, D / 4]
    angle_y: Tensor | None
    query_centres: Tensor | None  # [N, 2]
    theta: float


@dataclass
class ClassTerms:
    """Exponentials of one class for one chunk of queries, and their sum z = e^-top sum exp(S)."""

    ex: Tensor  # [B, H, n, columns]
    ey: Tensor  # [B, H, n, rows]
    by_row: Tensor  # ex B^T [B, H, n, rows]
    top: Tensor  # [B, H, n], -inf where the class is absent
    z: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return fp32 for half precision, else the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def prepare(
    query: Tensor,
    mask: Tensor,
    key_vectors: Tensor,
    value_vectors: Tensor,
    query_grid: Size,
    extent: Size,
    rope: bool,
    theta: float,
) -> Problem:
    """Group the mask's cells and build the tables."""
    dtype, device = compute_dtype(query.dtype), query.device
    dim, half = query.shape[3], query.shape[3] // 2
    rows, columns = mask.shape[2:]
    plan = make_plan(mask.to(dtype), dim, rope)
    scale = dim**-0.5
    keys = torch.einsum("cm,hmd->hcd", plan.values, key_vectors.to(dtype)) * scale
    values = torch.einsum("cm,hmd->hcd", plan.values, value_vectors.to(dtype))
    soft = mask.to(dtype).flatten(2).transpose(1, 2)
    soft = soft.gather(1, plan.soft[..., None].expand(-1, -1, mask.shape[1]))[:, None]
    soft_keys, soft_values = soft @ (key_vectors.to(dtype) * scale), soft @ value_vectors.to(dtype)
    if not rope:
        table_x, table_y = keys[:, :, None, :half], keys[:, :, None, half:]
        return Problem(
            plan, table_x, table_y, values, soft_keys, soft_values, None, None, None, theta
        )
    angle_x = axis_angles(columns, extent[1], half, theta, device, dtype)
    angle_y = axis_angles(rows, extent[0], half, theta, device, dtype)
    wide = keys[:, :, None, :]
    table_x = rotate(wide[..., :half].expand(-1, -1, columns, -1), angle_x)
    table_y = rotate(wide[..., half:].expand(-1, -1, rows, -1), angle_y)
    at = cell_centres((rows, columns), extent, device, torch.float64)[plan.soft]
    soft_keys = torch.stack([rotate_axial(k, c, theta) for k, c in zip(soft_keys, at, strict=True)])
    centres = cell_centres(query_grid, extent, device, torch.float64)
    return Problem(
        plan, table_x, table_y, values, soft_keys, soft_values, angle_x, angle_y, centres, theta
    )


def chunk_rows(query: Tensor, mask: Tensor, plan: Plan) -> int:
    """Return how many queries of every head fit `CHUNK_BYTES` of tables and soft logits."""
    batch, heads = query.shape[:2]
    per_class = 2 * (mask.shape[2] + mask.shape[3])
    row = batch * heads * 4 * (len(plan.classes) * per_class + 2 * plan.soft.shape[1] + 1)
    return max(16, CHUNK_BYTES // row)


def class_terms(problem: Problem, index: int, qx: Tensor, qy: Tensor) -> ClassTerms:
    """Evaluate one class for rotated queries, both halves [B, H, n, D / 2]."""
    mask_class: MaskClass = problem.plan.classes[index]
    f = qx @ problem.table_x[:, index, mask_class.columns].transpose(1, 2)
    g = qy @ problem.table_y[:, index, mask_class.rows].transpose(1, 2)
    if mask_class.column_bias is not None:
        f += mask_class.column_bias[:, None, None]
    if mask_class.row_bias is not None:
        g += mask_class.row_bias[:, None, None]
    top_f, top_g = f.amax(-1, keepdim=True), g.amax(-1, keepdim=True)
    top = (top_f + top_g)[..., 0]
    ex = f.sub_(top_f.nan_to_num(neginf=0.0, nan=float("nan"))).exp_()
    ey = g.sub_(top_g.nan_to_num(neginf=0.0, nan=float("nan"))).exp_()
    by_row = ex @ mask_class.indicator.transpose(1, 2)[:, None]
    return ClassTerms(ex, ey, by_row, top, torch.linalg.vecdot(ey, by_row))


@dataclass(frozen=True)
class Row:
    """The softmax of a chunk of queries: sum_j exp(S_ij) = exp(highest) total.

    The two are kept apart, because their logarithm would round away the digits that make shares
    sum to one.
    """

    highest: Tensor  # [B, H, n]
    total: Tensor  # [B, H, n]
    shares: Tensor  # [B, H, n, C] of the classes
    doubt: Tensor  # [B, H, n] rows whose sum is not trusted

    def share(self, logits: Tensor) -> Tensor:
        """Return exp(logits) / sum of a [B, H, n, S] block."""
        return (logits - self.highest[..., None]).exp_().div_(self.total[..., None])

    def weight(self, term: ClassTerms) -> Tensor:
        """Return the factor [B, H, n] that turns a class's exponentials into probabilities."""
        return (term.top - self.highest).exp_().div_(self.total).masked_fill_(self.doubt, 0.0)


def combine(terms: list[ClassTerms], soft_logits: Tensor, shape: torch.Size) -> Row:
    """Merge classes and soft cells."""
    tops = [term.top for term in terms]
    if soft_logits.shape[-1]:
        tops.append(soft_logits.amax(-1))
    highest = torch.stack(tops).amax(0)
    parts = [term.z * (term.top - highest).exp() for term in terms]
    total = torch.zeros(shape[:3], dtype=highest.dtype, device=highest.device)
    for part in parts:
        total = total + part
    if soft_logits.shape[-1]:
        total = total + (soft_logits - highest[..., None]).exp().sum(-1)
    lse = highest + total.log()
    doubt = total <= 0.0
    for term in terms:
        doubt |= (term.z < FAINT) & (term.top > lse + GAP)
    shares = torch.stack(parts, -1) if parts else total.new_zeros(*total.shape, 0)
    return Row(highest, total, shares / total[..., None], doubt)


def soft_logits(problem: Problem, q: Tensor) -> Tensor:
    """Return the logits of the soft cells [B, H, n, S], -inf where padded."""
    logits = q @ problem.soft_keys.transpose(2, 3)
    return logits.masked_fill_(~problem.plan.soft_valid[:, None, None], float("-inf"))


def rotate_query(problem: Problem, query: Tensor, part: slice, dtype: torch.dtype) -> Tensor:
    """Return a chunk of queries in the compute dtype, turned by their positions."""
    q = query[:, :, part].to(dtype)
    if problem.query_centres is None:
        return q
    return rotate_axial(q, problem.query_centres[part], problem.theta)


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
    """Attend class by class; rows whose sums underflow are recomputed densely."""
    if query.numel() == 0:
        return query.clone()
    arguments = (query, mask, key_vectors, value_vectors, query_grid, extent, rope, theta)
    problem = prepare(*arguments)
    dtype = compute_dtype(query.dtype)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    step = chunk_rows(query, mask, problem.plan)
    half = query.shape[3] // 2
    for start in range(0, query.shape[2], step):
        part = slice(start, start + step)
        q = rotate_query(problem, query, part, dtype)
        qx, qy = q[..., :half], q[..., half:]
        terms = [class_terms(problem, c, qx, qy) for c in range(len(problem.plan.classes))]
        logits = soft_logits(problem, q)
        row = combine(terms, logits, q.shape)
        result = row.shares @ problem.values
        if logits.shape[-1]:
            result += row.share(logits) @ problem.soft_values
        if bool(row.doubt.any()):
            dense_rows(arguments, q, row.doubt, result)
        out[:, :, part] = result
    return out


def dense_keys(
    arguments: tuple[Tensor, Tensor, Tensor, Tensor, Size, Size, bool, float], b: int, h: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mask cells [L, M], unscaled turned keys and values [L, D] of one head of one row."""
    query, mask, key_vectors, value_vectors, _, extent, rope, theta = arguments
    dtype = compute_dtype(query.dtype)
    cells = mask[b].flatten(1).T.to(dtype)
    keys, values = cells @ key_vectors[h].to(dtype), cells @ value_vectors[h].to(dtype)
    if rope:
        grid = (mask.shape[2], mask.shape[3])
        keys = rotate_axial(keys, cell_centres(grid, extent, mask.device, torch.float64), theta)
    return cells, keys, values


def dense_rows(
    arguments: tuple[Tensor, Tensor, Tensor, Tensor, Size, Size, bool, float],
    q: Tensor,
    doubt: Tensor,
    result: Tensor,
) -> None:
    """Overwrite the doubtful rows of `result` with dense attention."""
    scale = q.shape[3] ** -0.5
    for b, h in doubt.any(-1).nonzero().tolist():
        _, keys, values = dense_keys(arguments, b, h)
        rows = doubt[b, h].nonzero()[:, 0]
        for some in torch.split(rows, 256):
            result[b, h, some] = torch.softmax(q[b, h, some] @ keys.T * scale, -1) @ values
