"""Gated cross-attention with absorbed projections: keys and values never exist (README).

(q_h A_k,h) f^T = q_h (f A_k,h^T)^T, so queries are projected into feature space once and the
features themselves serve as keys and values, one shared head of width C for Q * H rows.

Axes: B batch, Q queries, L tokens, C channels, H heads, D model width, R = H * Q rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.remember import Remembered

CHUNK_BYTES = 2 << 20  # scores of one chunk of tokens


@dataclass(frozen=True)
class Weights:
    """Projections folded with the feature projection, per head."""

    keys: Tensor  # [H, D / H, C] = (W_k W_feature), scaled by (D / H)^-1/2
    values: Tensor  # [H, D / H, C] = (W_v W_feature)
    value_bias: Tensor  # [H, 1, D / H] = W_v b_feature; that of the keys cancels in the softmax


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return fp32 for half precision, else the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def fold(w_feature: Tensor, b_feature: Tensor, w_k: Tensor, w_v: Tensor, num_heads: int) -> Weights:
    """Fold the feature projection into keys and values."""
    dim, channels = w_feature.shape
    head = dim // num_heads
    keys = (w_k @ w_feature).mul_(head**-0.5).reshape(num_heads, head, channels)
    values = (w_v @ w_feature).reshape(num_heads, head, channels)
    return Weights(keys, values, (w_v @ b_feature).reshape(num_heads, 1, head))


def split(tensor: Tensor, num_heads: int) -> Tensor:
    """Return [B, Q, D] as [B, H, Q, D / H]."""
    return tensor.reshape(*tensor.shape[:2], num_heads, -1).transpose(1, 2)


def merge(tensor: Tensor) -> Tensor:
    """Return [B, H, Q, D / H] as [B, Q, D]."""
    return tensor.transpose(1, 2).flatten(2)


def chunk_length(batch: int, rows: int) -> int:
    """Return how many tokens are scored at once."""
    return max(64, CHUNK_BYTES // (4 * max(1, batch * rows)))


def scores_of(rows: Tensor, features: Tensor, bias: Tensor | None, part: slice) -> Tensor:
    """Return fp32 (fp64) scores [B, R, n] of one chunk of tokens, -inf where padded."""
    dtype = compute_dtype(rows.dtype)
    scores = torch.bmm(rows, features[:, part].transpose(1, 2)).to(dtype)
    if bias is not None:
        scores += bias[:, None, part]
    return scores


def attend(rows: Tensor, features: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return softmax(rows f^T) f [B, R, C] and the log-sum-exp [B, R].

    A row without a single allowed token gives context 0 and lse +inf.
    """
    if rows.device.type == "cpu" and bias is None:
        # The raw operator reads the last axis as if it were dense, and a map's tokens are not.
        q, kv = rows[:, None].contiguous(), features[:, None].contiguous()
        context, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, kv, kv, 0.0, False, scale=1.0
        )
        return context[:, 0], lse[:, 0]
    return attend_chunked(rows, features, bias)


def attend_chunked(rows: Tensor, features: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Do the same with plain matrix products, one chunk of tokens after the other."""
    dtype = compute_dtype(rows.dtype)
    batch, num_rows, channels = rows.shape
    context = torch.zeros(batch, num_rows, channels, dtype=dtype, device=rows.device)
    top = torch.full((batch, num_rows, 1), float("-inf"), dtype=dtype, device=rows.device)
    total = torch.zeros_like(top)
    step = chunk_length(batch, num_rows)
    for start in range(0, features.shape[1], step):
        part = slice(start, start + step)
        scores = scores_of(rows, features, bias, part)
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        safe = higher.nan_to_num(neginf=0.0, nan=float("nan"), posinf=float("inf"))
        decay = (top - safe).exp_()
        share = scores.sub_(safe).exp_()
        total = total * decay + share.sum(-1, keepdim=True)
        if share.dtype == features.dtype:
            context.mul_(decay).baddbmm_(share, features[:, part])
        else:
            context.mul_(decay).add_(torch.bmm(share.to(features.dtype), features[:, part]))
        top = higher
    lse = (top + total.log())[..., 0]
    empty = total == 0.0
    return (context / total).masked_fill(empty, 0.0), lse.masked_fill(empty[..., 0], float("inf"))


def padding_bias(padding_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return 0 / -inf [B, L], or None."""
    if padding_mask is None:
        return None
    return torch.zeros_like(padding_mask, dtype=dtype).masked_fill_(padding_mask, float("-inf"))


Attend = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
_folded: Remembered[Weights] = Remembered()


def fold_once(
    w_feature: Tensor, b_feature: Tensor, w_k: Tensor, w_v: Tensor, num_heads: int
) -> Weights:
    """Fold, remembering the result while no weight is written to: for inference."""
    sources = (w_feature, b_feature, w_k, w_v)
    return _folded.get(sources, lambda: fold(*sources, num_heads))


def forward(
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
    weights: Weights | None = None,
    attend: Attend = attend,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output, and for the backward: context [B, H, Q, C], lse [B, H, Q], folded weights.

    Folded weights are those of keys and values, [H, D / H, C].
    """
    if weights is None:
        weights = fold(w_feature, b_feature, w_k, w_v, num_heads)
    batch, num_queries, _ = query.shape
    channels = features.shape[2]
    dtype = compute_dtype(query.dtype)
    if features.shape[1] == 0 or query.numel() == 0:
        shape = (batch, num_heads, num_queries)
        empty = torch.full(shape, float("inf"), dtype=dtype, device=query.device)
        context = empty.new_zeros(*shape, channels)
        return residual.clone(), context, empty, weights.keys, weights.values
    rows = (split(query @ w_q.T, num_heads) @ weights.keys).flatten(1, 2)
    context, lse = attend(rows, features, padding_bias(padding_mask, dtype))
    context = context.reshape(batch, num_heads, num_queries, channels)
    lse = lse.reshape(batch, num_heads, num_queries)
    attended = attended_of(context, weights, padding_mask)
    update = (merge(attended) @ w_o.T).to(dtype)
    out = residual.to(dtype) + torch.tanh(gate.to(dtype)) * update
    return out.to(residual.dtype), context, lse, weights.keys, weights.values


def attended_of(context: Tensor, weights: Weights, padding_mask: Tensor | None) -> Tensor:
    """Return the attention's output per head [B, H, Q, D / H] from its context."""
    low = context.to(weights.values.dtype)
    attended = low @ weights.values.transpose(1, 2) + weights.value_bias
    if padding_mask is not None:
        attended = attended.masked_fill(padding_mask.all(-1)[:, None, None, None], 0.0)
    return attended


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
    """Return the output alone."""
    arguments = (residual, query, features, w_feature, b_feature, w_q, w_k, w_v, w_o, gate)
    weights = fold_once(w_feature, b_feature, w_k, w_v, num_heads)
    return forward(*arguments, num_heads, padding_mask, weights)[0]
