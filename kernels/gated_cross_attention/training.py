"""The training pair of operators: the forward also returns what the backward needs.

Inference and export see `focus::gated_cross_attention` with its one output (`api.py`).

Axes: as in api.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from kernels.gated_cross_attention.implementations import named


@torch.library.custom_op("focus::gated_cross_attention_training", mutates_args=())
def training_forward(
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
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output, context [B, H, Q, C], lse [B, H, Q] and the folded keys and values.

    Only the output has a gradient; `implementation` is the one that dispatch chose.
    """
    arguments = (residual, query, features, w_feature, b_feature, w_q, w_k, w_v, w_o, gate)
    chosen = named(implementation)
    with torch.autocast(query.device.type, enabled=False):
        results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = dispatch.load(
            chosen.module
        ).forward(*arguments, num_heads, padding_mask)
    return results


@training_forward.register_fake
def _(
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
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    shape = (query.shape[0], num_heads, query.shape[1])
    folded = (num_heads, query.shape[2] // num_heads, features.shape[2])
    return (
        residual.new_empty(residual.shape),
        query.new_empty((*shape, features.shape[2]), dtype=dtype),
        query.new_empty(shape, dtype=dtype),
        query.new_empty(folded),
        query.new_empty(folded),
    )


@torch.library.custom_op("focus::gated_cross_attention_training_backward", mutates_args=())
def _training_backward(
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
    implementation: str,
) -> list[Tensor]:
    chosen = named(implementation)
    weights = (w_feature, b_feature, w_q, w_k, w_v, w_o)
    rest = (gate, num_heads, padding_mask, needs_features, context, lse, keys, values)
    with torch.autocast(query.device.type, enabled=False):
        grads: list[Tensor] = dispatch.load(chosen.backward_module).backward(
            grad, query, features, *weights, *rest
        )
    return grads


@_training_backward.register_fake
def _(
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
    implementation: str,
) -> list[Tensor]:
    like = (query, features, w_feature, b_feature, w_q, w_k, w_v, w_o, gate)
    return [t.new_empty((0,) if t is features and not needs_features else t.shape) for t in like]


def _training_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, num_heads, padding_mask, implementation = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors[1:], padding_mask, *output[1:])
    ctx.num_heads, ctx.implementation = num_heads, implementation


def _training_grad(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, padding_mask, context, lse, keys, values = ctx.saved_tensors
    needs_features = ctx.needs_input_grad[2]
    grads: list[Tensor | None] = list(
        _training_backward(
            grad,
            *tensors,
            ctx.num_heads,
            padding_mask,
            needs_features,
            context,
            lse,
            keys,
            values,
            ctx.implementation,
        )
    )
    if not needs_features:
        grads[1] = None
    return grad, *grads, None, None, None


training_forward.register_autograd(_training_grad, setup_context=_training_setup)
