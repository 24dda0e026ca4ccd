"""Gated cross-attention and gated FFN of the adapter (eq. 3 and 4).

Axes: B batch, Q queries, L feature tokens, C feature channels, H heads, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from kernels.device import refuse_triton
from kernels.gated_cross_attention import explicit, reference
from kernels.kernel import Case, Implementation, Kernel, Request, ShapeError

FLOPS_PER_US = 1e5  # one core; only ratios matter to the choice


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
        epilogue in fp32. A query whose every feature is padded returns its residual.

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
    request = _request(cast[0], cast[1], num_heads, cast[1].requires_grad, True)
    chosen = dispatch.choose(KERNEL, request)
    if chosen.name == "explicit":  # autograd through library kernels is the best backward here
        with torch.autocast(query.device.type, enabled=False):
            out = explicit.gated_cross_attention(*arguments)
    elif chosen.name == "reference":
        out = _forward(*arguments)
    else:
        out = _training(*arguments, chosen.name)[0]
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
    chosen = dispatch.choose(KERNEL, _request(query, features, num_heads))
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
    chosen = dispatch.choose(KERNEL, _request(query, features, num_heads, needs_features, True))
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


@torch.library.custom_op("focus::gated_cross_attention_training", mutates_args=())
def _training(
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
    arguments = (residual, query, features, w_feature, b_feature, w_q, w_k, w_v, w_o, gate)
    chosen = KERNEL.implementation(implementation)
    with torch.autocast(query.device.type, enabled=False):
        results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = dispatch.load(
            chosen.module
        ).forward(*arguments, num_heads, padding_mask)
    return results


@_training.register_fake
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
    chosen = KERNEL.implementation(implementation)
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


_training.register_autograd(_training_grad, setup_context=_training_setup)


def _request(
    query: Tensor,
    features: Tensor,
    num_heads: int,
    needs_features: bool = False,
    backward: bool = False,
) -> Request:
    flags = (("feature_gradient", needs_features), ("backward", backward))
    return Request(
        device=query.device.type,
        dtype=query.dtype,
        sizes=(
            ("batch", query.shape[0]),
            ("queries", query.shape[1]),
            ("tokens", features.shape[1]),
            ("channels", features.shape[2]),
            ("dim", query.shape[2]),
            ("heads", num_heads),
        ),
        needs=frozenset(name for name, on in flags if on),
    )


def _refuse_triton(request: Request) -> str | None:
    if request["channels"] > 512:
        return f"takes up to 512 channels, got {request['channels']}: tiles would not fit"
    return refuse_triton(request)


def absorbed_flops(request: Request) -> float:
    """FLOPs without keys and values: 4 Q H L C per row of the batch, and the folding 4 D^2 C.

    The backward adds 6 Q H L C, or 10 when the features need a gradient, and twice the folding.
    """
    loop = 2.0 * request["queries"] * request["heads"] * request["tokens"] * request["channels"]
    products = 2 if "backward" not in request.needs else 5
    products += 2 if "feature_gradient" in request.needs else 0
    folds = 3 if "backward" in request.needs else 1
    folding = folds * 4.0 * request["dim"] ** 2 * request["channels"]
    return request["batch"] * products * loop + folding


def explicit_flops(request: Request) -> float:
    """FLOPs with projected keys and values: 4 L C D + 4 Q L D per row, and the folding 4 D^2 C.

    The backward adds 4 L C D for the weights, as much for the features, and 10 Q L D.
    """
    unit = 4.0 * request["batch"] * request["tokens"] * request["dim"]
    backward = "backward" in request.needs
    projections = 1 + backward + ("feature_gradient" in request.needs)
    attention = request["queries"] * (3.5 if backward else 1.0)
    folding = (3 if backward else 1) * 4.0 * request["dim"] ** 2 * request["channels"]
    return unit * (projections * request["channels"] + attention) + folding


def literal_flops(request: Request) -> float:
    """FLOPs of the reference, which projects features first: 2 L C D + 4 L D^2 + 4 Q L D."""
    unit = 2.0 * request["batch"] * request["tokens"] * request["dim"]
    times = 3.0 if "backward" in request.needs else 1.0
    return times * unit * (request["channels"] + 2.0 * request["dim"] + 2.0 * request["queries"])


def _inputs(case: Case, dtype: torch.dtype, device: str) -> dict[str, Any]:
    size = case.sizes
    generator = torch.Generator().manual_seed(len(case.name))
    batch, queries, tokens = size["batch"], size["queries"], size["tokens"]
    channels, dim = size["channels"], size["dim"]

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return values.to(dtype).to(device)

    square = {name: normal(dim, dim, scale=dim**-0.5) for name in ("w_q", "w_k", "w_v", "w_o")}
    return {
        "residual": normal(batch, queries, dim),
        "query": normal(batch, queries, dim),
        "features": normal(batch, tokens, channels),
        "w_feature": normal(dim, channels, scale=channels**-0.5),
        "b_feature": normal(dim, scale=0.1),
        **square,
        "gate": normal(scale=0.5),
        "num_heads": size["heads"],
    }


KERNEL = Kernel(
    name="gated_cross_attention",
    function=gated_cross_attention,
    ops=("focus::gated_cross_attention",),
    implementations=(
        Implementation(
            name="reference",
            module="kernels.gated_cross_attention.reference",
            cost=lambda request: 100.0 + literal_flops(request) / FLOPS_PER_US,
        ),
        Implementation(
            name="explicit",
            module="kernels.gated_cross_attention.explicit",
            backward="kernels.gated_cross_attention.reference",
            cost=lambda request: 100.0 + explicit_flops(request) / FLOPS_PER_US,
        ),
        Implementation(
            name="absorbed",
            module="kernels.gated_cross_attention.absorbed",
            backward="kernels.gated_cross_attention.absorbed_backward",
            cost=lambda request: 150.0 + absorbed_flops(request) / FLOPS_PER_US,
        ),
        Implementation(
            name="triton",
            module="kernels.gated_cross_attention.triton",
            refuse=_refuse_triton,
            cost=lambda request: 50.0 + 0.3 * absorbed_flops(request) / FLOPS_PER_US,
        ),
    ),
    inputs=_inputs,
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
    cases=(
        Case(
            name="small",
            sizes={
                "batch": 2,
                "queries": 5,
                "tokens": 63,
                "channels": 12,
                "dim": 16,
                "heads": 2,
            },
        ),
    ),
)
