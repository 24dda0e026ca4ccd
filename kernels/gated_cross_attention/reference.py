"""Gated cross-attention and gated FFN written out (eq. 3 and 4).

Axes: B batch, Q queries, L feature tokens, C feature channels, H heads, D model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which half-precision inputs are computed (fp32), else the input's."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def gated_cross_attention(
    residual: Tensor,
    query: Tensor,
    features: Tensor,
    w_feature: Tensor,
    b_feature: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    w_o: Tensor,
    gate: Tensor,
    num_heads: int,
    padding_mask: Tensor | None,
) -> Tensor:
    """Compute residual + tanh(gate) * MHA(query, F W_k^T, F W_v^T) W_o^T, F = features G^T + b.

    A query whose every key is padded attends to nothing and returns its residual.
    Matrix products run in the dtype of `query`, softmax and epilogue at least in fp32.
    """
    dtype = compute_dtype(query.dtype)
    dim = w_q.shape[0]
    head = dim // num_heads
    projected = F.linear(features, w_feature, b_feature)

    def split(tensor: Tensor) -> Tensor:
        return tensor.reshape(*tensor.shape[:2], num_heads, head).transpose(1, 2)

    q, k, v = (
        split(F.linear(query, w_q)),
        split(F.linear(projected, w_k)),
        split(F.linear(projected, w_v)),
    )
    if k.shape[2] == 0 or q.numel() == 0:
        return residual.clone()
    if padding_mask is None:
        attended = F.scaled_dot_product_attention(q, k, v)
    else:
        empty = padding_mask.all(-1)[:, None, None, None]
        allowed = ~padding_mask[:, None, None, :] | empty
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        attended = attended.masked_fill(empty, 0.0)
    merged = attended.transpose(1, 2).flatten(2)
    update = F.linear(merged, w_o).to(dtype)
    return (residual.to(dtype) + torch.tanh(gate.to(dtype)) * update).to(residual.dtype)


def gated_ffn(
    h: Tensor, normed: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gate: Tensor
) -> Tensor:
    """Compute h + tanh(gate) * (W2 gelu(W1 normed + b1) + b2) (eq. 4, exact gelu)."""
    dtype = compute_dtype(h.dtype)
    update = F.linear(F.gelu(F.linear(normed, w1, b1)), w2, b2).to(dtype)
    return (h.to(dtype) + torch.tanh(gate.to(dtype)) * update).to(h.dtype)


def gated_cross_attention_backward(
    grad: Tensor,
    query: Tensor,
    features: Tensor,
    w_feature: Tensor,
    b_feature: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    w_o: Tensor,
    gate: Tensor,
    num_heads: int,
    padding_mask: Tensor | None,
    needs_features: bool,
) -> list[Tensor]:
    """Return the gradients of query, features, w_feature, b_feature, w_q, w_k, w_v, w_o, gate.

    The gradient of `residual` is `grad`; that of features is empty unless `needs_features`.
    With y = MHA(...) W_o^T: dgate = (1 - tanh^2) <grad, y>, and softmax attention's usual chain.
    """
    batch, num_queries, dim = query.shape
    inputs = (query, features, w_feature, b_feature, w_q, w_k, w_v, w_o, gate)
    if features.shape[1] == 0 or query.numel() == 0:
        return _finish([torch.zeros_like(t) for t in inputs], inputs, needs_features)

    def split(tensor: Tensor) -> Tensor:
        return tensor.reshape(batch, -1, num_heads, dim // num_heads).transpose(1, 2)

    def merge(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2).reshape(-1, dim)

    dtype = compute_dtype(query.dtype)
    projected = F.linear(features, w_feature, b_feature)
    q, k, v = (
        split(F.linear(query, w_q)),
        split(F.linear(projected, w_k)),
        split(F.linear(projected, w_v)),
    )
    scale = (dim // num_heads) ** -0.5
    scores = (q @ k.transpose(2, 3)).to(dtype) * scale
    if padding_mask is not None:
        scores = scores.masked_fill(padding_mask[:, None, None, :], float("-inf"))
        p = torch.softmax(scores, -1).masked_fill(padding_mask.all(-1)[:, None, None, None], 0.0)
    else:
        p = torch.softmax(scores, -1)
    low = p.to(query.dtype)
    attended = merge(low @ v)
    opening = torch.tanh(gate.to(dtype))
    update = F.linear(attended, w_o).to(dtype)
    d_gate = (1 - opening.square()) * (grad.reshape(-1, dim).to(dtype) * update).sum()
    d_update = (grad.reshape(-1, dim).to(dtype) * opening).to(query.dtype)
    d_attended = split((d_update @ w_o).reshape(batch, num_queries, dim))
    dp = (d_attended @ v.transpose(2, 3)).to(dtype)
    ds = (p * (dp - (p * dp).sum(-1, keepdim=True)) * scale).to(query.dtype)
    d_q, d_k = merge(ds @ k), merge(ds.transpose(2, 3) @ q)
    d_v = merge(low.transpose(2, 3) @ d_attended)
    flat, tokens = projected.reshape(-1, dim), features.reshape(-1, features.shape[2])
    d_projected = d_k @ w_k + d_v @ w_v
    grads = [
        (d_q @ w_q).reshape(query.shape),
        (d_projected @ w_feature).reshape(features.shape) if needs_features else features,
        d_projected.T @ tokens,
        d_projected.sum(0),
        d_q.T @ query.reshape(-1, dim),
        d_k.T @ flat,
        d_v.T @ flat,
        d_update.T @ attended,
        d_gate.reshape(gate.shape),
    ]
    return _finish(grads, inputs, needs_features)


def _finish(grads: list[Tensor], inputs: tuple[Tensor, ...], needs_features: bool) -> list[Tensor]:
    """Cast gradients to the dtypes of their inputs; drop that of features unless needed."""
    cast = [g.to(t.dtype) for g, t in zip(grads, inputs, strict=True)]
    if not needs_features:
        cast[1] = inputs[1].new_empty(0)
    return cast
