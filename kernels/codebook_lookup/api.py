"""Codebook lookup: the nearest code of every token, and SimVQ built on it.

Axes: N tokens, K codes, d code width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from kernels.codebook_lookup import reference
from kernels.codebook_lookup.cases import CASES, least_flops, make_inputs
from kernels.device import interpreted_cost, refuse_triton
from kernels.kernel import Implementation, Kernel, Request, ShapeError
from kernels.remember import Remembered


def codebook_lookup(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Find the nearest code of every token.

    index_n = argmin_k |x_n - c_k|^2 over the values as given, lowest index on ties.

    Args:
        x: [N, d], any floating dtype.
        codes: [K, d].

    Returns:
        index int64 [N] and the squared distance fp32 [N]. The index is that of the fp64 argmin.
        A token that is not finite gives (-1, NaN); a code that is not finite does so to all.

    Gradients: the distance differentiates to x and codes.

    Raises:
        ShapeError: not two matrices of one width, or no code.
    """
    if x.dim() != 2 or codes.dim() != 2 or x.shape[1] != codes.shape[1] or x.shape[1] < 1:
        raise ShapeError(
            f"x [N, d] and codes [K, d] expected, got {tuple(x.shape)} and {tuple(codes.shape)}"
        )
    if codes.shape[0] < 1:
        raise ShapeError("a codebook needs at least one code, got none")
    distance, index = _lookup(x, codes)
    return index, distance


def simvq(
    x: Tensor, codebook: Tensor, weight: Tensor, bias: Tensor | None = None, beta: float = 0.25
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise with a frozen codebook seen through one learned linear map (SimVQ).

    codes = codebook W^T + b;  q = codes[argmin_k |x - codes_k|^2];
    loss = mean((q - sg x)^2) + beta mean((x - sg q)^2);  returned: x + sg(q - x).

    Args:
        x: [..., d].
        codebook: [K, d], frozen: it gets no gradient.
        weight: [d, d] in nn.Linear layout; bias: [d] (official SimVQ) or None.
        beta: weight of the commitment term.

    Returns:
        Straight-through codes [..., d] in the dtype of x, index int64 [...], loss fp32 scalar.
        Computed in fp32 (fp64 for fp64 inputs), autocast or not. Tokens that are not finite get
        index -1 and NaN codes.

    Gradients: x, weight, bias, in one pass and without a [K, d] or [N, K] tensor.

    Raises:
        ShapeError: widths that differ.
    """
    dim = codebook.shape[-1]
    if codebook.dim() != 2 or x.shape[-1] != dim or tuple(weight.shape) != (dim, dim):
        raise ShapeError(
            f"x [..., d], codebook [K, d], weight [d, d] expected, got {tuple(x.shape)}, "
            f"{tuple(codebook.shape)}, {tuple(weight.shape)}"
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    flat = x.reshape(-1, dim).to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        frozen = codebook.detach().to(dtype)
        shift = None if bias is None else bias.to(dtype)
        quantised, index, loss = _simvq(flat, frozen, weight.to(dtype), shift, beta)
    return quantised.reshape(x.shape).to(x.dtype), index.reshape(x.shape[:-1]), loss


@torch.library.custom_op("focus::codebook_lookup", mutates_args=())
def _lookup(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    chosen = dispatch.choose(KERNEL, _request(x, codes))
    with torch.autocast(x.device.type, enabled=False):
        index, distance = dispatch.load(chosen.module).codebook_lookup(x, codes)
    return distance, index


@_lookup.register_fake
def _(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape[0], dtype=torch.float32),
        x.new_empty(x.shape[0], dtype=torch.int64),
    )


def _lookup_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    x, codes = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, codes, output[1])


def _lookup_grad(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, codes, index = ctx.saved_tensors
    step = 2.0 * grad[:, None].to(x.dtype) * (x - reference.gather(codes, index))
    grad_codes = None
    if ctx.needs_input_grad[1]:
        grad_codes = torch.zeros_like(codes).index_add(0, index.clamp(min=0), -step)
    return step, grad_codes


_lookup.register_autograd(_lookup_grad, setup_context=_lookup_setup)


_codes: Remembered[Tensor] = Remembered()


@torch.library.custom_op("focus::simvq", mutates_args=())
def _simvq(
    x: Tensor, codebook: Tensor, weight: Tensor, bias: Tensor | None, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    sources = (codebook, weight) if bias is None else (codebook, weight, bias)
    codes = _codes.get(sources, lambda: reference.project(codebook, weight, bias))
    _, index = _lookup(x, codes)
    quantised, loss = reference.commit(x, reference.gather(codes, index), beta)
    return quantised, index, loss


@_simvq.register_fake
def _(
    x: Tensor, codebook: Tensor, weight: Tensor, bias: Tensor | None, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.int64), x.new_empty(())


@torch.library.custom_op("focus::simvq_backward", mutates_args=())
def _simvq_backward(
    grad_quantised: Tensor,
    grad_loss: Tensor,
    x: Tensor,
    codebook: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = reference.gather(codebook, index)
    nearest = reference.project(rows, weight, bias)
    if dispatch.choose(KERNEL, _request(x, codebook)).name == "triton" and x.numel():
        scale = (2.0 / x.numel() * grad_loss).contiguous()
        one_pass = dispatch.load("kernels.codebook_lookup.triton").commit_gradients
        safe = index.clamp(min=0)
        grad_x, grad_weight = one_pass(x, nearest, codebook, safe, grad_quantised, scale, beta)
        return grad_x, grad_weight, (nearest - x).sum(0) * scale
    return reference.commit_backward(x, nearest, rows, grad_quantised, grad_loss, beta)


@_simvq_backward.register_fake
def _(
    grad_quantised: Tensor,
    grad_loss: Tensor,
    x: Tensor,
    codebook: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(x.shape[1])


def _simvq_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, codebook, weight, bias, beta = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, codebook, weight, bias, output[1])
    ctx.beta = beta


def _simvq_grad(
    ctx: Any, grad_quantised: Tensor, _: Tensor, grad_loss: Tensor
) -> tuple[Tensor | None, ...]:
    x, codebook, weight, bias, index = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _simvq_backward(
        grad_quantised, grad_loss, x, codebook, weight, bias, index, ctx.beta
    )
    return grad_x, None, grad_weight, None if bias is None else grad_bias, None


_simvq.register_autograd(_simvq_grad, setup_context=_simvq_setup)


def _request(x: Tensor, codes: Tensor) -> Request:
    return Request(
        device=x.device.type,
        dtype=torch.promote_types(x.dtype, codes.dtype),
        sizes=(("tokens", x.shape[0]), ("codes", codes.shape[0]), ("dim", x.shape[1])),
    )


def _refuse_native(request: Request) -> str | None:
    refusal: str | None = dispatch.load("kernels.codebook_lookup.native").refuse(request)
    return refusal


def _refuse_triton(request: Request) -> str | None:
    if request["dim"] > 128:
        return f"takes codes up to 128 wide, got {request['dim']}"
    return refuse_triton(request)


def _triton_cost(request: Request) -> float:
    return interpreted_cost(request) + 50.0 + 1e-7 * request["tokens"] * request["codes"]


def _native_cost(request: Request) -> float:
    tokens, codes, dim = request["tokens"], request["codes"], request["dim"]
    return 100.0 + 0.02 * codes * dim / 32 + 3e-4 * tokens * codes * dim / 32


def _reference_cost(request: Request) -> float:
    return 100.0 + 1e-2 * request["tokens"] * request["codes"] * (request["dim"] + 16) / 32


KERNEL = Kernel(
    name="codebook_lookup",
    function=codebook_lookup,
    ops=("focus::codebook_lookup", "focus::simvq"),
    implementations=(
        Implementation(
            name="reference", module="kernels.codebook_lookup.reference", cost=_reference_cost
        ),
        Implementation(
            name="native",
            module="kernels.codebook_lookup.native",
            refuse=_refuse_native,
            cost=_native_cost,
        ),
        Implementation(
            name="triton",
            module="kernels.codebook_lookup.triton",
            refuse=_refuse_triton,
            cost=_triton_cost,
        ),
    ),
    inputs=make_inputs,
    differentiable=("x", "codes"),
    cases=CASES,
    flops=least_flops,
)
