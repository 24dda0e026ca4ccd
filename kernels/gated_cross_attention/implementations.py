"""Who computes gated cross-attention, and the request by which dispatch chooses."""

from __future__ import annotations

from torch import Tensor

from kernels.gated_cross_attention.cost import (
    absorbed_cost,
    explicit_cost,
    literal_cost,
    refuse,
    triton_cost,
)
from kernels.kernel import Implementation, Request

IMPLEMENTATIONS = (
    Implementation(
        name="reference",
        module="kernels.gated_cross_attention.reference",
        cost=literal_cost,
    ),
    Implementation(
        name="explicit",
        module="kernels.gated_cross_attention.explicit",
        backward="kernels.gated_cross_attention.reference",
        cost=explicit_cost,
    ),
    Implementation(
        name="absorbed",
        module="kernels.gated_cross_attention.absorbed",
        backward="kernels.gated_cross_attention.absorbed_backward",
        cost=absorbed_cost,
    ),
    Implementation(
        name="triton",
        module="kernels.gated_cross_attention.triton",
        refuse=refuse,
        cost=triton_cost,
    ),
)


def named(name: str) -> Implementation:
    """Return the implementation called `name`; it was chosen from the same list."""
    return next(candidate for candidate in IMPLEMENTATIONS if candidate.name == name)


def request_of(
    query: Tensor,
    features: Tensor,
    num_heads: int,
    needs_features: bool = False,
    backward: bool = False,
) -> Request:
    """Return what dispatch may look at: sizes, dtype, and which gradients are asked for."""
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
