"""Backward of mask attention by separable tables (README: derivation). Plain PyTorch.

With pi_c the share of class c, g_c = dO . v_c, D = dO . out and s_c = g_c - D:
dF_c(x) = s_c w_c e^F(x) (e^G B_c)(x),  dG_c(y) = s_c w_c e^G(y) (e^F B_c^T)(y),  dv_c = sum pi dO.

Axes: as in structured.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.mask_attention.rotary import Size, cell_centres, rotate, rotate_axial
from kernels.mask_attention.structured import (
    ClassTerms,
    Problem,
    chunk_rows,
    class_terms,
    combine,
    compute_dtype,
    dense_keys,
    prepare,
    rotate_query,
    soft_logits,
)

Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Size, Size, bool, float]


@dataclass
class Sums:
    """Gradients accumulated over chunks of queries, in the compute dtype."""

    query: Tensor  # [B, H, N, D], still turned
    table_x: Tensor  # [H, C, columns, D / 2]
    table_y: Tensor
    values: Tensor  # [H, C, D]
    soft_keys: Tensor  # [B, H, S, D], still turned and scaled
    soft_values: Tensor
    keys: Tensor  # [H, M, D] from dense rows
    value_vectors: Tensor
    mask: Tensor | None  # [B, M, L]


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
    """Return the gradients of query, mask (empty unless `needs_mask`), key and value vectors."""
    arguments = (query, mask, key_vectors, value_vectors, query_grid, extent, rope, theta)
    dtype = compute_dtype(query.dtype)
    problem = prepare(*arguments)
    vectors = (key_vectors.to(dtype), value_vectors.to(dtype))
    sums = zeros(problem, arguments, dtype, needs_mask)
    step = chunk_rows(query, mask, problem.plan)
    for start in range(0, query.shape[2], step):
        part = slice(start, start + step)
        q = rotate_query(problem, query, part, dtype)
        _chunk(problem, arguments, sums, part, q, grad[:, :, part].to(dtype), vectors)
    return finish(problem, arguments, sums, vectors)


def zeros(problem: Problem, arguments: Arguments, dtype: torch.dtype, needs_mask: bool) -> Sums:
    """Return empty sums for one backward."""
    query, mask, key_vectors, value_vectors = arguments[:4]
    return Sums(
        query=torch.zeros_like(query, dtype=dtype, memory_format=torch.contiguous_format),
        table_x=torch.zeros_like(problem.table_x),
        table_y=torch.zeros_like(problem.table_y),
        values=torch.zeros_like(problem.values),
        soft_keys=torch.zeros_like(problem.soft_keys),
        soft_values=torch.zeros_like(problem.soft_values),
        keys=torch.zeros_like(key_vectors, dtype=dtype),
        value_vectors=torch.zeros_like(value_vectors, dtype=dtype),
        mask=torch.zeros_like(mask.flatten(2), dtype=dtype) if needs_mask else None,
    )


def _chunk(
    problem: Problem,
    arguments: Arguments,
    sums: Sums,
    part: slice,
    q: Tensor,
    grad: Tensor,
    vectors: tuple[Tensor, Tensor],
) -> None:
    half = q.shape[3] // 2
    qx, qy = q[..., :half], q[..., half:]
    count = len(problem.plan.classes)
    terms = [class_terms(problem, c, qx, qy) for c in range(count)]
    logits = soft_logits(problem, q)
    row = combine(terms, logits, q.shape)
    shares, doubt = row.shares, row.doubt
    if bool(doubt.any()):
        dense_rows(arguments, sums, part, q, grad, doubt, vectors)
        shares = shares.masked_fill(doubt[..., None], 0.0)
    by_class = grad @ problem.values.transpose(1, 2)
    mean = (shares * by_class).sum(-1)
    grad_q = sums.query[:, :, part]
    if logits.shape[-1]:
        share = row.share(logits).masked_fill_(doubt[..., None], 0.0)
        by_cell = grad @ problem.soft_values.transpose(2, 3)
        mean = mean + (share * by_cell).sum(-1)
        slope = share * (by_cell - mean[..., None])
        grad_q += slope @ problem.soft_keys
        sums.soft_keys += slope.transpose(2, 3) @ q
        sums.soft_values += share.transpose(2, 3) @ grad
    sums.values += torch.einsum("bhnc,bhnd->hcd", shares, grad)
    for c, term in enumerate(terms):
        weight = row.weight(term)
        excess = weight * (by_class[..., c] - mean)
        _class_gradient(problem, sums, c, term, excess, (qx, qy), grad_q)
        if sums.mask is not None:
            _mask_gradient(problem, sums.mask, c, term, weight, excess, (q, grad), vectors)


def _class_gradient(
    problem: Problem,
    sums: Sums,
    c: int,
    term: ClassTerms,
    excess: Tensor,
    queries: tuple[Tensor, Tensor],
    grad_q: Tensor,
) -> None:
    """Add one class's share of dq and of its tables."""
    mask_class = problem.plan.classes[c]
    half = grad_q.shape[3] // 2
    by_column = term.ey @ mask_class.indicator[:, None]
    grad_f = by_column.mul_(term.ex).mul_(excess[..., None])
    grad_g = term.by_row.mul_(term.ey).mul_(excess[..., None])
    x, y = mask_class.columns, mask_class.rows
    grad_q[..., :half] += grad_f @ problem.table_x[:, c, x]
    grad_q[..., half:] += grad_g @ problem.table_y[:, c, y]
    sums.table_x[:, c, x] += (grad_f.transpose(2, 3) @ queries[0]).sum(0)
    sums.table_y[:, c, y] += (grad_g.transpose(2, 3) @ queries[1]).sum(0)


def _mask_gradient(
    problem: Problem,
    grad_mask: Tensor,
    c: int,
    term: ClassTerms,
    weight: Tensor,
    excess: Tensor,
    rows: tuple[Tensor, Tensor],
    vectors: tuple[Tensor, Tensor],
) -> None:
    """Add sum_i P_ij [(g_i - D_i)(F_im(x_j) + G_im(y_j)) + dO_i . value_m] for one class."""
    q, grad = rows
    half, scale = q.shape[3] // 2, q.shape[3] ** -0.5
    mask_class = problem.plan.classes[c]
    member = problem.plan.owner == c
    for m in range(vectors[0].shape[1]):
        key, value = vectors[0][:, m, None] * scale, vectors[1][:, m]
        key_x, key_y = key[..., :half], key[..., half:]
        if problem.angle_x is not None and problem.angle_y is not None:
            key_x = rotate(key_x, problem.angle_x[mask_class.columns])
            key_y = rotate(key_y, problem.angle_y[mask_class.rows])
        f = q[..., :half] @ key_x.transpose(1, 2)
        g = q[..., half:] @ key_y.transpose(1, 2)
        straight = weight * torch.einsum("bhnd,hd->bhn", grad, value)
        left = term.ex * (excess[..., None] * f + straight[..., None])
        cells = left.flatten(1, 2).transpose(1, 2) @ term.ey.flatten(1, 2)
        left = (term.ex * excess[..., None]).flatten(1, 2).transpose(1, 2)
        cells = (cells + left @ (term.ey * g).flatten(1, 2)).transpose(1, 2)
        if problem.angle_x is None:
            grad_mask[:, m] += member * cells.reshape(-1, 1)
        else:
            grid = (problem.table_y.shape[2], problem.table_x.shape[2])
            view = grad_mask[:, m].view(-1, *grid)
            inside = member.view(-1, *grid)[:, mask_class.rows, mask_class.columns]
            view[:, mask_class.rows, mask_class.columns] += cells * inside


def dense_rows(
    arguments: Arguments,
    sums: Sums,
    part: slice,
    q: Tensor,
    grad: Tensor,
    doubt: Tensor,
    vectors: tuple[Tensor, Tensor],
) -> None:
    """Add the gradients of doubtful rows, computed densely."""
    _, mask, _, _, _, extent, rope, theta = arguments
    scale = q.shape[3] ** -0.5
    at = cell_centres((mask.shape[2], mask.shape[3]), extent, mask.device, torch.float64)
    for b, h in doubt.any(-1).nonzero().tolist():
        cells, keys, values = dense_keys(arguments, b, h)
        for rows in torch.split(doubt[b, h].nonzero()[:, 0], 256):
            p = torch.softmax(q[b, h, rows] @ keys.T * scale, -1)
            dp = grad[b, h, rows] @ values.T
            ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
            sums.query[b, h, part][rows] = ds @ keys
            dk, dv = ds.T @ q[b, h, rows], p.T @ grad[b, h, rows]
            dk = rotate_axial(dk, -at, theta) if rope else dk
            sums.keys[h] += cells.T @ dk
            sums.value_vectors[h] += cells.T @ dv
            if sums.mask is not None:
                sums.mask[b] += (dk @ vectors[0][h].T + dv @ vectors[1][h].T).T


def finish(
    problem: Problem, arguments: Arguments, sums: Sums, vectors: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn the sums back into gradients of the operator's inputs."""
    query, mask, key_vectors, value_vectors, _, extent, _, theta = arguments
    scale = query.shape[3] ** -0.5
    plan = problem.plan
    grad_query, table_x, table_y = sums.query, sums.table_x, sums.table_y
    soft_keys = sums.soft_keys
    if problem.angle_x is not None and problem.angle_y is not None:
        assert problem.query_centres is not None
        grad_query = rotate_axial(grad_query, -problem.query_centres, theta)
        table_x, table_y = rotate(table_x, -problem.angle_x), rotate(table_y, -problem.angle_y)
        grid = (mask.shape[2], mask.shape[3])
        at = cell_centres(grid, extent, mask.device, torch.float64)[plan.soft]
        pairs = zip(soft_keys, at, strict=True)
        soft_keys = torch.stack([rotate_axial(k, -c, theta) for k, c in pairs])
    class_keys = torch.cat((table_x.sum(2), table_y.sum(2)), -1) * scale
    soft_keys = soft_keys * scale
    dtype = sums.query.dtype
    cells = mask.to(dtype).flatten(2).transpose(1, 2)
    cells = cells.gather(1, plan.soft[..., None].expand(-1, -1, mask.shape[1]))
    cells = cells * plan.soft_valid[..., None]
    grad_keys = sums.keys + torch.einsum("cm,hcd->hmd", plan.values, class_keys)
    grad_keys += torch.einsum("bsm,bhsd->hmd", cells, soft_keys)
    grad_values = sums.value_vectors + torch.einsum("cm,hcd->hmd", plan.values, sums.values)
    grad_values += torch.einsum("bsm,bhsd->hmd", cells, sums.soft_values)
    grad_mask = mask.new_empty(0)
    if sums.mask is not None:
        soft = torch.einsum("bhsd,hmd->bms", soft_keys, vectors[0])
        soft += torch.einsum("bhsd,hmd->bms", sums.soft_values, vectors[1])
        soft *= plan.soft_valid[:, None]
        index = plan.soft[:, None].expand(-1, mask.shape[1], -1)
        sums.mask.scatter_add_(2, index, soft)
        grad_mask = sums.mask.reshape(mask.shape).to(mask.dtype)
    return (
        grad_query.to(query.dtype),
        grad_mask,
        grad_keys.to(key_vectors.dtype),
        grad_values.to(value_vectors.dtype),
    )
