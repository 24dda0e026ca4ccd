"""Mask attention: queries on a grid attend to the cells of projected masks (eq. 6).

Axes: B batch, H heads, N queries, M mask channels, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from kernels import dispatch
from kernels.kernel import Implementation, Kernel, Request, ShapeError
from kernels.mask_attention.cases import CASES, least_flops, make_inputs
from kernels.mask_attention.cost import dense_cost, refuse, separable_cost, triton_cost

Size = tuple[int, int]


def mask_attention(
    query: Tensor,
    mask: Tensor,
    key_vectors: Tensor,
    value_vectors: Tensor,
    query_grid: Size,
    extent: Size,
    position: Literal["rope", "none"] = "rope",
    theta: float = 1e4,
) -> Tensor:
    """Attend from a grid of queries to the cells of a mask.

    k_j = R(pos_j) sum_m mask_mj key_m,  v_j = sum_m mask_mj value_m,
    out_i = sum_j softmax_j((R(pos_i) q_i) . k_j / sqrt(D)) v_j. R is 2-D axial RoPE in latent
    pixels at cell centres (first half of D by x, second by y, interleaved pairs), or 1.

    Args:
        query: [B, H, N, D], N = Hq * Wq row-major. D divisible by 4 with positions.
        mask: [B, M, Hk, Wk] in [0, 1], hard or soft.
        key_vectors, value_vectors: [H, M, D], the mask projection times W_k and W_v, per head.
        query_grid: (Hq, Wq).
        extent: (Hl, Wl) of the latent that both grids cover.
        position: "rope", or "none": then attention sees only how many cells each mask covers.
        theta: base of the rotary frequencies.

    Returns:
        [B, H, N, D] in the dtype of `query`. Half precision is computed in fp32. NaN and Inf
        propagate.

    Gradients: query, key_vectors, value_vectors, mask.

    Raises:
        ShapeError: arguments that contradict each other.
    """
    _check(query, mask, key_vectors, value_vectors, query_grid, extent, position)
    if torch.is_autocast_enabled(query.device.type):
        query = query.to(torch.get_autocast_dtype(query.device.type))
    dtype = torch.promote_types(query.dtype, torch.float32)
    out: Tensor = _forward(
        query,
        mask.to(dtype),
        key_vectors.to(dtype),
        value_vectors.to(dtype),
        list(query_grid),
        list(extent),
        position == "rope",
        theta,
    )
    return out


def _check(
    query: Tensor,
    mask: Tensor,
    key_vectors: Tensor,
    value_vectors: Tensor,
    query_grid: Size,
    extent: Size,
    position: str,
) -> None:
    if query.dim() != 4 or mask.dim() != 4:
        raise ShapeError(
            "query [B, H, N, D] and mask [B, M, Hk, Wk] expected, got "
            f"{tuple(query.shape)} and {tuple(mask.shape)}"
        )
    batch, heads, num_queries, dim = query.shape
    vectors = (heads, mask.shape[1], dim)
    if tuple(key_vectors.shape) != vectors or tuple(value_vectors.shape) != vectors:
        raise ShapeError(
            f"key and value vectors [H, M, D] = {vectors} expected, got "
            f"{tuple(key_vectors.shape)} and {tuple(value_vectors.shape)}"
        )
    if mask.shape[0] != batch:
        raise ShapeError(f"mask has batch {mask.shape[0]}, query {batch}; expand the mask")
    if query_grid[0] * query_grid[1] != num_queries:
        raise ShapeError(
            f"query_grid {tuple(query_grid)} holds {query_grid[0] * query_grid[1]} cells, "
            f"but there are {num_queries} queries"
        )
    if min(mask.shape[1:]) < 1 or min(extent) < 1:
        raise ShapeError(
            f"mask and extent must not be empty, got {tuple(mask.shape)} over {tuple(extent)}"
        )
    if position not in ("rope", "none"):
        raise ShapeError(f'position must be "rope" or "none", got {position!r}')
    if position == "rope" and dim % 4:
        raise ShapeError(f'position="rope" needs a head width divisible by 4, got {dim}')


@torch.library.custom_op("focus::mask_attention", mutates_args=())
def _forward(
    query: Tensor,
    mask: Tensor,
    key_vectors: Tensor,
    value_vectors: Tensor,
    query_grid: Sequence[int],
    extent: Sequence[int],
    rope: bool,
    theta: float,
) -> Tensor:
    chosen = dispatch.choose(KERNEL, _request(query, mask))
    grid, size = (query_grid[0], query_grid[1]), (extent[0], extent[1])
    with torch.autocast(query.device.type, enabled=False):
        out: Tensor = dispatch.load(chosen.module).mask_attention(
            query, mask, key_vectors, value_vectors, grid, size, rope, theta
        )
    return out


@_forward.register_fake
def _(
    query: Tensor,
    mask: Tensor,
    key_vectors: Tensor,
    value_vectors: Tensor,
    query_grid: Sequence[int],
    extent: Sequence[int],
    rope: bool,
    theta: float,
) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("focus::mask_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    mask: Tensor,
    key_vectors: Tensor,
    value_vectors: Tensor,
    query_grid: Sequence[int],
    extent: Sequence[int],
    rope: bool,
    theta: float,
    needs_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen = dispatch.choose(KERNEL, _request(query, mask, needs_mask, backward=True))
    grid, size = (query_grid[0], query_grid[1]), (extent[0], extent[1])
    with torch.autocast(query.device.type, enabled=False):
        grads: tuple[Tensor, Tensor, Tensor, Tensor] = dispatch.load(
            chosen.backward_module
        ).mask_attention_backward(
            grad, query, mask, key_vectors, value_vectors, grid, size, rope, theta, needs_mask
        )
    return grads


@_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    mask: Tensor,
    key_vectors: Tensor,
    value_vectors: Tensor,
    query_grid: Sequence[int],
    extent: Sequence[int],
    rope: bool,
    theta: float,
    needs_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape),
        mask.new_empty(mask.shape if needs_mask else (0,)),
        key_vectors.new_empty(key_vectors.shape),
        value_vectors.new_empty(value_vectors.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, mask, key_vectors, value_vectors = ctx.saved_tensors
    needs_mask = ctx.needs_input_grad[1]
    grad_query, grad_mask, grad_keys, grad_values = _backward(
        grad, query, mask, key_vectors, value_vectors, *ctx.options, needs_mask
    )
    masked = grad_mask if needs_mask else None
    return grad_query, masked, grad_keys, grad_values, None, None, None, None


_forward.register_autograd(_grad, setup_context=_setup)


def _request(
    query: Tensor, mask: Tensor, needs_mask: bool = False, backward: bool = False
) -> Request:
    batch, heads, num_queries, dim = query.shape
    needs = {name for name, on in (("mask_gradient", needs_mask), ("backward", backward)) if on}
    return Request(
        device=query.device.type,
        dtype=query.dtype,
        sizes=(
            ("batch", batch),
            ("heads", heads),
            ("queries", num_queries),
            ("dim", dim),
            ("masks", mask.shape[1]),
            ("rows", mask.shape[2]),
            ("columns", mask.shape[3]),
        ),
        needs=frozenset(needs),
    )


KERNEL = Kernel(
    name="mask_attention",
    function=mask_attention,
    ops=("focus::mask_attention",),
    implementations=(
        Implementation(
            name="reference",
            module="kernels.mask_attention.reference",
            cost=dense_cost,
        ),
        Implementation(
            name="structured",
            module="kernels.mask_attention.structured",
            backward="kernels.mask_attention.structured_backward",
            cost=separable_cost,
        ),
        Implementation(
            name="triton",
            module="kernels.mask_attention.triton",
            refuse=refuse,
            cost=triton_cost,
        ),
    ),
    inputs=make_inputs,
    differentiable=("query", "mask", "key_vectors", "value_vectors"),
    cases=CASES,
    trained=("query", "key_vectors", "value_vectors"),
    flops=least_flops,
    oracle="structured",
)
