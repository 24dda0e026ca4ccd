"""Gated cross-attention with projected keys and values, the projections folded (README).

One product per side (f (W_k W_feature)^T) instead of two, then fused attention. Differentiable by
autograd, which is how training uses it.

Axes: as in reference.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """Compute eq. 3; the key bias is dropped because it cancels in the softmax."""
    if features.shape[1] == 0 or query.numel() == 0:
        return residual.clone()
    dtype = torch.promote_types(query.dtype, torch.float32)

    def split(tensor: Tensor) -> Tensor:
        return tensor.reshape(*tensor.shape[:2], num_heads, -1).transpose(1, 2)

    q = split(F.linear(query, w_q))
    k = split(F.linear(features, w_k @ w_feature))
    v = split(F.linear(features, w_v @ w_feature, w_v @ b_feature))
    if padding_mask is None:
        attended = F.scaled_dot_product_attention(q, k, v)
    else:
        empty = padding_mask.all(-1)[:, None, None, None]
        allowed = ~padding_mask[:, None, None, :] | empty
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        attended = attended.masked_fill(empty, 0.0)
    update = F.linear(attended.transpose(1, 2).flatten(2), w_o).to(dtype)
    return (residual.to(dtype) + torch.tanh(gate.to(dtype)) * update).to(residual.dtype)
