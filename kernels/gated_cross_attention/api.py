"""Gated cross-attention and gated FFN of the adapter (eq. 3 and 4).

Axes: B batch, Q queries, L feature tokens, C feature channels, H heads, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from kernels.gated_cross_attention import explicit, reference
from kernels.gated_cross_attention.cases import CASES, least_flops, make_inputs
from kernels.gated_cross_attention.implementations import IMPLEMENTATIONS, request_of
from kernels.gated_cross_attention.training import training_forward
from kernels.kernel import Kernel, ShapeError


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
    padding_mask: Tensor | None = None,
) -> Tensor:
    """Let few queries attend to a long map of features through a tanh gate.

    residual + tanh(gate) softmax((query W_q^T)(F W_k^T)^T / sqrt(D / H)) (F W_v^T) W_o^T,
    F = features W_feature^T + b_feature.

    Args:
        residual, query: [B, Q, D]. features: [B, L, C].
        w_feature: [D, C], b_feature: [D]; w_q, w_k, w_v, w_o: [D, D]; all in nn.Linear layout.
        gate: one number.
        padding_mask: [B, L] bool, True where a feature is to be ignored.

    Returns:
        [B, Q, D] in the dtype of `residual`. Under autocast products run in its dtype, softmax and
        epilogue in fp32. A query whose every feature is padded returns its residual. NaN and Inf
        propagate: of a query to its row, of a feature to every query of its row of the batch.

    Gradients: everything but the padding mask.

    Raises:
        ShapeError: arguments that contradict each other.
    """
    weights = (w_feature, b_feature, w_q, w_k, w_v, w_o)
    _check(residual, query, features, weights, gate, num_heads, padding_mask)
    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    cast = [t.to(dtype) for t in (query, features, *weights)]
    arguments: Any = (residual, *cast, gate, num_heads, padding_mask)
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (residual, *cast, gate))
    out: Tensor
    if not trains or torch.compiler.is_exporting():
        out = _forward(*arguments)
        return out
    request = request_of(cast[0], cast[1], num_heads, cast[1].requires_grad, True)
    chosen = dispatch.choose(KERNEL, request)
    if chosen.name == "explicit":  # autograd through library kernels is the best backward here
        with torch.autocast(query.device.type, enabled=False):
            out = explicit.gated_cross_attention(*arguments)
    elif chosen.name == "reference":
        out = _forward(*arguments)
    else:
        out = training_forward(*arguments, chosen.name)[0]
    return out


def gated_ffn(
    h: Tensor, normed: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gate: Tensor
) -> Tensor:
    """Add a gated two-layer network: h + tanh(gate) (W2 gelu(W1 normed + b1) + b2) (eq. 4).

    `h`, `normed` [..., D]; w1 [F, D], b1 [F], w2 [D, F], b2 [D]. Exact gelu. Differentiable in all.
    """
    return reference.gated_ffn(h, normed, w1, b1, w2, b2, gate)


def _check(
    residual: Tensor,
    query: Tensor,
    features: Tensor,
    weights: tuple[Tensor, ...],
    gate: Tensor,
    num_heads: int,
    padding_mask: Tensor | None,
) -> None:
    if query.dim() != 3 or features.dim() != 3 or residual.shape != query.shape:
        raise ShapeError(
            "residual and query [B, Q, D] and features [B, L, C] expected, got "
            f"{tuple(residual.shape)}, {tuple(query.shape)} and {tuple(features.shape)}"
        )
    dim, channels = query.shape[2], features.shape[2]
    expected = [(dim, channels), (dim,)] + [(dim, dim)] * 4
    got = [tuple(weight.shape) for weight in weights]
    if got != expected:
        raise ShapeError(
            f"w_feature, b_feature, w_q, w_k, w_v, w_o: shapes {expected} expected, got {got}"
        )
    if features.shape[0] != query.shape[0]:
        raise ShapeError(f"{query.shape[0]} rows of queries but {features.shape[0]} of features")
    if num_heads < 1 or dim % num_heads:
        raise ShapeError(f"width {dim} cannot be split into {num_heads} heads")
    if gate.numel() != 1:
        raise ShapeError(f"gate must be one number, got shape {tuple(gate.shape)}")
    if padding_mask is not None and (
        padding_mask.dtype != torch.bool or padding_mask.shape != features.shape[:2]
    ):
        raise ShapeError(
            f"padding_mask must be bool {tuple(features.shape[:2])}, got "
            f"{padding_mask.dtype} {tuple(padding_mask.shape)}"
        )


@torch.library.custom_op("focus::gated_cross_attention", mutates_args=())
def _forward(
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
    chosen = dispatch.choose(KERNEL, request_of(query, features, num_heads))
    arguments = (residual, query, features, w_feature, b_feature, w_q, w_k, w_v, w_o, gate)
    with torch.autocast(query.device.type, enabled=False):
        out: Tensor = dispatch.load(chosen.module).gated_cross_attention(
            *arguments, num_heads, padding_mask
        )
    return out


@_forward.register_fake
def _(residual: Tensor, *_: Any) -> Tensor:
    return residual.new_empty(residual.shape)


@torch.library.custom_op("focus::gated_cross_attention_backward", mutates_args=())
def _backward(
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
    chosen = dispatch.choose(KERNEL, request_of(query, features, num_heads, needs_features, True))
    arguments = (grad, query, features, w_feature, b_feature, w_q, w_k, w_v, w_o, gate)
    with torch.autocast(query.device.type, enabled=False):
        grads: list[Tensor] = dispatch.load(chosen.backward_module).gated_cross_attention_backward(
            *arguments, num_heads, padding_mask, needs_features
        )
    return grads


@_backward.register_fake
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
) -> list[Tensor]:
    like = (query, features, w_feature, b_feature, w_q, w_k, w_v, w_o, gate)
    return [t.new_empty((0,) if t is features and not needs_features else t.shape) for t in like]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    *tensors, num_heads, padding_mask = inputs
    ctx.save_for_backward(*tensors[1:], padding_mask)
    ctx.num_heads = num_heads


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, padding_mask = ctx.saved_tensors
    needs_features = ctx.needs_input_grad[2]
    grads: list[Tensor | None] = list(
        _backward(grad, *tensors, ctx.num_heads, padding_mask, needs_features)
    )
    if not needs_features:
        grads[1] = None
    return grad, *grads, None, None


_forward.register_autograd(_grad, setup_context=_setup)


KERNEL = Kernel(
    name="gated_cross_attention",
    function=gated_cross_attention,
    ops=("focus::gated_cross_attention",),
    implementations=IMPLEMENTATIONS,
    inputs=make_inputs,
    differentiable=(
        "residual",
        "query",
        "features",
        "w_feature",
        "b_feature",
        "w_q",
        "w_k",
        "w_v",
        "w_o",
        "gate",
    ),
    cases=CASES,
    trained=("query", "w_feature", "w_q", "w_k", "w_v", "w_o", "gate"),
    flops=least_flops,
    oracle="absorbed",
)
