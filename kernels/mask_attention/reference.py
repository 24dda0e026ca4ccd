"""Mask attention written out: project the mask to keys and values, rotate, attend (eq. 6).

Axes: B batch, H heads, N queries, L mask tokens, M mask channels, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.mask_attention.rotary import Size, cell_centres, rotate_axial


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which half-precision inputs are computed (fp32), else the input's."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


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
    """Attend from `query` to the tokens of `mask`: softmax(q k^T / sqrt(D)) v. Differentiable."""
    dtype = compute_dtype(query.dtype)
    batch, channels, rows, columns = mask.shape
    num_queries, dim = query.shape[2], query.shape[3]
    if query.numel() == 0:
        return query.clone()
    tokens = mask.reshape(batch, 1, channels, rows * columns).transpose(2, 3).to(dtype)
    q = query.to(dtype)
    keys = tokens @ key_vectors.to(dtype)
    values = tokens @ value_vectors.to(dtype)
    if rope:
        # angles in fp64: latent coordinates times frequencies, rounded once
        q_at = cell_centres(query_grid, extent, query.device, torch.float64)
        k_at = cell_centres((rows, columns), extent, query.device, torch.float64)
        q, keys = rotate_axial(q, q_at, theta), rotate_axial(keys, k_at, theta)
    out = F.scaled_dot_product_attention(q, keys, values, scale=dim**-0.5)
    assert out.shape[2] == num_queries
    return out.to(query.dtype)


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
    """Return the gradients of query, mask (empty unless `needs_mask`), key and value vectors.

    P = softmax(s q k^T); dv = P^T g; dS = P (g v^T - rowsum(g o)); dq = s dS k; dk = s dS^T q,
    then through the rotations and the projections of the mask, one head of one row at a time.
    """
    dtype = compute_dtype(query.dtype)
    rows, columns = mask.shape[2:]
    grads = [torch.zeros_like(t, dtype=dtype) for t in (query, mask, key_vectors, value_vectors)]
    grad_query, grad_mask, grad_keys, grad_values = grads
    q_at = cell_centres(query_grid, extent, query.device, torch.float64)
    k_at = cell_centres((rows, columns), extent, query.device, torch.float64)
    for b in range(query.shape[0]):
        tokens = mask[b].flatten(1).T.to(dtype)
        for h in range(query.shape[1]):
            per_head = (query[b, h].to(dtype), key_vectors[h].to(dtype), value_vectors[h].to(dtype))
            q, u, w = per_head
            keys, values = tokens @ u, tokens @ w
            if rope:
                q, keys = rotate_axial(q, q_at, theta), rotate_axial(keys, k_at, theta)
            dq, dk, dv = _dense_backward(q, keys, values, grad[b, h].to(dtype))
            if rope:
                dq, dk = rotate_axial(dq, -q_at, theta), rotate_axial(dk, -k_at, theta)
            grad_query[b, h] = dq
            grad_keys[h] += tokens.T @ dk
            grad_values[h] += tokens.T @ dv
            if needs_mask:
                grad_mask[b] += (dk @ u.T + dv @ w.T).T.reshape(grad_mask[b].shape)
    return (
        grad_query.to(query.dtype),
        grad_mask.to(mask.dtype) if needs_mask else mask.new_empty(0),
        grad_keys.to(key_vectors.dtype),
        grad_values.to(value_vectors.dtype),
    )


def _dense_backward(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, rows: int = 1024
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv of one head of softmax attention, `rows` queries at a time."""
    scale = q.shape[1] ** -0.5
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for start in range(0, q.shape[0], rows):
        part = slice(start, start + rows)
        p = torch.softmax(q[part] @ k.T * scale, -1)
        dv.addmm_(p.T, grad[part])
        dp = grad[part] @ v.T
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dq[part] = ds @ k
        dk.addmm_(ds.T, q[part])
    return dq, dk, dv
