"""Backward of gated cross-attention with absorbed projections (README: derivation).

Every weight gradient comes from [R, C] tensors; nothing L-long is formed unless the features
themselves need a gradient.

Axes: as in absorbed.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gated_cross_attention.absorbed import (
    Weights,
    attended_of,
    chunk_length,
    compute_dtype,
    forward,
    merge,
    padding_bias,
    scores_of,
    split,
)


@dataclass(frozen=True)
class Rows:
    """What the loop over tokens needs, one line per absorbed query."""

    query: Tensor  # [B, R, C] absorbed, scaled
    grad: Tensor  # [B, R, C] gradient of the context
    lse: Tensor  # [B, R, 1]
    mean: Tensor  # [B, R, 1] <grad, context>


def attend_backward(
    rows: Rows, features: Tensor, bias: Tensor | None, needs_features: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the absorbed queries [B, R, C] and of the features (or empty)."""
    dtype = compute_dtype(features.dtype)
    batch, num_rows, _ = rows.query.shape
    grad_rows = torch.zeros_like(rows.query, dtype=dtype)
    grad_features = torch.empty_like(features) if needs_features else features.new_empty(0)
    step = chunk_length(batch, 2 * num_rows)
    for start in range(0, features.shape[1], step):
        part = slice(start, start + step)
        tokens = features[:, part]
        share = scores_of(rows.query, features, bias, part).sub_(rows.lse).exp_()
        slope = torch.bmm(rows.grad, tokens.transpose(1, 2)).to(dtype)
        slope = slope.sub_(rows.mean).mul_(share).to(features.dtype)
        if grad_rows.dtype == slope.dtype:
            grad_rows.baddbmm_(slope, tokens)
        else:
            grad_rows += torch.bmm(slope, tokens)
        if needs_features:
            both = torch.bmm(slope.transpose(1, 2), rows.query)
            both += torch.bmm(share.to(features.dtype).transpose(1, 2), rows.grad)
            grad_features[:, part] = both
    return grad_rows, grad_features


AttendBackward = Callable[[Rows, Tensor, Tensor | None, bool], tuple[Tensor, Tensor]]


def backward(
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
    context: Tensor,
    lse: Tensor,
    keys: Tensor,
    values: Tensor,
    attend: AttendBackward = attend_backward,
) -> list[Tensor]:
    """Return gradients of query, features, w_feature, b_feature, w_q, w_k, w_v, w_o, gate."""
    inputs = (query, features, w_feature, b_feature, w_q, w_k, w_v, w_o, gate)
    if features.shape[1] == 0 or query.numel() == 0:
        empty = [torch.zeros_like(t) for t in inputs]
        empty[1] = empty[1] if needs_features else features.new_empty(0)
        return empty
    dtype, low = compute_dtype(query.dtype), query.dtype
    weights = Weights(keys, values, (w_v @ b_feature).reshape(num_heads, 1, -1))
    heads = split(query @ w_q.T, num_heads)
    attended = merge(attended_of(context, weights, padding_mask))
    opening = torch.tanh(gate.to(dtype))
    grad_merged = grad.to(low) @ w_o  # before the gate
    grad_gate = (1 - opening.square()) * (grad_merged.to(dtype) * attended).sum()
    grad_update = (grad.to(dtype) * opening).to(low)
    grad_attended = split((grad_merged.to(dtype) * opening).to(low), num_heads)
    if padding_mask is not None:
        dead = padding_mask.all(-1)[:, None, None, None]
        grad_attended = grad_attended.masked_fill(dead, 0.0)
    grad_context = (grad_attended @ weights.values).flatten(1, 2)
    rows = Rows(
        query=(heads @ weights.keys).flatten(1, 2),
        grad=grad_context,
        lse=lse.flatten(1)[..., None],
        mean=(grad_context * context.flatten(1, 2)).sum(-1, keepdim=True, dtype=dtype),
    )
    bias = padding_bias(padding_mask, dtype)
    grad_rows, grad_features = attend(rows, features, bias, needs_features)
    grad_rows = grad_rows.reshape(context.shape).to(low)
    projections = _projection_gradients(
        heads, grad_rows, grad_attended, context.to(low), weights, (w_feature, b_feature, w_k, w_v)
    )
    grad_heads = merge(grad_rows @ weights.keys.transpose(1, 2)).flatten(0, 1)
    grads = [
        (grad_heads @ w_q).reshape(query.shape),
        grad_features,
        projections[0],
        projections[1],
        grad_heads.T @ query.flatten(0, 1),
        projections[2],
        projections[3],
        grad_update.flatten(0, 1).T @ attended.flatten(0, 1),
        grad_gate.reshape(gate.shape),
    ]
    return [g.to(t.dtype) for g, t in zip(grads, inputs, strict=True)]


def _projection_gradients(
    heads: Tensor,
    grad_rows: Tensor,
    grad_attended: Tensor,
    context: Tensor,
    weights: Weights,
    projections: tuple[Tensor, Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of w_feature, b_feature, w_k, w_v.

    Either from those of the folded products, 8 D^2 C, or, row by row, without forming them:
    8 B Q D (D + H C). The second for few queries.
    """
    w_feature, b_feature, w_k, w_v = projections
    dim, channels = w_feature.shape
    batch, num_heads, num_queries, head = heads.shape
    scale = head**-0.5
    grad_bias = grad_attended.sum((0, 2)).flatten()
    if batch * num_queries * (dim + num_heads * channels) < dim * channels:
        grad_keys, part_keys = _row_gradients(heads, grad_rows * scale, w_k, w_feature)
        grad_values, part_values = _row_gradients(grad_attended, context, w_v, w_feature)
        grad_feature = part_keys + part_values
    else:
        flat_keys = _over_batch(heads, grad_rows).flatten(0, 1) * scale
        flat_values = _over_batch(grad_attended, context).flatten(0, 1)
        grad_keys, grad_values = flat_keys @ w_feature.T, flat_values @ w_feature.T
        grad_feature = w_k.T @ flat_keys + w_v.T @ flat_values
    grad_values = grad_values + torch.outer(grad_bias, b_feature)
    return grad_feature, w_v.T @ grad_bias, grad_keys, grad_values


def _row_gradients(
    heads: Tensor, rows: Tensor, weight: Tensor, w_feature: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `weight` [D, D] and w_feature in sum heads W_h W_feature . rows.

    heads [B, H, Q, D / H], rows [B, H, Q, C].
    """
    per_head = weight.reshape(heads.shape[1], -1, weight.shape[1])
    into = (heads @ per_head).flatten(0, 2)  # [B H Q, D]
    grad_weight = _over_batch(heads, rows @ w_feature.T).flatten(0, 1)
    return grad_weight, into.T @ rows.flatten(0, 2)


def _over_batch(left: Tensor, right: Tensor) -> Tensor:
    """Return sum_b left_b^T right_b per head: [B, H, Q, d] x [B, H, Q, C] -> [H, d, C]."""
    joined_left = left.transpose(0, 1).flatten(1, 2)
    joined_right = right.transpose(0, 1).flatten(1, 2)
    return joined_left.transpose(1, 2) @ joined_right


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
    """Return the gradients without a saved context: the forward runs again."""
    weights = (w_feature, b_feature, w_q, w_k, w_v, w_o)
    saved = forward(grad, query, features, *weights, gate, num_heads, padding_mask)[1:]
    rest = (gate, num_heads, padding_mask, needs_features)
    context, lse, keys, values = saved
    return backward(grad, query, features, *weights, *rest, context, lse, keys, values)
